"""A run that is overwritten is whole until the one that replaces it has a model."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from hf_ddpm.data import image_folder
from hf_ddpm.hub.download import find_model
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.run_files import REPLACED_RUN
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.folder import forget_replaced, restore_replaced, set_aside
from hf_ddpm.training.loop import train
from tests.support.runs import differences, said, start

FILES = (
    "model_index.json",
    "unet/config.json",
    "unet/x.safetensors",
    "scheduler/scheduler_config.json",
    "config.yaml",
)
FILES += ("README.md", "checkpoint-3/manifest.json", "checkpoint-3/unet/x.safetensors", "notes.txt", "unet/notes.txt")


class Killed(BaseException):
    """What ends a process within a call of the file system."""


def contents(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in files.items() if name != ".lock"}


def older_run(folder: Path, files: tuple[str, ...] = FILES) -> dict[str, str]:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"old {name}")
    return contents(folder)


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """End the process before the `number`-th call that changes the file system."""
    left = number

    def counting(call):
        def count(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **options)

        return count

    for owner, name in ((os, "link"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (Path, "replace")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))


def is_killed(monkeypatch: pytest.MonkeyPatch, number: int, call, folder: Path) -> bool:
    with monkeypatch.context() as patch:
        kill_at(patch, number)
        try:
            call(folder)
        except Killed:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("files", [FILES, FILES[4:]], ids=["model", "no model"])
def test_overwritten_run_is_whole_after_a_kill_at_any_moment(tmp_path, monkeypatch, files):
    number, killed = 0, True
    while killed:
        folder = tmp_path / f"{number}"
        before = older_run(folder, files)
        killed = is_killed(monkeypatch, number, set_aside, folder)
        if not killed:
            (folder / "config.yaml").write_text("new")
            (folder / "checkpoint-1").mkdir()
        # The same command again, which may be killed itself.
        for moment in range(50):
            is_killed(monkeypatch, moment, restore_replaced, folder)
        restore_replaced(folder)
        assert before.items() <= contents(folder).items()
        assert set_aside(folder)
        kept = {name for name in before if not name.endswith("notes.txt")}
        assert contents(folder / REPLACED_RUN) == {name: before[name] for name in kept}
        assert contents(folder).keys() == {"notes.txt", "unet/notes.txt", *(f"{REPLACED_RUN}/{name}" for name in kept)}
        number += 1
    assert number > 10


def test_restored_run_is_the_old_one_alone(tmp_path):
    before = older_run(tmp_path)
    set_aside(tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "checkpoint-1/manifest.json", "previews/step-0000001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("new")
    assert restore_replaced(tmp_path)
    assert contents(tmp_path) == before
    assert not restore_replaced(tmp_path)


def test_model_that_stands_is_not_replaced_by_the_old_one(tmp_path):
    older_run(tmp_path)
    set_aside(tmp_path)
    (tmp_path / "model_index.json").write_text("new")
    assert not restore_replaced(tmp_path)
    forget_replaced(tmp_path)
    forget_replaced(tmp_path)
    assert contents(tmp_path).keys() == {"model_index.json", "notes.txt", "unet/notes.txt"}


def test_old_run_stays_when_the_new_one_is_overwritten_before_it_has_a_model(tmp_path):
    before = older_run(tmp_path)
    set_aside(tmp_path)
    (tmp_path / "config.yaml").write_text("new")
    (tmp_path / "checkpoint-1").mkdir()
    assert set_aside(tmp_path)
    kept = {name: text for name, text in before.items() if not name.endswith("notes.txt")}
    assert contents(tmp_path / REPLACED_RUN) == kept
    assert not (tmp_path / "config.yaml").exists()


def test_folder_without_a_run_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert not set_aside(tmp_path)
    assert contents(tmp_path) == {"README.md": "mine"}


@pytest.mark.slow
def test_run_that_cannot_start_deletes_no_checkpoint(tiny_settings, tmp_path):
    """Of a run that overwrites another one and has no model yet."""
    config = TrainingConfig(**tiny_settings, overwrite_output_dir=True)
    folder = Path(config.output_dir)
    older_run(folder / REPLACED_RUN)
    older_run(folder, FILES[4:])
    before = contents(folder)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="every image must be readable"):
        train(replace(config, train_data_dir=str(tmp_path / "images")))
    assert contents(folder) == before


@pytest.mark.slow
def test_run_that_begins_with_the_model_it_overwrites_may_be_killed(tiny_settings, tmp_path):
    first = TrainingConfig(**{**tiny_settings, "ema_snapshots": 0, "use_ema": False})
    train(first)
    folder = Path(first.output_dir)
    shutil.copytree(folder, tmp_path / "model")
    del tiny_settings["model_config_name_or_path"], tiny_settings["ddpm_num_steps"]
    settings = {**tiny_settings, "ema_snapshots": 0, "seed": 1, "overwrite_output_dir": True}
    over = TrainingConfig(**settings, init_from=str(folder))
    assert start(over, 1, "step", 2) == [-signal.SIGKILL]
    assert f"is kept in '{folder / REPLACED_RUN}' until the new one has a model" in said(over)
    with pytest.raises(UsageError, match=f"the model of the run before it is in '{folder / REPLACED_RUN}'"):
        find_model(folder)
    with lock(folder):
        assert start(over) == [1]
    assert "output_dir must be of one run at a time" in said(over)
    assert start(over) == [0]
    assert "the run that was to be overwritten is back" in said(over)
    assert not (folder / REPLACED_RUN).exists()
    undisturbed = replace(over, init_from=str(tmp_path / "model"), output_dir=str(tmp_path / "undisturbed"))
    train(undisturbed)
    assert not differences(folder, tmp_path / "undisturbed")


@pytest.mark.slow
def test_start_of_a_run_lists_its_images_once_more_than_the_check_of_its_settings(tiny_settings, monkeypatch):
    listed, list_anew = [], image_folder._list_images
    monkeypatch.setattr(image_folder, "_list_images", lambda folder: (listed.append(folder), list_anew(folder))[1])
    train(TrainingConfig(**tiny_settings))
    assert len(listed) == 2
