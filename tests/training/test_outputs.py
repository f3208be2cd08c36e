"""What stands in the way of what a run writes: a full disk, a tracker, an earlier process, a person."""

import errno
import json
import math
import os
import resource
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import tracking
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import LoggerType
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.files import append_lines, weights_sha256
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.networks import tiny_unet_config
from tests.support.runs import differences


@pytest.fixture
def config(tiny_settings):
    return TrainingConfig(**tiny_settings, ema_halflife_images=[50, 100])


def logged_steps(config):
    return [json.loads(line)["step"] for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_model_that_is_not_finite_is_not_saved(tiny_settings):
    """Whatever made it so, after a step whose gradients were finite."""
    config = TrainingConfig(**{**tiny_settings, "use_ema": False, "ema_snapshots": 0})

    def spoil(optimizer, *_):
        with torch.no_grad():
            optimizer.param_groups[-1]["params"][0].fill_(math.nan)

    handle = register_optimizer_step_post_hook(spoil)
    try:
        with pytest.raises(UsageError, match=r"^the model must have finite weights, got NaN or infinity in 1 of"):
            train(config)
    finally:
        handle.remove()
    assert not (Path(config.output_dir) / "model_index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "ema/halflife-100"])
def test_run_without_its_model_is_not_finished(config, tmp_path, name):
    """A file stands where a folder is to be: permissions and disks stop no test that runs as root."""
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    folder = Path(config.output_dir)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("")
    with pytest.raises(RunError, match=r"the model could not be written.*--resume_from_checkpoint latest finishes"):
        train(config)
    assert not (folder / "run.json").exists()
    (folder / name).unlink()
    train(replace(config, resume_from_checkpoint="latest"))
    assert not differences(folder, Path(whole.output_dir))


@pytest.mark.slow
def test_failing_tracker_does_not_end_the_run(config, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("its server is gone")

    for name in ("log", "log_images", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, fail)
    train(replace(config, logger="tensorboard"))
    assert "a tracker failed, the run continues: RuntimeError: its server is gone" in capsys.readouterr().err
    assert Path(config.output_dir, "run.json").exists()


@pytest.mark.slow
def test_several_trackers_get_a_run_by_its_name_in_one_project(config, tmp_path, monkeypatch):
    """A package of this name writes down how it is called, as the real one asks a server."""
    package, calls = tmp_path / "packages/trackio", tmp_path / "calls.jsonl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import json\n"
        "from types import SimpleNamespace\n"
        "config = SimpleNamespace(update=lambda *_, **__: None)\n"
        "class Run:\n"
        "    def __getattr__(self, name): return lambda *_, **__: None\n"
        "def init(**settings):\n"
        f"    with open({str(calls)!r}, 'a') as file:\n"
        "        file.write(json.dumps(settings) + '\\n')\n"
        "    return Run()\n"
        "def finish(): pass\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(tracking, "_available_trackers", [*LoggerType])  # those found when it was imported
    train(replace(config, logger="tensorboard,trackio", tracker_project="photos", max_train_steps=2))
    (call,) = map(json.loads, calls.read_text().splitlines())
    known = json.loads(Path(config.output_dir, "tracker.json").read_text())["id"]
    assert (call["project"], call["name"]) == ("photos", f"{Path(config.output_dir).name}-{known}")
    assert list(Path(config.output_dir).rglob("events.out.tfevents.*"))


def test_append_lines_appends_all_or_nothing(tmp_path):
    path = tmp_path / "lines"
    path.write_text("before\n")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len("before\n") + 10, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_lines(path, ["a line that is too long", "and another"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert path.read_text() == "before\n"
    append_lines(path, ["after"])
    assert path.read_text() == "before\nafter\n"


@pytest.mark.slow
@pytest.mark.parametrize(("blocked", "mended", "killed"), [(2, 4, 5), (2, 5, 5), (6, None, None)])
def test_metrics_lines_arrive_once_though_the_file_was_blocked(config, blocked, mended, killed):
    """No checkpoint is written while lines wait for the file, so a resumed run writes those that a kill lost."""
    config = replace(config, optimizer="adamw")
    file = Path(config.output_dir, "metrics.jsonl")
    aside, steps = file.with_name("aside"), count(1)

    def happen(*_):
        step = next(steps)
        if step == blocked:
            file.rename(aside)
            file.mkdir()
        if step == mended:
            file.rmdir()
            aside.rename(file)
        if step == killed:
            raise KeyboardInterrupt

    hook = register_optimizer_step_post_hook(happen)
    try:
        with pytest.raises((KeyboardInterrupt, RunError)):
            train(config)
    finally:
        hook.remove()
    if mended is None:
        file.rmdir()
        aside.rename(file)
    train(replace(config, resume_from_checkpoint="latest"))
    assert logged_steps(config) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_run_without_its_last_metrics_lines_is_not_finished(config, monkeypatch):
    fsync, file = os.fsync, Path(config.output_dir, "metrics.jsonl")

    def full(descriptor):
        is_it = file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file))
        if is_it and len(logged_steps(config)) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"the last checkpoint could not be written: .*finishes the run"):
            train(config)
    assert not Path(config.output_dir, "run.json").exists()
    train(replace(config, resume_from_checkpoint="latest"))
    assert logged_steps(config) == [1, 2, 3, 4, 5, 6]


def test_resuming_does_not_replace_a_model_of_no_run(config):
    folder = Path(config.output_dir)
    diffusers.DDPMPipeline(
        diffusers.UNet2DModel(**tiny_unet_config(channels=1)), diffusers.DDPMScheduler()
    ).save_pretrained(folder)
    before = weights_sha256(folder)
    with pytest.raises(UsageError, match="holds a model without a run that could be resumed"):
        train(replace(config, resume_from_checkpoint="latest"))
    assert weights_sha256(folder) == before
    assert not (folder / "config.yaml").exists()


@pytest.mark.slow
def test_overwriting_keeps_foreign_pictures_among_the_previews(config):
    train(config)
    previews = Path(config.output_dir, "previews")
    shutil.copyfile(previews / "step-0000006.png", previews / "step-0000006 (1).png")
    train(replace(config, resume_from_checkpoint="latest", max_train_steps=8))
    train(replace(config, overwrite_output_dir=True))
    assert (previews / "step-0000006 (1).png").exists()


@pytest.mark.slow
def test_unreadable_readme_is_refused_before_the_run_goes_on(config):
    train(config)
    readme = Path(config.output_dir, "README.md")
    readme.write_text("---\nlicense: [\n---\n")
    more = replace(config, resume_from_checkpoint="latest", max_train_steps=8)
    with pytest.raises(UsageError, match=r"README\.md cannot be read: .*: correct it, or delete it"):
        train(more)
    assert Path(config.output_dir, "run.json").exists()
    readme.unlink()
    train(more)
    assert readme.exists()


@pytest.mark.slow
def test_tracker_that_cannot_start_is_refused_and_leaves_no_run(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="logger must be able to start, got 'tensorboard': "):
        train(replace(config, logger="tensorboard", logging_dir=str(tmp_path / "file")))
    train(config)
