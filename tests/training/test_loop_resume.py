"""Resuming in the folder of a run, and overwriting it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import hf_ddpm.data.held_out
import hf_ddpm.network_config
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.parsing import load_config
from tests.support.image_data import save_grays
from tests.support.networks import smallest_unet_config
from tests.support.trained import assert_same_weights, losses, metrics, model_file, part

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_resumed_run_equals_the_undisturbed_run(tiny_settings, tmp_path):
    settings = {
        **tiny_settings,
        "random_flip": True,
        "gradient_accumulation_steps": 2,
        "model_config_name_or_path": model_file(tmp_path, dropout=0.2),
    }
    whole = TrainingConfig(**settings, checkpoints_total_limit=None)
    train(whole)
    parted = part(whole)
    train(replace(parted, resume_from_checkpoint="latest"))
    assert losses(parted.output_dir) == losses(whole.output_dir)
    assert_same_weights(whole.output_dir, parted.output_dir)
    assert json.loads(Path(parted.output_dir, "run.json").read_text())["training"]["num_resumes"] == 1


@pytest.mark.slow
def test_resume_keeps_the_network_of_the_checkpoint(tiny_settings, monkeypatch):
    """Also where a later version sizes another for the data, whose weights have the same shapes."""
    settings = {**tiny_settings, "model_config_name_or_path": None, "dropout": 0.2}
    settings |= {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    with monkeypatch.context() as before:
        before.setattr(hf_ddpm.network_config, "MIN_GROUP_CHANNELS", 2)
        whole = TrainingConfig(**settings)
        train(whole)
    parted = part(whole)
    train(replace(parted, resume_from_checkpoint="latest"))
    network = [json.loads(Path(run.output_dir, "unet/config.json").read_text()) for run in (whole, parted)]
    assert network[0] == network[1]
    assert network[0]["norm_num_groups"] == network[0]["block_out_channels"][0] // 2
    assert losses(parted.output_dir) == losses(whole.output_dir)
    assert_same_weights(whole.output_dir, parted.output_dir)


@pytest.mark.slow
def test_run_of_before_that_holds_out_more_than_half_goes_on(tiny_settings, tmp_path, monkeypatch):
    for name, size in (("a", 5), ("b", 6)):
        save_grays(tmp_path / "data" / name, size)
    settings = {**tiny_settings, "dataset_name": None, "train_data_dir": str(tmp_path / "data"), "resolution": 8}
    settings |= {"eval_fraction": 0.4, "group_column": "folder", "max_train_steps": 2, "checkpointing_steps": 1}
    whole = TrainingConfig(**settings, checkpoints_total_limit=None)
    with pytest.raises(UsageError, match="of which 55% would be held out"):
        train(whole)
    assert not Path(whole.output_dir).exists()
    with monkeypatch.context() as before:
        before.setattr(hf_ddpm.data.held_out, "MAX_UNASKED_SHARE", 1.0)
        train(whole)
    parted = part(whole)
    train(replace(parted, resume_from_checkpoint="latest"))
    assert_same_weights(whole.output_dir, parted.output_dir)


@pytest.mark.slow
def test_resume_refuses_a_changed_model_config(tiny_settings, tmp_path):
    """Though the weights have the same shapes."""
    model = tmp_path / "unet.json"
    model.write_text(json.dumps(smallest_unet_config(channels=1, norm_num_groups=4)))
    config = TrainingConfig(**{**tiny_settings, "model_config_name_or_path": str(model)})
    train(config)
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    model.write_text(json.dumps(smallest_unet_config(channels=1, norm_num_groups=2)))
    with pytest.raises(UsageError, match=r"norm_num_groups was 4, got 2: give the model config .*config.json"):
        train(replace(config, resume_from_checkpoint="latest", max_train_steps=9))
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_resume_accepts_a_dropout_changed_in_the_config(tiny_settings):
    config = TrainingConfig(**{**tiny_settings, "model_config_name_or_path": None, "max_train_steps": 1})
    train(config)
    path = Path(config.output_dir, "config.yaml")
    path.write_text(path.read_text().replace("dropout: 0.0", "dropout: 0.2"))
    train(replace(load_config(str(path)), max_train_steps=2, resume_from_checkpoint="latest"))
    assert json.loads(Path(config.output_dir, "unet/config.json").read_text())["dropout"] == 0.2


@pytest.mark.slow
def test_resume_ignores_a_cut_line_and_foreign_names(tiny_settings):
    config = TrainingConfig(**tiny_settings)
    train(config)
    file = Path(config.output_dir, "metrics.jsonl")
    file.write_text(file.read_text()[:-15])
    Path(config.output_dir, "checkpoint-best").mkdir()
    train(replace(config, resume_from_checkpoint="latest", max_train_steps=8))
    assert [line["step"] for line in metrics(config.output_dir)] == [1, 2, 3, 4, 5, 7, 8]


@pytest.mark.slow
def test_resume_from_an_older_checkpoint_needs_the_newer_gone(tiny_settings):
    config = TrainingConfig(**tiny_settings)
    train(config)
    with pytest.raises(UsageError, match=r"would leave checkpoint-6.*move the newer checkpoints away"):
        train(replace(config, resume_from_checkpoint="checkpoint-3"))


@pytest.mark.slow
def test_train_prunes_old_checkpoints(tiny_settings):
    config = TrainingConfig(**{**tiny_settings, "checkpointing_steps": 1, "checkpoints_total_limit": 2})
    train(config)
    assert sorted(p.name for p in Path(config.output_dir).glob("*checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.slow
def test_resume_refuses_settings_of_another_run(tiny_settings, tmp_path, image_folder):
    config = TrainingConfig(**tiny_settings)
    train(config)
    again = replace(config, resume_from_checkpoint="latest", max_train_steps=9)
    with pytest.raises(
        UsageError, match=r"has seen 24 images, more than the 20 .* give max_train_steps of at least 6"
    ):
        train(replace(again, max_train_steps=5))
    for name, value in (("prediction_type", "sample"), ("seed", 1), ("learning_rate", 0.5)):
        with pytest.raises(UsageError, match=rf"{name} was .*, got {value}: resume with --config .*config.yaml"):
            train(replace(again, **{name: value}))
    other = tmp_path / "other"
    other.mkdir()
    Image.new("L", (8, 8)).save(other / "black.png")
    with pytest.raises(UsageError, match="was trained on other images"):
        train(replace(again, train_data_dir=str(other)))
    before = losses(config.output_dir)
    train(again)
    assert losses(config.output_dir)[:6] == before
    assert len(losses(config.output_dir)) == 9


@pytest.mark.slow
def test_overwrite_output_dir_deletes_the_run_and_nothing_else(tiny_settings):
    config = TrainingConfig(**tiny_settings)
    train(config)
    folder = Path(config.output_dir)
    (folder / "notes.txt").write_text("mine")
    train(replace(config, overwrite_output_dir=True, max_train_steps=2))
    assert (folder / "notes.txt").exists()
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(metrics(folder)) == 2
