"""A data set, a network, a loss and callbacks of the user's own code in the place of what the settings describe."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline as StockPipeline
from diffusers import DiTTransformer2DModel, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline, Objective, evaluate
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.signals import StoppedOnPurpose
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.model import make_scheduler
from hf_ddpm.training.parts import Parts
from hf_ddpm.training.previews import default_preview_steps, next_preview
from hf_ddpm.training.setup import build_run, make_accelerator
from tests.support.networks import smallest_unet_config
from tests.support.runs import differences


class Images:
    """The images of a folder as PIL images, as x_0, or as dicts with a label."""

    def __init__(self, folder: str, kind: str = "pil") -> None:
        self.paths, self.kind = sorted(Path(folder).iterdir()), kind
        self.classes = ["dark", "bright"]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        image = Image.open(self.paths[i])
        if self.kind == "pil":
            return image
        x_0 = torch.from_numpy(np.array(image)).to(torch.float32)[None] * (2 / 255) - 1
        return x_0 if self.kind == "x_0" else {"image": x_0, "label": i % 2}


def weights_of(config: TrainingConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir, "unet/diffusion_pytorch_model.safetensors"))


def require_equal_weights(config: TrainingConfig, other: TrainingConfig) -> None:
    weights, others = weights_of(config), weights_of(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture
def config(tiny_settings, tmp_path) -> TrainingConfig:
    """The run on a folder, with random flips and a stable target."""
    return TrainingConfig(**tiny_settings, random_flip=True, stable_target_images=5)


@pytest.fixture
def without_folder(config, tmp_path) -> TrainingConfig:
    """The same run for a data set that is passed."""
    return replace(config, train_data_dir=None, output_dir=str(tmp_path / "passed"))


@pytest.mark.slow
def test_data_set_that_is_passed_trains_the_model_of_the_same_images_in_a_folder(config, without_folder, tmp_path):
    train(config)
    folder = config.train_data_dir
    of_datasets = datasets.Dataset.from_dict({"image": [str(path) for path in sorted(Path(folder).iterdir())]})
    for name, dataset in (
        ("pil", Images(folder)),
        ("x_0", Images(folder, "x_0")),
        ("datasets", of_datasets.cast_column("image", datasets.Image())),
        ("transform", of_datasets.cast_column("image", datasets.Image()).with_transform(lambda rows: rows)),
    ):
        passed = replace(without_folder, output_dir=str(tmp_path / name))
        train(passed, dataset=dataset)
        require_equal_weights(config, passed)
        saved = Path(passed.output_dir, "config.yaml").read_text()
        assert "digits" not in saved
    with pytest.raises(ValueError, match="the data must be known for this"):
        evaluate(passed.output_dir, metrics=["nll"], num_images=4)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_run_on_a_data_set_that_is_passed_resumes_exactly(without_folder, tmp_path, num_workers):
    config = replace(without_folder, max_train_steps=3, dataloader_num_workers=num_workers, stable_target_images=0)
    dataset = passed_images(tmp_path)
    train(config, dataset=dataset)
    hasty = replace(config, output_dir=str(tmp_path / "parted"), max_train_hours=1e-9, resume_from_checkpoint="latest")
    for _ in range(2):
        with pytest.raises(StoppedOnPurpose):
            train(hasty, dataset=dataset)
    train(hasty, dataset=dataset)
    assert not differences(Path(hasty.output_dir), Path(config.output_dir))
    longer = passed_images(tmp_path)
    longer.paths = longer.paths[:-1]
    with pytest.raises(UsageError, match="was trained on other images"):
        train(replace(hasty, max_train_steps=5), dataset=longer)
    renamed: Any = passed_images(tmp_path)
    renamed.fingerprint = "of another day"
    with pytest.raises(UsageError, match="was trained on other images"):
        train(replace(hasty, max_train_steps=5), dataset=renamed)


def passed_images(tmp_path: Path, kind: str = "pil") -> Images:
    """Save six images, and return them as a data set."""
    folder = tmp_path / "six"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    return Images(str(folder), kind)


@pytest.mark.slow
def test_network_of_diffusers_that_is_no_unet_is_trained_saved_and_sampled(without_folder, tmp_path, caplog):
    config = replace(without_folder, model_config_name_or_path=None, stable_target_images=0, max_train_steps=4)
    config = replace(config, optimizer="adamw", learning_rate=1e-3)
    torch.manual_seed(0)
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 1}
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, num_embeds_ada_norm=2, norm_num_groups=1, **shape
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    dataset = passed_images(tmp_path, "with labels")
    with pytest.raises(UsageError, match=r"optimizer must be adamw for a network without down_blocks.* got muon"):
        train(replace(config, optimizer="muon"), dataset=dataset, network=network)
    with caplog.at_level(logging.WARNING):
        train(config, dataset=dataset, network=network)
    assert "stock diffusers has no pipeline that samples a DiTTransformer2DModel" in caplog.text
    after = weights_of(config)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    pipeline = DDPMPipeline.from_pretrained(config.output_dir).use("unipc", 2)
    assert type(pipeline.unet) is DiTTransformer2DModel
    assert pipeline(2, output_type="np", class_labels=[0, 1]).images.shape == (2, 8, 8, 1)
    resumed = replace(config, resume_from_checkpoint="latest", max_train_steps=6)
    train(resumed, dataset=dataset, network=DiTTransformer2DModel.from_config(network.config))
    assert json.loads(Path(config.output_dir, "run.json").read_text())["training"]["steps"] == 6
    card = Path(config.output_dir, "README.md").read_text()
    assert "from diffusers import" not in card
    assert "The network is a `DiTTransformer2DModel`, which" in card
    with pytest.raises(Exception):  # noqa: B017, PT011
        StockPipeline.from_pretrained(config.output_dir)(2, num_inference_steps=2)


@pytest.mark.slow
def test_objective_that_is_passed_is_what_is_trained(config, tmp_path):
    train(config)
    own = Objective(make_scheduler(config), config.loss_weighting, config.min_snr_gamma, config.timestep_density)
    same = replace(config, output_dir=str(tmp_path / "same"))
    train(same, objective=own)
    require_equal_weights(config, same)
    other = replace(
        config,
        output_dir=str(tmp_path / "other"),
        max_train_steps=1,
        optimizer="adamw",
        use_ema=False,
        ema_snapshots=0,
    )

    def nothing(network: Any, x_0: torch.Tensor, class_labels: Any = None, **draws: Any) -> torch.Tensor:
        return 0 * network(x_0, draws["timesteps"]).sample.flatten(1).mean(1)

    network = UNet2DModel.from_config(smallest_unet_config(channels=1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    quiet = replace(other, model_config_name_or_path=None, adam_weight_decay=0.0)
    train(quiet, network=network, objective=nothing)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(quiet).items())


@pytest.mark.slow
def test_callbacks_hear_of_what_was_done(config):
    events = []

    def note(event: Any, run: Any) -> None:
        events.append((event.name, event.step))
        if event.name in ("preview", "checkpoint", "end"):
            assert event.values["path"].exists()
        else:
            last = Path(run.config.output_dir, "metrics.jsonl").read_text().splitlines()[-1]
            assert json.loads(last) == event.values

    train(replace(config, save_images_epochs=1, logging_steps=2), callbacks=[note])
    logged = [("log", 2), ("log", 3), ("checkpoint", 3), ("log", 4), ("log", 6), ("checkpoint", 6)]
    logged += [("preview", 6), ("end", 6)]
    assert events == logged
    assert Path(config.output_dir, "previews/step-0000006.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_callback_that_fails_ends_the_run_with_a_checkpoint(config, tmp_path, error):
    train(replace(config, output_dir=str(tmp_path / "whole")))

    def fail(event: Any, run: Any) -> None:
        if event.step == 2:
            raise error("of mine")

    message = rf"a callback failed: fail failed at log of step 2: {error.__name__}: '?of mine.*resumes from step 2"
    with pytest.raises(RunError, match=message):
        train(config, callbacks=[fail])
    train(replace(config, resume_from_checkpoint="latest"))
    assert not differences(Path(config.output_dir), tmp_path / "whole")


def test_callbacks_hear_of_the_checkpoint_of_a_run_that_is_stopped(config):
    heard = []

    def stop(event: Any, run: Any) -> None:
        heard.append((event.name, event.step, event.values.get("path")))
        if event.name == "log" and event.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StoppedOnPurpose):
        train(replace(config, logging_steps=1, checkpointing_steps=100), callbacks=[stop])
    path = Path(config.output_dir) / "checkpoint-2"
    assert heard[-1] == ("checkpoint", 2, path)
    assert path.is_dir()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "dataset must not be empty"),
        (iter([1]), "dataset must have a length and an item for each index, got list_iterator"),
        (["a.png"], r"item 0 of the data set must be a PIL image or float32 values .* got str"),
        ([{"pixels": 1}], r"item 0 of the data set cannot be read: KeyError: 'image'"),
        ([np.zeros((1, 8, 8))], r"item 0 of the data set must be float32 \(C, H, W\), got float64"),
        ([np.zeros((8, 6), np.float32)], r"must be float32 \(C, H, W\), got float32 \(8, 6\)"),
        ([np.full((1, 8, 8), 2, np.float32)], r"must have values in \[-1, 1\], got 2 to 2"),
        ([{"image": np.zeros((1, 8, 8), np.float32), "label": 0}], "dataset has labels, and must name its classes"),
        ([np.zeros((1, 8, 8), np.float32)] * 5 + [np.ones((1, 4, 4), np.float32)] * 5, r"must be float32 \(1, 8, 8\)"),
    ],
)
def test_data_set_that_cannot_be_trained_on_is_refused(without_folder, items, message):
    with pytest.raises((UsageError, RunError), match=message):
        train(replace(without_folder, stable_target_images=0), dataset=items)


def test_parts_that_cannot_work_are_refused(config, without_folder, tmp_path):
    images = passed_images(tmp_path)
    network = UNet2DModel(**smallest_unet_config(channels=3))
    plain = replace(without_folder, model_config_name_or_path=None, stable_target_images=0)
    for arguments, settings, message in (
        ({"dataset": images}, config, r"train_data_dir must be left out with dataset="),
        ({"network": network}, config, r"model_config_name_or_path must be left out with network="),
        ({"network": torch.nn.Identity()}, plain, "network must be a ModelMixin of diffusers, .* got Identity"),
        ({"dataset": images, "network": network}, plain, r"in_channels .* must be those of the images, 1, got 3"),
        ({"dataset": images, "callbacks": [3]}, plain, "objective and callbacks must be functions, got int"),
        ({"dataset": images, "callbacks": print}, plain, "callbacks must be a list of functions, got one"),
        (
            {"objective": print},
            replace(config, loss_weighting="min_snr"),
            "loss_weighting must be left out with objective=",
        ),
        ({"dataset": images}, replace(plain, label_column="label"), "label_column and image_column are for data sets"),
    ):
        with pytest.raises(UsageError, match=message):
            train(settings, **arguments)
    assert not Path(plain.output_dir).exists()


def test_default_previews_come_early_and_never_cost_more_than_the_steps_between_them():
    assert default_preview_steps(1000, 8) == [20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert default_preview_steps(60, 8) == [12, 24, 36, 48]
    assert default_preview_steps(9, 8) == []
    assert default_preview_steps(1000, 375) == [400]


def test_next_preview_comes_by_steps_or_by_epochs(tiny_settings):
    def next_ones(**settings):
        config = TrainingConfig(**tiny_settings, **settings)
        run, _ = build_run(config, make_accelerator(config), Processes(), Parts())
        return [next_preview(run, done, 100) for done in (0, 10, 95)]

    assert next_ones() == [10, 20, 100]
    assert next_ones(save_images_epochs=2) == [12, 12, 96]  # of 24 images, in batches of 4
    assert next_ones(save_images_epochs=20) == [100, 100, 100]


@pytest.mark.parametrize(("dtype", "max_value"), [(np.uint8, 255), (np.uint16, 65535)])
def test_objective_of_a_run_has_the_bins_of_its_images(tiny_settings, tmp_path, dtype, max_value):
    for i in range(4):
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), i, dtype)).save(tmp_path / f"deep/{i}.png")
    config = TrainingConfig(**{**tiny_settings, "train_data_dir": str(tmp_path / "deep")})
    run, _ = build_run(config, make_accelerator(config), Processes(), Parts())
    assert run.objective.max_value == max_value
