"""The table of the files that a run writes, and what is derived from it."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from hf_ddpm.evaluation.results import write_evaluation
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.run_files import (
    EVALUATION_PICTURES,
    OF_CHECKPOINT,
    REPLACED,
    RUN_FILES,
    SEARCHED_TIMESTEPS,
    UPLOADED,
    checkpoint_names,
    previews,
    run_files,
    undo_later_steps,
)
from hf_ddpm.timesteps import FILE
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_file_of_a_finished_run_is_in_the_table(tiny_settings: dict[str, Any]):
    settings = {**tiny_settings, "ema_halflife_images": [10, 100], "ema_snapshots": 2, "save_figures": True}
    train(TrainingConfig(**settings))
    folder = Path(settings["output_dir"])
    written = files_in(folder)
    assert {"config.yaml", "run.json", "README.md", "figures/loss.png", "previews/step-0000006.png"} <= written
    assert any(name.startswith("ema/halflife-100/") for name in written)
    assert any(name.startswith("ema/snapshot-") for name in written)

    def is_in_table(name: str) -> bool:
        return any(fnmatch(name, row.pattern) or fnmatch(name, f"{row.pattern}/*") for row in RUN_FILES)

    assert {name for name in written if not is_in_table(name)} == set()
    (folder / "notes.txt").write_text("mine")
    for path in run_files(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert files_in(folder) == {"notes.txt", ".lock"}


def test_tables_of_an_upload_are_those_of_the_rows():
    assert FILE.as_posix() == SEARCHED_TIMESTEPS
    names = ("steps", "seconds", "guidance", "bound", "spectrum", "memorization")
    assert tuple(f"{name}.png" for name in names) == EVALUATION_PICTURES
    assert {"config.yaml", "unet/*.safetensors", "figures/*.png", "evaluation.json"} <= set(UPLOADED)
    assert not [name for name in UPLOADED if name.startswith(("checkpoint", "previews", "ema", "partial", "."))]
    assert {"run.json", "unet/*.bin", "figures/kid.png", "evaluation.json"} <= set(REPLACED)
    assert "config.yaml" not in REPLACED
    needed = {"config.yaml", "metrics.jsonl", "eval.jsonl", "tracker.json", "previews/step-*.png", "best"}
    assert {*needed, "ema/snapshot-*.safetensors", "guide/*.safetensors"} <= set(OF_CHECKPOINT)
    assert not [name for name in OF_CHECKPOINT if name.startswith(("checkpoint", "run.json", "partial", "."))]


def test_run_files_of_a_folder_without_a_run_are_none(tmp_path: Path):
    for name in ("README.md", "unet/x.json", "checkpoint-best/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert run_files(tmp_path) == []
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    assert checkpoint_names(tmp_path) == ["checkpoint-9", "checkpoint-10"]
    assert {path.name for path in run_files(tmp_path)} == {"checkpoint-9", "checkpoint-10", "README.md", "x.json"}


def test_run_files_include_evaluation_results(tmp_path: Path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    weights = str(weights_sha256(tmp_path))
    drawings = {name: lambda path: path.write_bytes(b"png") for name in EVALUATION_PICTURES}
    write_evaluation(tmp_path, weights, [], drawings)
    names = {path.relative_to(tmp_path).as_posix() for path in run_files(tmp_path)}
    assert {"evaluation.json", *(f"figures/{name}" for name in EVALUATION_PICTURES)} <= names


@pytest.mark.parametrize(("num_steps", "num_images"), [(4, 40), (0, 0)])
def test_undo_later_steps_leaves_what_the_run_had_written_by_then(tmp_path: Path, num_steps: int, num_images: int):
    for name in ("previews", "ema", "partial-checkpoint-5", "partial-push-x", "partial-model"):
        (tmp_path / name).mkdir()
    (tmp_path / "partial-model/x").touch()
    for step in (2, 4, 6):
        (tmp_path / f"previews/step-{step:07d}.png").touch()
        (tmp_path / f"ema/snapshot-{10 * step:012d}.safetensors").touch()
    (tmp_path / "previews/step-mine.png").touch()
    (tmp_path / "run.json").touch()
    (tmp_path / "partial-notes.txt").touch()
    for name in ("metrics.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)))
    undo_later_steps(tmp_path, num_steps, num_images)
    steps = [step for step in (2, 4, 6) if step <= num_steps]
    assert [step for step, _ in previews(tmp_path)] == steps
    assert files_in(tmp_path) == {
        *(f"previews/step-{step:07d}.png" for step in steps),
        *(f"ema/snapshot-{10 * step:012d}.safetensors" for step in steps),
        *("previews/step-mine.png", "partial-notes.txt", "metrics.jsonl", "eval.jsonl"),
    }
    assert not [path for path in tmp_path.glob("partial-*") if path.is_dir()]
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_text() == "".join(json.dumps({"step": step}) + "\n" for step in steps)
