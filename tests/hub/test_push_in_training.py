"""Pushing while a model trains and at its end; no failure of it harms the training."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline
from hf_ddpm.cli import app
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.forks import python
from tests.support.hub_runs import ARRIVES, COMMIT, NAME, TOKEN, UPLOAD_WARNING, WEIGHTS, contents, nowhere
from tests.support.hub_server import HubServer, client_environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.mark.slow
def test_training_pushes_and_writes_no_token(server: HubServer, push_settings: dict[str, Any], tmp_path: Path):
    push_settings |= {
        "hub_token": TOKEN,
        "logger": "tensorboard",
        "ema_halflife_images": "10 100",
        "hub_averages": True,
        "save_figures": True,
    }
    flags = [part for name, value in push_settings.items() for part in (f"--{name}", *str(value).split(" "))]
    launched = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}  # as by accelerate launch --cpu
    environment = client_environment(server, tmp_path / "hf") | launched
    printed, complained = tmp_path / "printed.txt", tmp_path / "complained.txt"
    words = [str(ROOT / "train_accelerate.py"), *flags]
    process = python(words, tmp_path, environment, printed, complained)
    process.start()
    process.join()
    assert process.exitcode == 0, complained.read_text()
    repo = server.repo(NAME)
    titles = [commit.title for commit in repo.commits[1:]]
    assert titles[-2:] == ["Step 6, 24 images", "Step 6, 24 images, the average halflife-100"]
    assert set(titles[:-2]) <= {"Step 3, 12 images"}
    assert repo.private
    assert repo.files.keys() >= ARRIVES
    assert repo.branches.keys() == {"main", "halflife-100"}
    assert f"{server.url}/{NAME}: {repo.branches['main'][:12]}" in complained.read_text()
    run = Path(push_settings["output_dir"])
    assert repo.files[WEIGHTS] == (run / WEIGHTS).read_bytes()
    written = contents(tmp_path)
    assert any("events.out" in name for name in written)
    assert {"printed.txt", "complained.txt"} < written.keys()
    assert [name for name, content in written.items() if TOKEN.encode() in content] == []
    for content in repo.files.values():
        assert str(tmp_path).encode() not in content
    assert not list(run.glob("partial-*"))


@pytest.mark.slow
def test_training_survives_a_hub_that_fails(
    server: HubServer, push_settings: dict[str, Any], short_pauses: None, capsys: pytest.CaptureFixture[str]
):
    server.fail(500, "/commit/", times=None)
    config = TrainingConfig(**push_settings, hub_revision="dev", hub_averages=True, ema_halflife_images=[10, 100])
    train(config)
    run = Path(config.output_dir)
    said = capsys.readouterr().err
    command = f"hf-ddpm push {run} {NAME} --revision dev --averages"
    assert f"the model is whole in '{run}', but was not pushed: the Hub has an error of its own" in said
    assert f"Push it later with: {command}" in said
    assert len(server.requests_to("POST", "/commit/dev$")) >= 3
    DDPMPipeline.from_pretrained(run)
    server.mend()
    done = CliRunner().invoke(app, command.split()[1:])
    assert done.exit_code == 0, done.output
    assert server.repo(NAME).commit("dev").files[WEIGHTS] == (run / WEIGHTS).read_bytes()
    assert server.repo(NAME).branches.keys() == {"main", "dev", "halflife-100"}


@pytest.mark.slow
def test_push_under_way_at_the_end_of_training_arrives_first(
    server: HubServer, push_settings: dict[str, Any], short_pauses: None
):
    hold = server.hold(COMMIT)
    thread = threading.Thread(target=lambda: (hold.entered.wait(60), hold.release()))
    thread.start()
    train(TrainingConfig(**push_settings))
    thread.join()
    titles = [commit.title for commit in server.repo(NAME).commits[1:]]
    assert titles in (["Step 3, 12 images", "Step 6, 24 images"], ["Step 6, 24 images"])


@pytest.mark.parametrize("before", [False, True], ids=["new", "overwritten"])
def test_training_refuses_a_wrong_token_before_writing_anything(
    server: HubServer, push_settings: dict[str, Any], run: Path, before: bool
):
    config = TrainingConfig(**push_settings, hub_token="hf_wrongsecret", overwrite_output_dir=before)
    if before:
        shutil.move(run, config.output_dir)
        there = contents(Path(config.output_dir))
    with pytest.raises(UsageError, match="push_to_hub cannot work: the Hub does not accept the token") as error:
        train(config)
    assert "secret" not in str(error.value)
    assert contents(Path(config.output_dir)) == there if before else not Path(config.output_dir).exists()


@pytest.mark.slow
def test_training_begins_without_a_network(
    server: HubServer, push_settings: dict[str, Any], short_pauses: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(constants, "ENDPOINT", nowhere())
    config = TrainingConfig(**push_settings)
    train(config)
    said = capsys.readouterr().err
    assert f"nothing can be pushed to {NAME} yet, training begins nonetheless: http://127.0.0.1" in said
    assert f"Push it later with: hf-ddpm push {config.output_dir} {NAME}" in said
    assert (Path(config.output_dir) / WEIGHTS).is_file()
