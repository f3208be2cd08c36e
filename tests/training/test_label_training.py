"""Numbers and several columns as labels in training: what a run learns, keeps and resumes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline, DDPMScheduler, Objective, UsageError
from hf_ddpm.classes import Classes
from hf_ddpm.label_embedding import EMBEDDING_FILE, PREFIX, read_embedding
from hf_ddpm.labels import HIDDEN, Columns, Values, values_of
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.draws import hide_labels
from hf_ddpm.training.loop import train
from hf_ddpm.training.posthoc import write_average
from tests.support.labeled_images import labeled_images, save_labeled
from tests.support.networks import smallest_unet_config
from tests.support.trained import assert_same_weights, losses, part

KINDS = Classes(("even", "odd"), has_unconditional=True)
LIGHT = values_of("light", np.linspace(0.2, 0.8, 50), has_unconditional=True)
BOTH = Columns((("kind", KINDS), ("light", LIGHT)), has_unconditional=True)
COLUMNS = ("light", "kind,light")


@pytest.fixture
def settings(tiny_settings, tmp_path) -> dict:
    del tiny_settings["train_data_dir"]
    return {**tiny_settings, "dataset_name": save_labeled(tmp_path / "images")}


def whole_weights(folder) -> dict:
    """The weights of a model, with those of its embedding of labels."""
    weights = load_file(Path(folder) / "unet/diffusion_pytorch_model.safetensors")
    file = Path(folder) / EMBEDDING_FILE
    return {**weights, **(read_embedding(file) if file.exists() else {})}


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_run_learns_labels_and_resumes_as_if_it_had_not_stopped(column, settings, capsys):
    whole = TrainingConfig(**settings, label_column=column, class_dropout=0.4, checkpoints_total_limit=None)
    pipeline = train(whole)
    assert pipeline is not None
    said = "kind: 2 classes, light: 0.156863 to 0.843137" if "," in column else "light: 0.156863 to 0.843137"
    assert f"labels {said}" in capsys.readouterr().err
    loaded = DDPMPipeline.from_pretrained(whole.output_dir)
    assert loaded.labels == pipeline.labels
    assert isinstance(loaded.labels, Columns if "," in column else Values)
    assert loaded.labels.has_unconditional
    assert json.loads(Path(whole.output_dir, "run.json").read_text())["data"]["labels"] == str(loaded.labels)

    parted = part(whole)
    train(replace(parted, resume_from_checkpoint="latest"))
    assert losses(parted.output_dir) == losses(whole.output_dir)
    assert_same_weights(whole.output_dir, parted.output_dir)
    ours, others = whole_weights(whole.output_dir), whole_weights(parted.output_dir)
    assert any(name.startswith(PREFIX) for name in ours)
    assert all(torch.equal(tensor, others[name]) for name, tensor in ours.items())
    assert DDPMPipeline.from_pretrained(parted.output_dir).labels == loaded.labels

    # Previews have a row for each of the labels in turn, the averages and the guide are whole.
    average = DDPMPipeline.from_pretrained(write_average(Path(whole.output_dir), 0.1))
    assert average.labels == loaded.labels
    loaded.set_progress_bar_config(disable=True)
    images = loaded.load_guide()(
        batch_size=2, class_labels=[*loaded.labels.in_turn[:2]], guidance_scale=2.0, output_type="pt"
    ).images
    assert bool(images.isfinite().all())


@pytest.mark.slow
def test_accumulated_run_is_the_same_but_for_rounding(settings):
    """Which labels are hidden is a function of the position, whatever the division into micro-batches."""
    config = TrainingConfig(**{**settings, "label_column": "kind,light", "class_dropout": 0.4, "ema_snapshots": 0})
    train(config)
    parts = replace(config, output_dir=f"{config.output_dir}-parts", train_batch_size=2, gradient_accumulation_steps=2)
    train(parts)
    assert losses(parts.output_dir) == pytest.approx(losses(config.output_dir), rel=1e-4)


@pytest.mark.slow
def test_network_follows_the_number(tiny_settings, tmp_path):
    """Images are of one gray, and the number says which."""
    del tiny_settings["train_data_dir"]
    tiny_settings |= {"max_train_steps": 150, "train_batch_size": 16, "checkpointing_steps": 150, "ema_snapshots": 0}
    tiny_settings |= {"learning_rate": 6e-3, "eval_batch_size": 1, "ddpm_num_inference_steps": 10}
    config = TrainingConfig(
        **tiny_settings, dataset_name=save_labeled(tmp_path / "images", 64), label_column="light", ema_max_decay=0.98
    )
    pipeline = train(config)
    assert pipeline is not None
    pipeline.set_progress_bar_config(disable=True)
    wanted = [0.25, 0.5, 0.75]
    images: Any = pipeline(
        batch_size=24, class_labels=wanted * 8, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    means = images.flatten(1).mean(dim=1).reshape(8, 3).mean(dim=0)
    assert means.tolist() == pytest.approx(wanted, abs=0.1)


def test_labels_are_hidden_by_seed_and_position():
    count, p = 20_000, 0.2
    positions = torch.arange(count)
    labels = torch.stack([positions % 2, 500 + positions % 7], dim=1).float()
    hidden = hide_labels(0, positions, labels, BOTH, p)
    assert hidden is not None
    is_hidden = hidden == torch.tensor([2, HIDDEN])
    whole = p + (1 - p) * p**2
    for share, expected in (
        (is_hidden.all(dim=1), whole),
        (is_hidden[:, 0] & ~is_hidden[:, 1], (1 - p) * p * (1 - p)),
        (is_hidden[:, 1] & ~is_hidden[:, 0], (1 - p) * p * (1 - p)),
    ):
        assert abs(float(share.float().mean()) - expected) < 5 * (expected * (1 - expected) / count) ** 0.5
    assert torch.equal(hidden[~is_hidden], labels[~is_hidden])
    parts = [hide_labels(0, positions[i::3], labels[i::3], BOTH, p) for i in range(3)]
    assert all(torch.equal(part, hidden[i::3]) for i, part in enumerate(parts))
    numbers = hide_labels(0, positions, labels[:, 1], LIGHT, p)
    assert numbers is not None
    # What hides a label whole is the same draw for every kind of labels.
    classes = hide_labels(0, positions, positions % 2, KINDS, p)
    assert torch.equal(numbers == HIDDEN, classes == 2)


def test_stable_target_counts_images_that_agree_in_all_columns():
    objective = Objective(DDPMScheduler(100, beta_schedule="squaredcos_cap_v2"), unconditional_class=(2.0, 3.0))
    labels = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [2.0, 3.0]])
    extra = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 2.0]])
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(objective._same_class(labels, extra), expected)


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_model_without_labels_is_tuned_to_them(column, settings, tmp_path):
    """It begins as the model that it was, whatever the label; a later run begins with its labels' scale."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(**smallest_unet_config(channels=1))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(30, beta_end=0.7)).save_pretrained(tmp_path / "base")
    for name in ("model_config_name_or_path", "ddpm_num_steps"):
        settings.pop(name)
    settings |= {"init_from": str(tmp_path / "base"), "max_train_steps": 1, "label_column": column}
    config = TrainingConfig(**settings)
    started = train(replace(config, learning_rate=1e-30, lr_scheduler="constant", lr_warmup_steps=0))
    assert started is not None
    assert started.labels is not None
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 29])
    with torch.no_grad():
        expected = unet.eval()(x_t, t).sample
        for row in started.labels.in_turn:
            label = torch.tensor([started.labels.number_of(row)] * 2)
            assert torch.allclose(started.unet(x_t, t, class_labels=label).sample, expected, rtol=0, atol=1e-6)

    base = whole_weights(config.output_dir)
    darker = [0.1 + 0.3 * i / 23 for i in range(24)]
    others = save_labeled(tmp_path / "darker", light=darker)
    changes = {"init_from": config.output_dir, "dataset_name": others, "output_dir": str(tmp_path / "more")}
    tuned = train(replace(config, **changes, learning_rate=1e-30, lr_scheduler="constant", lr_warmup_steps=0))
    assert tuned is not None
    assert tuned.labels is not None
    asked = 0.3 if column == "light" else {"kind": "odd", "light": 0.3}
    assert tuned.labels.number_of(asked) == started.labels.number_of(asked)
    assert "0.1 to 0.4" in str(tuned.labels)
    assert all(
        torch.allclose(base[name], tensor, atol=1e-6) for name, tensor in whole_weights(tmp_path / "more").items()
    )

    other = replace(config, **{**changes, "output_dir": str(tmp_path / "no"), "label_column": "kind,weight"})
    save_labeled(tmp_path / "weights", weight=darker)
    with pytest.raises(UsageError, match=r"must have the labels of .*light: .* got kind: 2 classes; weight: 0\.1 to"):
        train(replace(other, dataset_name=str(tmp_path / "weights")))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "kind,mass"}, r"label_column must be one of .*'light'.*, got 'mass': --label_column"),
        ({"label_column": "kind,kind"}, "label_column must name each column once, got 'kind,kind'"),
        ({"label_column": "same"}, "label_column must hold more than one number, got 0.5 for all 24 images in 'same'"),
        ({"label_column": "kind,same"}, "must hold more than one number, got 0.5 for all 24 images in 'same'"),
        ({"label_column": "hole"}, "an empty cell in row 3 of 'hole': give it one, or leave the row out"),
        ({"label_column": "kind,endless"}, "must hold finite numbers, got inf in row 2 of 'endless'"),
        (
            {"label_column": "light", "stable_target_images": 4},
            "stable_target_images must be 0 with a column of numbers, got 4 with 'light': hardly two images",
        ),
    ],
)
def test_labels_that_cannot_be_learned_are_refused_before_anything_is_written(changes, message, settings, tmp_path):
    hole = [None if i == 3 else i / 10 for i in range(24)]
    endless = [float("inf") if i == 2 else i / 10 for i in range(24)]
    settings["dataset_name"] = save_labeled(tmp_path / "bad", same=[0.5] * 24, hole=hole, endless=endless)
    with pytest.raises(UsageError, match=message):
        train(TrainingConfig(**{**settings, **changes}))
    assert not Path(settings["output_dir"]).exists()


def test_own_network_takes_one_column_of_classes_alone(tiny_settings):
    for name in ("train_data_dir", "model_config_name_or_path"):
        del tiny_settings[name]
    network = diffusers.UNet2DModel(**smallest_unet_config(channels=1))
    with pytest.raises(UsageError, match="must be one column of classes for a network that is passed, got light"):
        train(TrainingConfig(**tiny_settings, label_column="light"), dataset=labeled_images(), network=network)
    items = [{"image": image, "label": 0.5} for image in labeled_images(8)["image"]]
    with pytest.raises(UsageError, match=r"label must be the number of a class, got 0\.5"):
        train(TrainingConfig(**tiny_settings), dataset=items)
