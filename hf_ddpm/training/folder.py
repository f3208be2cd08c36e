"""The output folder of a run: what becomes of the run before it, and of what an abandoned step wrote."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.run_files import MODEL_INDEX, REPLACED_RUN, run_files, undo_later_steps
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config


def set_aside(output_dir: Path) -> bool:
    """Move the run that the folder holds into its folder `replaced-run`, and leave everything else where it is.

    A run is not lost before the one that replaces it has a model. Each file is linked there before the first is
    deleted here, so that after a kill at any moment `restore_replaced` finds a whole run.

    Returns:
        Whether there was a run.
    """
    partial = output_dir / f"partial-{REPLACED_RUN}"
    if (output_dir / REPLACED_RUN).is_dir() and not (output_dir / MODEL_INDEX).is_file():
        _restore(output_dir)
    forget_replaced(output_dir)
    paths = run_files(output_dir)
    if not paths:
        return False
    _link_files(output_dir, paths, partial)
    partial.replace(output_dir / REPLACED_RUN)
    _delete(output_dir, paths)
    return True


def restore_replaced(output_dir: Path) -> bool:
    """Put the run in `replaced-run` back if the run that replaces it was ended before it had a model.

    Returns:
        Whether there was one to put back.

    Raises:
        BlockingIOError: When a process is at work in the folder.
    """
    aside = output_dir / REPLACED_RUN
    if not aside.is_dir() or (output_dir / MODEL_INDEX).is_file():
        return False
    with lock(output_dir):
        _restore(output_dir)
    return True


def _restore(output_dir: Path) -> None:
    aside = output_dir / REPLACED_RUN
    _delete(output_dir, run_files(output_dir))
    _link_files(aside, sorted(aside.iterdir(), key=lambda path: path.name == MODEL_INDEX), output_dir)
    forget_replaced(output_dir)


def forget_replaced(output_dir: Path) -> None:
    """Delete the run in `replaced-run`: what it held stands elsewhere, or a new model in its place."""
    aside, partial = output_dir / REPLACED_RUN, output_dir / f"partial-{REPLACED_RUN}"
    if partial.exists():
        shutil.rmtree(partial)
    if aside.exists():
        aside.replace(partial)  # after a kill, half of it would pass for a run
        shutil.rmtree(partial)


def _link_files(root: Path, paths: Iterable[Path], target: Path) -> None:
    """Link files in `root`, and those in its folders, to the same places in `target`; copy what cannot be linked."""
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_dir():
                continue
            link = target / file.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            try:
                os.link(file, link)
            except OSError:  # a file system without links
                shutil.copy2(file, link)


def _delete(output_dir: Path, paths: Iterable[Path]) -> None:
    (output_dir / MODEL_INDEX).unlink(missing_ok=True)  # first: a model without it is no longer one
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def prepare_folder(config: TrainingConfig, output_dir: Path, progress: Progress) -> None:
    """Delete what steps after `progress` wrote, and what a kill left half written; write config.yaml."""
    for folder in (output_dir / "previews", output_dir / "figures"):
        folder.mkdir(exist_ok=True)
    # First what a full disk refuses, then what deletes.
    save_config(config, output_dir / "config.yaml")
    undo_later_steps(output_dir, progress.step, progress.images)
