"""The model in a run's folder: the pipeline with an average of the weights, and snapshots of averages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.posthoc import TRACKED_STDS, snapshot_bytes, snapshot_path
from hf_ddpm.training.run import Run, try_to_write
from hf_ddpm.training.sharding import full_tensors

# How the names of the averages begin that are saved as models; the others are for snapshots.
HALFLIFE = "halflife-"


def save_model(run: Run, average: list[Tensor] | None, folder: Path) -> bool:
    """The pipeline with one of the averages, each of its files whole; for all processes to call.

    Returns: whether it could be written, on the first process.
    """
    unet, partial = _averaged_unet(run, average), folder / "partial-model"

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            DDPMPipeline(unet, DDPMScheduler.from_config(run.scheduler.config)).save_pretrained(partial)
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted((p for p in partial.rglob("*") if p.is_file()), key=lambda p: p.parent == partial):
                target = folder / path.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    return run.accelerator.is_main_process and try_to_write(run, write)


def save_snapshot(run: Run, progress: Progress) -> None:
    """Once in each `ema_snapshots`-th part of the run, the power-function averages; for all processes to call."""
    count, before = run.config.ema_snapshots, progress.images - run.global_batch_size
    if run.state.ema is None or count * progress.images // run.total_images == count * before // run.total_images:
        return
    averages = {std: full_tensors(run.names, run.state.ema.averages[f"std-{std:g}"]) for std in TRACKED_STDS}
    path = snapshot_path(run.output_dir, progress.images)
    if run.accelerator.is_main_process:
        try_to_write(run, lambda: write_atomically(path, snapshot_bytes(progress.images, averages)))


def _averaged_unet(run: Run, average: list[Tensor] | None) -> UNet2DModel:
    """The network with averaged weights, or its own, on the CPU; for all processes to call."""
    unet = run.state.unet
    weights = full_tensors(run.names, run.parameters if average is None else average)
    buffers = {name: buffer.cpu() for name, buffer in unet.named_buffers() if name in unet.state_dict()}
    with torch.device("meta"):
        averaged: Any = UNet2DModel.from_config(unet.config)
    averaged.load_state_dict({**buffers, **weights}, assign=True)
    return averaged.eval()
