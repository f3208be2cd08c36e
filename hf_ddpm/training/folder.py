"""The output folder of a run: without what a later step of an abandoned run wrote, and with config.yaml."""

from __future__ import annotations

import shutil
from pathlib import Path

from hf_ddpm.runtime.run_files import run_files, undo_later_steps
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config


def delete_run(output_dir: Path) -> None:
    """Delete the files of the run that the folder holds, and nothing else."""
    for path in run_files(output_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def prepare_folder(config: TrainingConfig, output_dir: Path, progress: Progress) -> None:
    """Delete what steps after `progress` wrote, and what a kill left half written; write config.yaml."""
    for folder in (output_dir / "previews", output_dir / "figures"):
        folder.mkdir(exist_ok=True)
    undo_later_steps(output_dir, progress.step, progress.images)
    save_config(config, output_dir / "config.yaml")
