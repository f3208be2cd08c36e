"""Classes in training: their names, the embedding that stands for every class, fine-tuning, previews by class."""

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, Objective, UsageError
from hf_ddpm.classes import Classes
from hf_ddpm.evaluation.distances import kernel_distance
from hf_ddpm.figures import grid
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.sampling.sampler import by_label, grid_by_label, strip_by_label
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.draws import hide_labels
from hf_ddpm.training.loop import train
from hf_ddpm.training.validation import Validation, measure_classes
from tests.support.image_data import sort_into_kinds
from tests.support.networks import smallest_unet_config
from tests.support.trained import assert_same_weights, losses, part

KINDS = Classes(("dark", "light"), has_unconditional=True)


@pytest.fixture
def settings(tiny_settings, image_folder, tmp_path) -> dict:
    """Settings of a run on images of two classes, in the folders `dark` and `light`."""
    kinds = sort_into_kinds(image_folder, tmp_path / "kinds", KINDS.names)
    return {**tiny_settings, "train_data_dir": str(kinds), "label_column": "label"}


@pytest.mark.slow
def test_run_learns_the_named_classes_and_one_for_all(settings):
    pipeline = train(TrainingConfig(**settings))
    assert pipeline is not None
    folder = Path(settings["output_dir"])
    loaded = DDPMPipeline.from_pretrained(folder)
    assert loaded.classes == pipeline.classes == KINDS
    assert loaded.unet.config.num_class_embeds == 3
    assert json.loads((folder / "run.json").read_text())["data"]["class_names"] == ["dark", "light"]
    card = (folder / "README.md").read_text()
    assert "a number below 2; the number 2 is for images without a class" in card
    assert '`class_labels="dark"`' in card
    assert "| Classes | 2: dark, light |" in card


@pytest.mark.slow
def test_run_without_class_dropout_has_no_embedding_for_all(settings):
    pipeline = train(TrainingConfig(**settings, class_dropout=0.0))
    assert pipeline is not None
    assert pipeline.classes == replace(KINDS, has_unconditional=False)
    assert pipeline.unet.config.num_class_embeds == 2
    assert "without a class" not in Path(settings["output_dir"], "README.md").read_text()


@pytest.mark.slow
def test_resumed_run_hides_the_same_classes(settings):
    whole = TrainingConfig(**settings, class_dropout=0.4, checkpoints_total_limit=None)
    train(whole)
    parted = part(whole)
    train(replace(parted, resume_from_checkpoint="latest"))
    assert losses(parted.output_dir) == losses(whole.output_dir)
    assert_same_weights(whole.output_dir, parted.output_dir)


def test_classes_are_hidden_by_seed_and_position():
    positions = torch.arange(20_000)
    labels = positions % 2
    hidden = hide_labels(0, positions, labels, KINDS, 0.1)
    is_hidden = hidden == KINDS.unconditional
    # Five standard errors of a share of 0.1.
    assert abs(float(is_hidden.float().mean()) - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5
    assert torch.equal(hidden[~is_hidden], labels[~is_hidden])
    parts = [hide_labels(0, positions[i::3], labels[i::3], KINDS, 0.1) for i in range(3)]
    assert all(torch.equal(part, hidden[i::3]) for i, part in enumerate(parts))
    assert not torch.equal(hide_labels(1, positions, labels, KINDS, 0.1), hidden)
    assert hide_labels(0, positions, labels, replace(KINDS, has_unconditional=False), 0.1) is labels
    assert hide_labels(0, positions, None, None, 0.1) is None


def test_stable_target_without_class_is_over_the_images_of_all_classes():
    objective = Objective(DDPMScheduler(100, beta_schedule="squaredcos_cap_v2"), unconditional_class=2)
    x_0, extra = torch.rand(2, 8, 1, 4, 4).mul(2).sub(1)
    arguments = {"timesteps": torch.full((8,), 60), "noise": torch.randn_like(x_0), "extra_images": extra}

    def loss(labels: torch.Tensor | None) -> torch.Tensor:
        extra_labels = None if labels is None else torch.arange(8) % 2
        network = lambda x_t, t, **_: SimpleNamespace(sample=torch.zeros_like(x_t))  # noqa: E731
        return objective(network, x_0, labels, **arguments, extra_labels=extra_labels)

    assert torch.equal(loss(torch.full((8,), 2)), loss(None))
    assert not torch.equal(loss(torch.full((8,), 1)), loss(None))


@pytest.mark.slow
def test_model_without_classes_is_tuned_to_classes(settings, tmp_path):
    """It begins as the model that it was, whatever the class, and learns to tell them apart."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(**smallest_unet_config(channels=1))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(30, beta_end=0.7)).save_pretrained(tmp_path / "base")
    for name in ("model_config_name_or_path", "ddpm_num_steps"):
        settings.pop(name)
    config = TrainingConfig(**{**settings, "init_from": str(tmp_path / "base"), "max_train_steps": 1})
    started = train(replace(config, learning_rate=1e-30, lr_scheduler="constant", lr_warmup_steps=0))
    assert started is not None
    x_t, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 10, 29])
    with torch.no_grad():
        expected = unet.eval()(x_t, t).sample
        for label in range(3):
            ours = started.unet(x_t, t, class_labels=torch.full((3,), label)).sample
            assert torch.allclose(ours, expected, rtol=0, atol=1e-6)
    more = {"output_dir": config.output_dir + "-tuned", "max_train_steps": 3, "class_dropout": 0.5}
    tuned = train(replace(config, **more))
    assert tuned is not None
    assert tuned.classes == KINDS
    table = tuned.unet.class_embedding.weight
    assert not torch.equal(table[0], table[1])
    assert bool(table[2].any())  # it began at zero, and learns from the images whose class is hidden


def test_class_dropout_without_classes_is_refused(tiny_settings):
    with pytest.raises(UsageError, match=r"class_dropout = 0\.3 has no effect without classes: give label_column"):
        train(TrainingConfig(**tiny_settings, class_dropout=0.3))


def test_grid_has_a_row_for_each_class():
    assert grid_by_label(16, None) == (16, None)
    assert grid_by_label(16, Classes(tuple("abcde"))) == (20, 4)
    assert grid_by_label(16, Classes(tuple(map(str, range(10))))) == (20, 2)
    assert grid_by_label(16, Classes(tuple(map(str, range(17))))) == (16, None)
    assert by_label([0, 1, 2, 0, 1, 2], 2) == [0, 0, 1, 1, 2, 2]
    assert by_label([3, 1], None) == [3, 1]


def test_strip_has_a_row_for_each_label_and_pairs_images_of_one_noise() -> None:
    """Two labels in turn and noises of each: image n has the shade 10 n, and with more steps one more."""
    shown = {
        f"{more} more": [Image.new("L", (32, 32), 10 * number + more) for number in range(10)] for more in range(2)
    }
    strip = np.asarray(strip_by_label(shown, 5, Classes(("a", "b"))))[..., 0]
    # A run of 32 pixels of one shade is a part of an image; shorter ones are of the titles.
    runs = [[(int(shade), len([*pixels])) for shade, pixels in groupby(line)] for line in strip]
    orders = [[shade for shade, length in line if shade != 255 and length >= 32] for line in runs]
    assert [order for order, _ in groupby(filter(None, orders))] == [
        [0, 1, 20, 21, 40, 41, 60, 61],
        [10, 11, 30, 31, 50, 51, 70, 71],
    ]


@pytest.mark.slow
def test_previews_and_sets_have_the_same_grid_with_a_class_in_each_row(settings):
    train(TrainingConfig(**{**settings, "eval_batch_size": 4}))
    folder = Path(settings["output_dir"])
    out = folder.with_name("set")
    write_samples(
        str(folder), out, num_images=4, num_inference_steps=settings["ddpm_num_inference_steps"], device="cpu"
    )
    # Image i has the class i % 2, and so stands in that row.
    images = [Image.open(out / f"{i:06d}.png") for i in (0, 2, 1, 3)]
    expected = np.array(grid(images, 2))
    assert np.array_equal(np.array(Image.open(out / "grid.png")), expected)
    assert np.array_equal(np.array(Image.open(folder / "figures/samples.png")), expected)


@pytest.mark.slow
def test_tuning_to_the_classes_of_a_model_needs_them_in_its_order(settings, tmp_path):
    train(TrainingConfig(**settings))
    for name in ("model_config_name_or_path", "ddpm_num_steps"):
        settings.pop(name)
    more = {
        **settings,
        "init_from": settings["output_dir"],
        "output_dir": str(tmp_path / "more"),
        "max_train_steps": 1,
    }
    pipeline = train(TrainingConfig(**more))
    assert pipeline is not None
    assert pipeline.classes == KINDS
    others = sort_into_kinds(Path(settings["train_data_dir"]) / "dark", tmp_path / "others", ["a", "b"])
    with pytest.raises(UsageError, match=r"must have the classes of .*, dark, light, in this order, got a, b: give"):
        train(TrainingConfig(**{**more, "train_data_dir": str(others), "output_dir": str(tmp_path / "no")}))
    assert not (tmp_path / "no").exists()


def test_validation_measures_each_class_of_which_there_are_enough_images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 60 + [1] * 10 + [2] * 70)
    features, samples = torch.randn(140, 5, generator=generator), torch.randn(180, 5, generator=generator)
    samples[2::3] += 3  # the third class alone is drawn wrongly
    loss = torch.arange(140.0)
    validation = Validation(None, torch.zeros(140, 1, 8, 8), 255, labels, features, 180)
    classes, in_turn = Classes(("a", "b", "c")), [i % 3 for i in range(180)]
    measured = measure_classes(validation, classes, loss, samples, in_turn)
    assert [*measured] == ["a", "c"]
    assert measured["a"]["kid"] == kernel_distance(samples[::3], features[:60])[0]
    wrong, error = measured["c"]["kid"], measured["a"]["kid_standard_error"]
    assert wrong is not None
    assert error is not None
    assert wrong > 10 * error > 0
    assert measured["c"]["val_loss"] == pytest.approx(float(loss[70:].mean()))
    assert measure_classes(validation, None, loss, samples, None) == {}
    assert measure_classes(replace(validation, labels=None), classes, loss, samples, in_turn) == {}
