"""A run that keeps its newest checkpoint on the Hub, and goes on from it on an empty machine."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.training.checks import check_config
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.forks import python
from tests.support.hub_buckets import BucketServer
from tests.support.hub_checkpoints import PLACE, is_private, stored_step
from tests.support.hub_runs import NAME, READER, TOKEN, UPLOAD_WARNING
from tests.support.hub_server import HubServer, client_environment
from tests.support.runs import differences

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.fixture
def settings(push_settings: dict[str, Any]) -> dict[str, Any]:
    return {**push_settings, "hub_strategy": "checkpoint", "ema_snapshots": 3}


def train_until(step: int, config: TrainingConfig) -> None:
    """Train; an error ends the run after a step, with a checkpoint, for which it waits."""

    def fail(event: Any, run: Any) -> None:
        if event.name == "log" and event.step == step:
            raise ValueError("the end")

    with pytest.raises(RunError, match="the end"):
        train(config, callbacks=[fail])


@pytest.mark.slow
def test_run_resumes_on_an_empty_machine_to_the_same_bits(
    hub: HubServer, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    without_hub = {name: value for name, value in settings.items() if "hub" not in name}
    train(TrainingConfig(**{**without_hub, "output_dir": str(tmp_path / "whole")}))
    config = TrainingConfig(**settings)
    train_until(5, config)
    assert f"checkpoint-5 is in {PLACE}" in capsys.readouterr().err
    assert is_private(hub)
    other = replace(config, output_dir=str(tmp_path / "other"), resume_from_checkpoint="hub")
    train(other)
    said = capsys.readouterr().err
    assert f"checkpoint-5 of {PLACE} is downloaded, " in said
    assert "the run resumes from checkpoint-5, after 20 images" in said
    assert not differences(tmp_path / "whole", Path(other.output_dir))
    assert stored_step(hub) == 6
    new = replace(config, output_dir=str(tmp_path / "new"))
    with pytest.raises(UsageError, match=f"{PLACE} holds checkpoint-6, and checkpoints after step 0 would replace it"):
        train(new)
    assert not Path(new.output_dir).exists()


@pytest.mark.slow
def test_another_run_is_replaced_neither_in_the_folder_nor_on_the_hub(
    hub: HubServer, settings: dict[str, Any], tmp_path: Path
):
    config = TrainingConfig(**settings)
    train_until(3, config)
    without_hub = {name: value for name, value in settings.items() if "hub" not in name}
    mine = {"seed": 7, "output_dir": str(tmp_path / "mine")}
    train_until(2, TrainingConfig(**{**without_hub, **mine}))
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="seed was 7 in this run, got 0"):
        train(replace(config, output_dir=mine["output_dir"], resume_from_checkpoint="hub"))
    with pytest.raises(UsageError, match=f"seed was 0 in this run, got 7: {PLACE} is of another run"):
        train(TrainingConfig(**{**settings, **mine, "resume_from_checkpoint": "latest"}))
    assert before == {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert stored_step(hub) == 3


@pytest.mark.slow
def test_public_place_is_refused_before_any_work(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    config = TrainingConfig(**settings)
    train_until(2, config)
    (hub.buckets[PLACE] if isinstance(hub, BucketServer) else hub.repo(PLACE)).private = False
    for name in ("hub", "latest"):
        other = replace(config, output_dir=str(tmp_path / name), resume_from_checkpoint=name)
        with pytest.raises(UsageError, match=f"{PLACE} must be private, as it holds a checkpoint, but it"):
            train(other)
        assert not Path(other.output_dir).exists()


@pytest.mark.slow
def test_run_that_is_asked_to_end_waits_for_its_last_checkpoint(
    server: HubServer, settings: dict[str, Any], tmp_path: Path
):
    settings |= {"max_train_steps": 10_000}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    launched = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}  # as by accelerate launch --cpu
    environment = client_environment(server, tmp_path / "hf", TOKEN) | launched
    errors = tmp_path / "errors.txt"
    hold = server.hold(f"{PLACE}/commit/")
    process = python([str(ROOT / "train_accelerate.py"), *flags], tmp_path, environment, tmp_path / "out.txt", errors)
    process.start()
    assert hold.entered.wait(60)
    os.kill(process.pid or 0, signal.SIGTERM)
    while "the run waits until" not in errors.read_text():
        process.join(0.1)
        assert process.exitcode is None, errors.read_text()
    hold.release()
    process.join()
    said = errors.read_text()
    assert process.exitcode == 75, said
    step = stored_step(server)
    assert f"checkpoint-{step} is in {PLACE}" in said
    assert f"resumes from step {step}" in said.splitlines()[-1]


@pytest.mark.slow
def test_checkpoint_that_does_not_arrive_is_said(
    server: HubServer, settings: dict[str, Any], short_pauses: None, capsys: pytest.CaptureFixture[str]
):
    server.fail(500, f"{PLACE}/commit/", times=None)
    config = TrainingConfig(**settings)
    train(config)
    said = capsys.readouterr().err
    assert f"the push of 'checkpoint-6' to {PLACE} failed: the Hub has an error of its own" in said
    assert f"checkpoint-6 is not in {PLACE}, which keeps the whole checkpoint that it had, if any" in said
    assert server.repo(NAME).files["config.yaml"]  # the model is there nonetheless
    assert not list(Path(config.output_dir).glob("partial-*"))


@pytest.mark.slow
def test_strategy_end_uploads_the_finished_model_alone(server: HubServer, settings: dict[str, Any]):
    train(TrainingConfig(**{**settings, "hub_strategy": "end"}))
    assert [commit.title for commit in server.repo(NAME).commits[1:]] == ["Step 6, 24 images"]
    with pytest.raises(KeyError):
        server.repo(PLACE)


def test_token_that_may_only_read_is_refused_before_anything_is_written(
    server: HubServer, settings: dict[str, Any], tmp_path: Path
):
    HfApi().create_repo(NAME, private=True)  # else the client is told so when it creates it
    config = TrainingConfig(**settings, hub_token=READER)
    with pytest.raises(UsageError, match="push_to_hub cannot work: the token may not write to alice/digits"):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
def test_checkpoint_of_other_images_is_refused(
    server: HubServer, settings: dict[str, Any], tmp_path: Path, image_folder: Path
):
    train_until(3, TrainingConfig(**settings))
    images = tmp_path / "other-images"
    images.mkdir()
    for path in sorted(image_folder.iterdir())[1:]:
        (images / path.name).symlink_to(path)
    other = {**settings, "train_data_dir": str(images), "output_dir": str(tmp_path / "other")}
    with pytest.raises(UsageError, match="checkpoint-3 was trained on other images"):
        train(TrainingConfig(**other, resume_from_checkpoint="hub"))
    assert stored_step(server) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push_to_hub": False, "hub_model_id": None, "hub_strategy": "every_save"}, "hub needs push_to_hub"),
        ({"dry_run": True}, "must not be hub with dry_run, which writes nothing"),
        ({"overwrite_output_dir": True}, "overwrite_output_dir would delete the checkpoint to resume from"),
    ],
)
def test_settings_that_cannot_go_with_hub_are_refused(
    server: HubServer, settings: dict[str, Any], changes: dict[str, Any], message: str
):
    with pytest.raises(UsageError, match=message):
        check_config(TrainingConfig(**{**settings, **changes}, resume_from_checkpoint="hub"))
    assert not server.requests


def test_strategy_needs_push_to_hub(tiny_settings: dict[str, Any]):
    with pytest.raises(UsageError, match="hub_strategy = checkpoint has no effect: give push_to_hub"):
        check_config(TrainingConfig(**tiny_settings, hub_strategy="checkpoint"))
