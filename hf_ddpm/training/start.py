"""The start of a run: step 0, or a checkpoint, and the batches that it goes on with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.given import GivenImages
from hf_ddpm.data.shards import ImageStream
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.checkpoint import Progress, find_checkpoint, read_progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import check_same_run
from hf_ddpm.training.run import print_once
from hf_ddpm.training.validation import check_validation_settings

Images = ImageCache | ImageStream | GivenImages


@dataclass(frozen=True)
class Start:
    """The start of a run: step 0, or a checkpoint.

    Args:
        config: The settings, with what data, launcher and checkpoint decided.
        checkpoint: The checkpoint that the run resumes from; None for a new run.
        num_steps: The steps of the whole run, of `schedule_batch_size` images each.
    """

    config: TrainingConfig
    progress: Progress
    checkpoint: Path | None
    global_batch_size: int
    num_steps: int


def find_start(config: TrainingConfig, images: Images, processes: Processes) -> Start:
    """Find where the run starts, and how long it is.

    Raises:
        UsageError: The checkpoint is of other settings or images, or has seen more images than the run is to see.
    """
    checkpoint, progress = _find_checkpoint(config, processes, images)
    if progress is not None:
        if config.global_batch_size not in (None, progress.global_batch_size):
            raise UsageError(
                f"global_batch_size was {progress.global_batch_size} in this run, got {config.global_batch_size}: "
                "leave it out, or give train_batch_size and gradient_accumulation_steps to change it on purpose"
            )
        config = _split_global_batch(config, progress.global_batch_size, processes)
    config = replace(config, global_batch_size=None)
    global_batch_size = config.batch_size * config.gradient_accumulation_steps * processes.size
    if progress is None:
        progress = _new_progress(config, images, global_batch_size, processes)
    counts_epochs = config.max_train_steps is None or config.save_images_epochs or config.save_model_epochs
    if images.num_images is None and counts_epochs:
        raise UsageError(
            "max_train_steps must be given, and save_images_epochs and save_model_epochs left out: the number of "
            f"images of {images.name!r} is not known"
        )
    batch_size = progress.schedule_batch_size
    num_steps = config.max_train_steps or math.ceil(config.num_epochs * (images.num_images or 0) / batch_size)
    total_images = num_steps * batch_size
    if progress.images - progress.global_batch_size >= total_images:
        raise UsageError(
            f"checkpoint-{progress.step} has seen {progress.images} images, more than the {total_images} of "
            f"{num_steps} steps of {batch_size}: give max_train_steps of at least "
            f"{math.ceil(progress.images / batch_size)}"
        )
    return Start(config, progress, checkpoint, global_batch_size, num_steps)


def _new_progress(config: TrainingConfig, images: Images, global_batch_size: int, processes: Processes) -> Progress:
    stream = None
    if config.streaming:
        num_substreams = processes.size * max(1, config.dataloader_num_workers)
        stream = {"num_substreams": num_substreams, "chunk_size": config.batch_size, "block_starts": []}
    return Progress(
        step=0,
        images=0,
        seconds=0.0,
        num_resumes=0,
        global_batch_size=global_batch_size,
        schedule_batch_size=global_batch_size,
        num_images=images.num_images,
        data_fingerprint=images.fingerprint,
        train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_bad_images=images.num_bad,
        stream=stream,
    )


def _find_checkpoint(
    config: TrainingConfig, processes: Processes, images: Images
) -> tuple[Path | None, Progress | None]:
    """Find the checkpoint to resume from and its progress; None for a new run.

    Raises:
        UsageError: It is of other settings or other images.
    """
    if config.resume_from_checkpoint is None:
        return None, None
    output_dir, name = Path(config.output_dir), config.resume_from_checkpoint
    require_same_run(config)
    checkpoint, problems = processes.on_main(lambda: find_checkpoint(output_dir, name))
    for problem in problems:
        print_once(processes, problem)
    if checkpoint is None:
        print_once(processes, f"{config.output_dir} holds no checkpoint: the run begins at step 0")
        return None, None
    progress = read_progress(checkpoint)
    if progress.data_fingerprint != images.fingerprint:
        raise UsageError(
            f"{checkpoint.name} was trained on other images ({progress.num_images} with fingerprint "
            f"{progress.data_fingerprint[:12]}, here {images.num_images} with {images.fingerprint[:12]}): "
            "give the data set and settings of its config.yaml"
        )
    print_once(processes, f"the run resumes from {checkpoint.name}, after {progress.images} images")
    requested = {name: getattr(config, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
    if any(value != getattr(progress, name) for name, value in requested.items()):  # changed on purpose
        requested_batch = config.batch_size * config.gradient_accumulation_steps * processes.size
        if requested_batch != progress.global_batch_size:
            _print_new_batch(processes, progress.global_batch_size, requested_batch)
        progress = replace(progress, global_batch_size=requested_batch, **requested)
    return checkpoint, progress


def require_same_run(config: TrainingConfig) -> None:
    """Check that a resumed run has the settings of the run.

    Raises:
        UsageError: It has others.
    """
    output_dir = Path(config.output_dir)
    if config.resume_from_checkpoint is not None and (output_dir / "config.yaml").is_file():
        check_same_run(config, output_dir / "config.yaml")
        check_validation_settings(config, output_dir / "eval.jsonl")


def _split_global_batch(config: TrainingConfig, global_batch_size: int, processes: Processes) -> TrainingConfig:
    """Return the config with a batch and accumulation by which these processes keep the global batch, if any do."""
    batch_size, accumulation = config.batch_size, config.gradient_accumulation_steps
    num_processes = processes.size
    if batch_size * accumulation * num_processes == global_batch_size:
        return config
    per_process, rest = divmod(global_batch_size, num_processes)
    if rest == 0:
        sizes = range(min(batch_size, per_process), 0, -1)
        batch_size = next(size for size in sizes if per_process % size == 0)
        accumulation = per_process // batch_size
        print_once(
            processes,
            f"{num_processes} processes keep {global_batch_size} images per step by train_batch_size {batch_size} "
            f"and gradient_accumulation_steps {accumulation}",
        )
    else:
        accumulation = max(1, round(global_batch_size / (batch_size * num_processes)))
        _print_new_batch(processes, global_batch_size, batch_size * accumulation * num_processes)
    return replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)


def _print_new_batch(processes: Processes, old: int, new: int) -> None:
    print_once(
        processes,
        f"the global batch changes from {old} to {new} images; learning rate, averages and the end of the run "
        "stay functions of the images seen",
    )
