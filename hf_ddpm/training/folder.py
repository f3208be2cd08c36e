"""The output folder of a run: without what a later step of an abandoned run wrote, and with config.yaml."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import psutil

from hf_ddpm.runtime.files import cut_metrics
from hf_ddpm.runtime.run_files import previews, run_files
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config
from hf_ddpm.training.posthoc import snapshots


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
    for partial in output_dir.glob("partial-*"):
        push = re.fullmatch(r"partial-push-(\d+)-.*", partial.name)
        if push is None or not _is_maker_running(int(push[1]), partial):
            shutil.rmtree(partial, ignore_errors=True)
    (output_dir / "run.json").unlink(missing_ok=True)  # it says that the run is finished
    save_config(config, output_dir / "config.yaml")
    cut_metrics(output_dir / "metrics.jsonl", progress.step)
    if (output_dir / "eval.jsonl").exists():
        cut_metrics(output_dir / "eval.jsonl", progress.step)
    for images, path in snapshots(output_dir):
        if images > progress.images:
            path.unlink()
    for step, path in previews(output_dir):
        if step > progress.step:
            path.unlink()


def _is_maker_running(pid: int, folder: Path) -> bool:
    """Return whether process `pid` is running and started before `folder` was made.

    A process that started later has got the number of one that is gone.
    """
    slack = 0 if pid == os.getpid() else 60  # seconds that a file server's clock may be behind
    try:
        return psutil.Process(pid).create_time() <= folder.stat().st_mtime + slack
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True
