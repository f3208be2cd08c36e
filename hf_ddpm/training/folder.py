"""The output folder of a run: locked, and without what a later step of an abandoned run wrote."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import psutil

from hf_ddpm.runtime.files import cut_metrics, lock
from hf_ddpm.runtime.run_files import previews, run_files
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config
from hf_ddpm.training.posthoc import snapshots


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
    for left in output_dir.glob("partial-*"):  # by a kill, unless by an `hf-ddpm push` that goes on
        owner = re.fullmatch(r"partial-push-(\d+)-.*", left.name)
        if owner is None or not _is_its_maker(int(owner[1]), left):
            shutil.rmtree(left, ignore_errors=True)
    (output_dir / "run.json").unlink(missing_ok=True)  # there when the run is finished
    save_config(config, output_dir / "config.yaml")
    cut_metrics(output_dir / "metrics.jsonl", progress.step)
    if (output_dir / "eval.jsonl").exists():
        cut_metrics(output_dir / "eval.jsonl", progress.step)
    # Of a course that is not gone on with:
    for images, path in snapshots(output_dir):
        if images > progress.images:
            path.unlink()
    for step, path in previews(output_dir):
        if step > progress.step:
            path.unlink()


def _is_its_maker(pid: int, folder: Path) -> bool:
    """Whether that process lives and was there before the folder: another one may have got the number since."""
    slack = 0 if pid == os.getpid() else 60  # seconds that a file server's clock may be behind
    try:
        return psutil.Process(pid).create_time() <= folder.stat().st_mtime + slack
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True
