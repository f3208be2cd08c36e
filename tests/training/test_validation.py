"""Measuring while a model trains: the same numbers on any number of processes, and the same training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline
from hf_ddpm.data.images import load_images
from hf_ddpm.data.splits import open_split
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.validation import open_validation
from tests.support.runs import differences, said, start, trace


@pytest.fixture(scope="module")
def data(tmp_path_factory, image_folder) -> Path:
    """16 images to train on, 8 held out."""
    folder = tmp_path_factory.mktemp("data")
    for i, path in enumerate(sorted(image_folder.glob("*.png"))):
        target = folder / ("train" if i < 16 else "test") / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def config(tiny_settings, data):
    settings = {**tiny_settings, "train_data_dir": None, "dataset_name": str(data), "eval_num_images": 7}
    return TrainingConfig(**{**settings, "eval_steps": 2, "checkpointing_steps": 4})


def measured(folder):
    return [json.loads(line) for line in (Path(folder) / "eval.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_validation_changes_no_bit_of_training(config, tmp_path):
    train(config)
    without = replace(config, output_dir=str(tmp_path / "without"), eval_steps=None, eval_num_images=2000)
    train(without)
    own = ("eval.jsonl", "best/", "figures/kid.png", "figures/val_loss.png", "figures/training_")
    found = differences(Path(config.output_dir), Path(without.output_dir))
    assert [name for name in found if not name.startswith(own)] == []

    records = measured(config.output_dir)
    assert [r["step"] for r in records] == [2, 4, 6]
    assert all(len(r["levels"]) == 10 and r["kid_standard_error"] > 0 for r in records)
    best = json.loads((Path(config.output_dir) / "best/best.json").read_text())
    assert best == min(records, key=lambda r: r["kid"])
    DDPMPipeline.from_pretrained(Path(config.output_dir) / "best")
    for name in ("kid.png", "val_loss.png"):
        with Image.open(Path(config.output_dir) / "figures" / name) as picture:
            picture.load()


@pytest.mark.slow
def test_best_json_describes_the_model_beside_it(config):
    best = Path(config.output_dir, "best")
    best.mkdir(parents=True)
    (best / "unet").write_text("")  # so that no model can be written
    (best / "best.json").write_text("{}")  # of the model before
    train(config)
    assert not (best / "best.json").exists()


@pytest.mark.slow
def test_validation_is_equal_over_processes_and_after_a_kill(config, tmp_path):
    train(config)
    two = replace(config, output_dir=str(tmp_path / "two"), train_batch_size=2)
    assert -9 in start(two, 2, "step", 5)
    assert start(replace(two, resume_from_checkpoint="latest"), 2) == [0, 0], said(two)
    assert [m["images"] for m in trace(two.output_dir)] == [m["images"] for m in trace(config.output_dir)]
    for a, b in zip(measured(two.output_dir), measured(config.output_dir), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
        assert a["kid"] == pytest.approx(b["kid"], rel=1e-2, abs=1e-4)
        for name in ("training_distance", "held_out_distance", "real_distance"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


@pytest.mark.slow
def test_memorization_is_said_once_and_drawn(config, tmp_path, capsys):
    # Near gray, as what a network that has learned nothing makes of noise is, and black and white pixels.
    rng = np.random.default_rng(0)
    for split, count, low, high in (("train", 16, 100, 156), ("test", 8, 0, 256)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(low, high, (8, 8)) if split == "train" else 255 * rng.integers(0, 2, (8, 8))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / split / f"{i}.png")
    config = replace(config, dataset_name=str(tmp_path / "data"), eval_num_images=32)
    train(config)
    records = measured(config.output_dir)
    assert len(records) == 3
    for record in records:
        assert record["training_share"] > record["training_share_by_chance"] == 16 / 24
        assert record["training_share_p_value"] <= 0.001
        assert record["training_distance"] < record["held_out_distance"]
        assert 0 < record["training_distance"] < record["real_distance"] < 1
    said = capsys.readouterr().err
    assert said.count("memorization is measured at step") == 1
    assert "memorization is measured at step 2: " in said
    for name in ("training_distance", "training_share"):
        assert f"figures/{name}.png" in Path(config.output_dir, "README.md").read_text()
        with Image.open(Path(config.output_dir) / "figures" / f"{name}.png") as picture:
            picture.load()


@pytest.mark.slow
def test_resume_refuses_another_validation_network_or_split(config):
    train(replace(config, max_train_steps=4))
    more = replace(config, resume_from_checkpoint="latest")
    for change in ({"eval_network": "dinov2"}, {"eval_split": "train"}, {"eval_num_images": 5}):
        with pytest.raises(UsageError, match=f"{next(iter(change))} was .* in this run, got"):
            train(replace(more, **change))
    # A start that measures nothing writes the defaults into config.yaml.
    train(replace(more, max_train_steps=5, eval_steps=None, eval_num_images=2000))
    with pytest.raises(UsageError, match="eval_num_images was 7 in this run, got 2000"):
        train(replace(more, eval_num_images=2000))
    train(more)
    assert [r["step"] for r in measured(config.output_dir)] == [2, 4, 6]


@pytest.mark.slow
def test_validation_refuses_before_training(config):
    with pytest.raises(UsageError, match="eval_num_images must be at least 4, got 3"):
        train(replace(config, eval_num_images=3))
    with pytest.raises(UsageError, match=r"^eval_split must be in dataset_name as a folder, got 'held'"):
        train(replace(config, eval_split="held"))
    with pytest.raises(UsageError, match="eval_split = held has no effect: give eval_steps"):
        train(replace(config, eval_split="held", eval_steps=None, eval_num_images=2000))
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
def test_held_out_images_of_several_shapes_are_told_from_those_of_another_form(config, tmp_path):
    for split, shapes in (("train", [(8, 8)]), ("test", [(8, 8), (8, 12)]), ("deep", [(8, 8)])):
        (tmp_path / "mixed" / split).mkdir(parents=True)
        for shape in shapes:
            values = np.zeros(shape, np.uint16 if split == "deep" else np.uint8)
            Image.fromarray(values).save(tmp_path / "mixed" / split / f"{shape[1]}.png")
    mixed = replace(config, dataset_name=str(tmp_path / "mixed"), resolution=8, channels=1)
    messages = {
        "test": r"one shape, .* got 8 x 8 and 8 x 12 \(height x width\) of 'test' after .* --center_crop",
        "deep": r"like those of training, got channels 1, 8 x 8, 16 bits of 'deep' beside channels 1, 8 x 8, 8 bits",
    }
    for split, message in messages.items():
        split_config = replace(mixed, eval_split=split)
        with pytest.raises(UsageError, match=message):
            open_validation(split_config, load_images(mixed), None, None, Processes(), torch.device("cpu"))


@pytest.mark.slow
def test_images_that_a_run_holds_out_are_validated_on_and_never_trained_on(config, image_folder):
    """The card says how many they are; the run resumes with them alone."""
    config = replace(config, dataset_name=str(image_folder), eval_fraction=0.25)
    train(replace(config, max_train_steps=4))
    with pytest.raises(UsageError, match="eval_fraction"):
        train(replace(config, resume_from_checkpoint="latest", eval_fraction=0.5))
    train(replace(config, resume_from_checkpoint="latest"))
    facts = json.loads((Path(config.output_dir) / "run.json").read_text())
    with open_split(config, "test") as held_out:
        assert facts["data"]["num_images"] == len(load_images(config)) == 18
        assert facts["data"]["fingerprint"] == load_images(config).fingerprint
        assert facts["data"]["held_out"]["num_images"] == len(held_out) == 6
    assert "| Images held out of them | 6; the split `test` |" in (Path(config.output_dir) / "README.md").read_text()
    assert [record["step"] for record in measured(config.output_dir)] == [2, 4, 6]
