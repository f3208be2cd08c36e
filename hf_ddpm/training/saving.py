"""The model in a run's folder: the pipeline with an average of the weights, and snapshots of averages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.label_embedding import empty_copy, save_network
from hf_ddpm.network import require_finite
from hf_ddpm.pipeline import GUIDE_FOLDER, DDPMPipeline
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.solvers import Sampler, tuned_scheduler
from hf_ddpm.training.augmentation import without_map
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.folder import forget_replaced
from hf_ddpm.training.posthoc import TRACKED_STDS, snapshot_bytes, snapshot_path
from hf_ddpm.training.run import Run, try_to_write
from hf_ddpm.training.sharding import full_tensors

# The names of averages that are saved as models begin so; the other averages are for snapshots.
HALFLIFE_PREFIX = "halflife-"
# The part of the run after which its average is kept to guide the model of its end.
GUIDE_PART = 8


def save_model(run: Run, average: list[Tensor] | None, folder: Path) -> bool:
    """Save the pipeline with one of the averages, each of its files whole; all processes call it.

    Returns:
        On the first process, whether it could be written.

    Raises:
        UsageError: The weights are not finite.
    """
    unet = averaged_unet(run, average, is_kept=run.is_main)
    run.processes.on_main(lambda: require_finite(unet.state_dict(), "the model"))
    is_written = run.is_main and try_to_write(run, lambda: _write_pipeline(run, unet, folder))
    if is_written and folder == run.output_dir:
        try_to_write(run, lambda: forget_replaced(folder))
    return is_written


def save_models(run: Run) -> bool:
    """Save the finished model, and the model of each further half-life; all processes call it.

    Returns:
        On all processes, whether all of them could be written.
    """
    are_saved = [save_model(run, run.average, run.output_dir)]
    averages = run.state.ema.averages if run.state.ema is not None else {}
    for name, average in list(averages.items())[1:]:
        if name.startswith(HALFLIFE_PREFIX):
            are_saved.append(save_model(run, average, run.output_dir / "ema" / name))
    return run.processes.on_main(lambda: all(are_saved))


def save_snapshot(run: Run, progress: Progress) -> None:
    """Save the power-function averages, once in each `ema_snapshots`-th part of the run; all processes call it."""
    count, images_before_step = run.config.ema_snapshots, progress.images - run.global_batch_size
    parts_done = count * progress.images // run.total_images
    if run.state.ema is None or parts_done == count * images_before_step // run.total_images:
        return
    averages = {
        std: without_map(full_tensors(run.names, run.state.ema.averages[f"std-{std:g}"], run.is_main))
        for std in TRACKED_STDS
    }
    path = snapshot_path(run.output_dir, progress.images)
    if run.is_main:
        try_to_write(run, lambda: write_atomically(path, snapshot_bytes(progress.images, averages)))


def save_guide(run: Run, progress: Progress) -> None:
    """Save the averaged network after the first part of the run, for autoguidance; all processes call it.

    A model that is tuned for few steps is not guided any more, and has none.

    A network of the same kind that was trained less errs in the same way, and more: guidance leads away from it
    (Karras et al. 2024, arXiv 2406.02507). A later one errs as the model itself does, and guides nowhere.
    """
    end = run.total_images / GUIDE_PART
    if run.state.ema is None or run.config.tuned_steps is not None:
        return
    if not progress.images - run.global_batch_size < end <= progress.images:
        return
    unet = averaged_unet(run, run.average, is_kept=run.is_main)
    if run.is_main and all(bool(weight.isfinite().all()) for weight in unet.state_dict().values()):
        try_to_write(run, lambda: _write_guide(unet, run.output_dir))


def averaged_unet(run: Run, average: list[Tensor] | None, is_kept: bool = True) -> Any:
    """Return the network with averaged weights, or its own, on the CPU; all processes call it.

    Args:
        run: The run.
        average: The average; None: the weights.
        is_kept: False on a process that only helps to gather the weights, which gets None.
    """
    unet = run.state.unet
    weights = without_map(full_tensors(run.names, run.parameters if average is None else average, is_kept))
    if not is_kept:
        return None
    buffers = {name: buffer.cpu() for name, buffer in unet.named_buffers() if name in unet.state_dict()}
    # Other networks may have buffers that are not among their weights.
    with torch.device("meta" if isinstance(unet, UNet2DModel) else "cpu"):
        averaged = empty_copy(unet)
    averaged.load_state_dict({**buffers, **weights}, assign=True)
    return averaged.eval()


def pipeline_of(run: Run, unet: Any, scheduler: Any) -> DDPMPipeline:
    """Return the pipeline of a network of the run, with its labels and what it makes images from."""
    if run.condition is None:
        pipeline = DDPMPipeline(unet, scheduler)
    else:
        # The config of a solver does not say that a half of the output is the variance.
        pipeline = ConditionalDDPMPipeline(unet, run.scheduler)
        pipeline.scheduler = scheduler
        pipeline.condition = run.condition
    pipeline.labels, pipeline.value_range = run.labels, run.images.value_range
    if run.config.tuned_steps is not None:
        pipeline.kept_sampler = Sampler("lcm", max(run.config.tuned_steps))
    return pipeline


def scheduler_to_save(run: Run) -> Any:
    """Return the scheduler that is saved with the model: that of training, or of a tuned model `LCMScheduler`."""
    if run.config.tuned_steps is not None:
        return tuned_scheduler(run.scheduler.config)
    return DDPMScheduler.from_config(run.scheduler.config)


def _write_guide(unet: Any, folder: Path) -> None:
    partial = folder / "partial-guide"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_network(unet, partial)
        (folder / GUIDE_FOLDER).mkdir(exist_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".json"):
            path.replace(folder / GUIDE_FOLDER / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_pipeline(run: Run, unet: Any, folder: Path) -> None:
    """Write the pipeline under a temporary name, then move its files into `folder`, model_index.json last."""
    partial = folder / "partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline_of(run, unet, scheduler_to_save(run)).save_pretrained(partial)
        files = [path for path in partial.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.parent == partial):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(exist_ok=True, parents=True)
            path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
