"""The output folder of a run: locked, and without what a later step of an abandoned run wrote."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.run_files import run_files, undo_later_steps
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config


def prepare_output(config: TrainingConfig, output_dir: Path, progress: Progress, until_the_end: ExitStack) -> None:
    """An output folder that is this run's alone, with its config, and what it wrote until where it goes on."""
    existed = output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    until_the_end.enter_context(lock(output_dir))
    if config.overwrite_output_dir and existed:
        for path in run_files(output_dir):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    for folder in (output_dir / "previews", output_dir / "figures"):
        folder.mkdir(exist_ok=True)
    undo_later_steps(output_dir, progress.step, progress.images)
    save_config(config, output_dir / "config.yaml")
