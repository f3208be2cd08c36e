"""train(config): the loop.

A step sees the G images (G the global batch) that follow those already seen in an endless stream. Of these, process r
of P takes in its forward pass a the B = train_batch_size images from (aP + r)B on. The order of the stream, crops and
flips, t and eps are functions of (seed, position in the stream), learning rate and averages of the images seen, so
neither a run's process count nor its accumulation changes what it computes beyond rounding, and resuming replays
nothing. Only dropout, which draws for whole tensors, is a function of (seed, step, slot) and differs with them.
"""

from __future__ import annotations

import gc
import io
import json
import math
import multiprocessing
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_ddpm import engine, figures
from hf_ddpm.checkpoint import (
    Progress,
    TrainingState,
    find_checkpoint,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from hf_ddpm.config import (
    RunError,
    TrainingConfig,
    UsageError,
    check_config,
    check_same_run,
    run_files,
    save_config,
)
from hf_ddpm.data import ImageCache, MicroBatches, epoch_order, load_images, to_x_0
from hf_ddpm.decoding import name_of
from hf_ddpm.ema import EMA, edm_decay, halflife_from_decay, ramped_decay, swapped
from hf_ddpm.engine import AUTOCAST, gathered
from hf_ddpm.evaluation.monitor import Monitor, measure, open_monitor
from hf_ddpm.files import lock, write_atomically
from hf_ddpm.lanes import NUM_PLACE_COLUMNS, StreamBatches
from hf_ddpm.metrics import Meter, MetricsFile, cut_metrics, read_metrics
from hf_ddpm.objective import Objective
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.posthoc import TRACKED_STDS, power_decay, snapshot_bytes, snapshot_path, snapshots
from hf_ddpm.processes import share_cores
from hf_ddpm.report import push, write_report
from hf_ddpm.sampling import default_scheduler, named_scheduler, sample_shared
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.seeds import image_generators, seed_step
from hf_ddpm.sources import check_source, open_dataset
from hf_ddpm.stopping import StoppedOnPurpose, StopRequest, leave_signals_to_parent
from hf_ddpm.streaming import ImageStream, open_stream
from hf_ddpm.unet import make_unet

HALFLIFE = "halflife-"
FREE_SPACE = "Free space on that disk or make it writable; what was written before is untouched"
FINISHES = "then the same command with --resume_from_checkpoint latest finishes the run"
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What the loop works with.

    Args:
        config: with what data and launcher decided; `train_batch_size` and `gradient_accumulation_steps` are those of
            this start.
        model, optimizer: as Accelerate prepared them; `state` holds those within.
        schedule: images seen -> learning rate.
        decays: (images seen, images of the step) -> decay of each average.
        total_images: where the run ends.
        global_batch_size: images per step of this start.
    """

    config: TrainingConfig
    output_dir: Path
    accelerator: Accelerator
    images: ImageCache | ImageStream
    scheduler: DDPMScheduler
    model: Any
    optimizer: Any
    state: TrainingState
    objective: Objective
    monitor: Monitor | None
    schedule: Callable[[int], float]
    decays: Callable[[int, int], dict[str, float]]
    total_images: int
    global_batch_size: int

    @property
    def average(self) -> list[Tensor] | None:
        """The one of previews and of the saved model."""
        return next(iter(self.state.ema.averages.values())) if self.state.ema is not None else None

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.state.unet.named_parameters()]

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.state.unet.parameters())


def train(config: TrainingConfig) -> DDPMPipeline:
    """Trains a model; `output_dir` then holds a diffusers pipeline, its card, figures and checkpoints.

    Each process of a distributed run calls it with the same config.

    Returns: the pipeline with the averaged weights.

    Raises:
        UsageError: before anything is written, settings or data that cannot work.
        RunError: data or numbers went wrong, or the disk is full; the message says how the run goes on.
        StoppedOnPurpose: a signal or `max_train_hours` ended the run; a checkpoint was written.
    """
    started = time.monotonic()
    check_config(config)
    check_source(config)
    # A second run in one process, of a notebook, may ask for another precision.
    AcceleratorState._reset_state()
    output_dir = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.logger,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(output_dir / config.logging_dir)),
        # The others wait while one process decodes the images, or writes the report.
        kwargs_handlers=[InitProcessGroupKwargs(backend=engine.backend(), timeout=timedelta(hours=2))],
    )
    with ExitStack() as until_the_end:
        run, progress = _set_up(config, accelerator, until_the_end)
        with StopRequest(config.max_train_hours, started) as stop:
            progress = _take_steps(run, progress, stop)
        pipeline = _finish(run, progress)
    # A process that ends while gloo still finishes a gather of another one can hang in the destructor of DDP.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return pipeline


def make_scheduler(config: TrainingConfig) -> DDPMScheduler:
    """The scheduler of training, which sampling never touches; saved with the model.

    Stock samples it well in fewer steps than T: `trailing` starts at T-1 for any number of them, but stock adds noise
    in its last step, which is seen unless the variance is `fixed_small`; `leading` has no such step.
    """
    leading = config.variance_type != "fixed_small" and not config.rescale_betas_zero_snr
    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        beta_start=config.ddpm_beta_start,
        beta_end=config.ddpm_beta_end,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="leading" if leading else "trailing",
    )


def _set_up(config: TrainingConfig, accelerator: Accelerator, until_the_end: ExitStack) -> tuple[Run, Progress]:
    output_dir = Path(config.output_dir)
    engine.check(accelerator)
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and accelerator.mixed_precision == "fp16":
        raise UsageError("mixed_precision fp16 needs a GPU: its gradients are scaled there only; use bf16 or no")
    if on_cpu:
        share_cores(accelerator.num_processes, config.cpu_threads_per_process)
    with accelerator.local_main_process_first():
        images = open_stream(config) if config.streaming else load_images(config)
    asked = config = _resolve(config, images, accelerator.mixed_precision)
    checkpoint, progress = _find_progress(config, accelerator, images)
    if progress is not None:
        config = _divide(config, progress.global_batch_size, accelerator)
    num_processes = accelerator.num_processes
    global_batch_size = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    if progress is None:
        of = (global_batch_size, global_batch_size, images.num_images, images.fingerprint)
        asked_for = (config.train_batch_size, config.gradient_accumulation_steps)
        progress = Progress(0, 0, 0.0, 0, *of, *asked_for, num_bad_images=images.num_bad)
        if config.streaming:
            lanes = num_processes * max(1, config.dataloader_num_workers)
            stream = {"num_lanes": lanes, "chunk_size": config.train_batch_size, "places": []}
            progress = replace(progress, stream=stream)
    schedule_batch_size = progress.schedule_batch_size
    if images.num_images is None and (config.max_train_steps is None or config.save_images_epochs):
        raise UsageError(
            f"max_train_steps must be given, and nothing by epochs: {images.name!r} says no number of images"
        )
    num_steps = config.max_train_steps or math.ceil(config.num_epochs * (images.num_images or 0) / schedule_batch_size)
    total_images = num_steps * schedule_batch_size
    if progress.images - progress.global_batch_size >= total_images:
        raise UsageError(
            f"checkpoint-{progress.step} has seen {progress.images} images, more than the {total_images} of "
            f"{num_steps} steps of {schedule_batch_size}: give max_train_steps of at least "
            f"{math.ceil(progress.images / schedule_batch_size)}"
        )

    monitor = open_monitor(config, images, accelerator) if config.eval_steps is not None else None
    scheduler = make_scheduler(config)
    new_unet = make_unet(config, images.channels, images.resolution, images.num_classes)
    optimizer = torch.optim.AdamW(
        new_unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    model, prepared = engine.prepare(accelerator, new_unet, optimizer, config, lambda text: _say(accelerator, text))
    unet: Any = accelerator.unwrap_model(model)
    decays = _decays(config, schedule_batch_size)
    ema = EMA(list(unet.parameters()), list(decays(0, global_batch_size))) if config.use_ema else None
    state = TrainingState(unet, prepared.optimizer, ema)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
        progress = replace(progress, num_resumes=progress.num_resumes + 1)
        if accelerator.scaler is not None and progress.scaler is not None:
            accelerator.scaler.load_state_dict(progress.scaler)
    try:
        _by_main(accelerator, lambda: _prepare_output(asked, output_dir, progress, until_the_end))
    except BlockingIOError as error:
        raise UsageError(f"output_dir must be of one run at a time, got {config.output_dir!r}: {error}") from error
    except OSError as error:
        message = f"output_dir must be writable, got {config.output_dir!r}: {error}. {FREE_SPACE}"
        raise UsageError(message) from error
    if config.logger is not None:
        accelerator.init_trackers(output_dir.name, config=_tracked(config))
    lr_factor = _lr_factor(config, num_steps)
    run = Run(
        config=config,
        output_dir=output_dir,
        accelerator=accelerator,
        images=images,
        scheduler=scheduler,
        model=model,
        optimizer=prepared,
        state=state,
        objective=Objective(
            scheduler=scheduler,
            weighting=config.loss_weighting,
            min_snr_gamma=config.min_snr_gamma,
            density=config.timestep_density,
            autocast_dtype=AUTOCAST[config.mixed_precision or "no"],
        ),
        monitor=monitor,
        schedule=lambda images_seen: config.learning_rate * lr_factor(images_seen / schedule_batch_size),
        decays=decays,
        total_images=total_images,
        global_batch_size=global_batch_size,
    )
    return run, progress


def _find_progress(
    config: TrainingConfig, accelerator: Accelerator, images: ImageCache | ImageStream
) -> tuple[Path | None, Progress | None]:
    """The checkpoint to go on from and where it is; None for a new run.

    Raises:
        UsageError: it is of other settings or other images.
    """
    if config.resume_from_checkpoint is None:
        return None, None
    output_dir, name = Path(config.output_dir), config.resume_from_checkpoint
    if (output_dir / "config.yaml").is_file():
        check_same_run(config, output_dir / "config.yaml")
    checkpoint, passed_over = _by_main(accelerator, lambda: find_checkpoint(output_dir, name))
    for problem in passed_over:
        _say(accelerator, problem)
    if checkpoint is None:
        _say(accelerator, f"{config.output_dir} holds no checkpoint: the run begins at step 0")
        return None, None
    progress = read_progress(checkpoint)
    if progress.data_fingerprint != images.fingerprint:
        raise UsageError(
            f"{checkpoint.name} was trained on other images ({progress.num_images} with fingerprint "
            f"{progress.data_fingerprint[:12]}, here {images.num_images} with {images.fingerprint[:12]}): "
            "give the data set and settings of its config.yaml"
        )
    _say(accelerator, f"the run goes on from {checkpoint.name}, after {progress.images} images")
    asked = {name: getattr(config, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
    if any(value != getattr(progress, name) for name, value in asked.items()):  # changed on purpose
        wanted = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        if wanted != progress.global_batch_size:
            _say_new_batch(accelerator, progress.global_batch_size, wanted)
        progress = replace(progress, global_batch_size=wanted, **asked)
    return checkpoint, progress


def _divide(config: TrainingConfig, global_batch_size: int, accelerator: Accelerator) -> TrainingConfig:
    """The config with the batch and accumulation by which these processes keep the global batch, if they can."""
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    num_processes = accelerator.num_processes
    if batch_size * accumulation * num_processes == global_batch_size:
        return config
    share, rest = divmod(global_batch_size, num_processes)
    if rest == 0:
        batch_size = next(size for size in range(min(batch_size, share), 0, -1) if share % size == 0)
        accumulation = share // batch_size
        _say(
            accelerator,
            f"{num_processes} processes keep {global_batch_size} images per step by train_batch_size {batch_size} "
            f"and gradient_accumulation_steps {accumulation}",
        )
    else:
        accumulation = max(1, round(global_batch_size / (batch_size * num_processes)))
        _say_new_batch(accelerator, global_batch_size, batch_size * accumulation * num_processes)
    return replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)


def _say_new_batch(accelerator: Accelerator, before: int, now: int) -> None:
    _say(
        accelerator,
        f"the global batch changes from {before} to {now} images; learning rate, averages and the end of the run "
        "stay functions of the images seen",
    )


def _take_steps(run: Run, progress: Progress, stop: StopRequest) -> Progress:
    """Trains to the end of the run; returns where it is then.

    Raises: StoppedOnPurpose or RunError, after a checkpoint where there is something new to keep.
    """
    config, accelerator, output_dir = run.config, run.accelerator, run.output_dir
    main, started, seconds_before = accelerator.is_main_process, time.perf_counter(), progress.seconds
    image_steps, model_steps = (
        _interval(epochs, (run.images.num_images or 0) / run.global_batch_size, config.checkpointing_steps)
        for epochs in (config.save_images_epochs, config.save_model_epochs)
    )
    num_steps = math.ceil((run.total_images - progress.images) / run.global_batch_size)
    meter, metrics = Meter(accelerator, progress.losses, progress.seconds), MetricsFile(output_dir / "metrics.jsonl")
    evaluations = MetricsFile(output_dir / "eval.jsonl")
    metrics.waiting = list(progress.waiting_lines.get("metrics.jsonl", ()))
    evaluations.waiting = list(progress.waiting_lines.get("eval.jsonl", ()))
    (batches, workers), agree = _batches(run, progress, num_steps), _agreement(accelerator)
    bar = tqdm(initial=progress.step, total=progress.step + num_steps, disable=not accelerator.is_local_main_process)
    first, saved_step, outcome, failure, is_due = progress, progress.step, None, None, False

    def save() -> str | None:
        for file in (metrics, evaluations):
            file.write()
        waiting = {"metrics.jsonl": metrics.waiting, "eval.jsonl": evaluations.waiting}
        now = replace(progress, losses=meter.state(), scaler=_scaler_state(accelerator), waiting_lines=waiting)
        if now.stream is not None:
            now = _gathered_stream(now, first)
        problem = save_checkpoint(run.state, now, output_dir, config.checkpoints_total_limit, main)
        return _by_main(accelerator, lambda: problem)

    run.model.train()
    for number in range(num_steps):
        micro_batches, failure = _fetch(batches, config.gradient_accumulation_steps)
        is_stopped, is_failed = agree([stop.reason(number) is not None, failure is not None])
        if outcome is not None:
            progress = _settle(run, progress, outcome, saved_step)
        if is_stopped or is_failed:
            break
        if progress.stream is not None:
            progress = _read_on(progress, micro_batches)
        outcome = _step(run, progress, micro_batches, meter)
        seconds = seconds_before + time.perf_counter() - started
        progress = replace(
            progress, step=progress.step + 1, images=progress.images + run.global_batch_size, seconds=seconds
        )
        bar.update()
        done, is_last = progress.step, progress.images >= run.total_images
        is_logged = done % config.logging_steps == 0 or is_last
        is_saved = done % config.checkpointing_steps == 0 or is_last or is_due
        if is_logged or is_saved:
            settled, outcome = outcome, None
            progress = _settle(run, progress, settled, saved_step)
            if is_logged:
                _log(run, metrics, _record(run, progress, settled, meter), bar)
        _save_snapshot(run, progress)
        if run.monitor is not None and (done % (config.eval_steps or 1) == 0 or is_last):
            _measure(run, run.monitor, progress, evaluations)
        if done % image_steps == 0 and not is_last:
            _save_preview(run, done)
        if done % model_steps == 0 and not is_last:
            _save_model(run, run.average, output_dir)
        # Within steps that are skipped the last good checkpoint stays, and the next good step writes one.
        is_due = is_due or is_saved
        if is_due and (is_last or (outcome is None and progress.bad_steps_in_a_row == 0)):
            is_due = False
            problem = save()
            if problem is None:
                saved_step = done
            elif is_last:
                raise RunError(f"the last checkpoint could not be written: {problem}. {FREE_SPACE}")
            else:
                _say(accelerator, f"checkpoint-{done} could not be written, the run goes on: {problem}. {FREE_SPACE}")
    bar.close()
    if progress.images >= run.total_images:
        return progress if progress.stream is None else _gathered_stream(progress, first)

    problem = save() if progress.step > saved_step else None
    saved_step = progress.step if problem is None else saved_step
    again = f"the same command with --resume_from_checkpoint latest goes on from step {saved_step}"
    if problem is not None:
        again = f"checkpoint-{progress.step} could not be written: {problem}. {FREE_SPACE}; {again}"
    reasons = [reason for reason in gather_object([None if failure is None else _reason(failure, workers)]) if reason]
    if reasons:
        raise RunError(f"{reasons[0]}. The run ends after step {progress.step}; {again}") from failure
    reasons = [reason for reason in gather_object([stop.reason(1)]) if reason]
    if problem is not None:
        raise RunError(f"{reasons[0]}, but {again}")
    _say(accelerator, f"{reasons[0]}: the run ends after step {progress.step}; {again}")
    accelerator.wait_for_everyone()
    raise StoppedOnPurpose


@dataclass(frozen=True)
class _Outcome:
    """What a step was.

    Args:
        is_bad: whether it was skipped; waits for the value if that is still on its way from the device.
        evaluated: loss, t and positions of each forward pass of this process.
    """

    is_bad: Callable[[], bool]
    grad_norm: Tensor
    lr: float
    decays: dict[str, float]
    evaluated: list[tuple[Tensor, Tensor, np.ndarray]]


def _step(run: Run, progress: Progress, micro_batches: list[dict[str, Tensor]], meter: Meter) -> _Outcome:
    """One optimizer step. Without finite loss and gradients, weights and optimizer stay as they are."""
    config, accelerator = run.config, run.accelerator
    evaluated = []
    for micro, batch in enumerate(micro_batches):
        pixels = batch["pixels"].to(accelerator.device, non_blocking=True)
        labels = batch["labels"].to(accelerator.device, non_blocking=True) if "labels" in batch else None
        positions = batch["positions"].numpy()
        slot = micro * accelerator.num_processes + accelerator.process_index
        seed_step(config.seed, progress.step, slot)
        is_last = micro == len(micro_batches) - 1
        with engine.accumulating(accelerator, run.model, is_last):
            loss, t = run.objective(
                run.model,
                to_x_0(pixels, run.images.max_value),
                image_generators(config.seed, positions, accelerator.device),
                labels,
                stratum=(slot * config.train_batch_size, run.global_batch_size),
            )
            mean = loss.mean()
            # The gradients of a loss that is not finite are made NaN: by their norm every process learns of it.
            mark = torch.where(mean.detach().isfinite(), 1.0, math.nan)
            engine.backward(accelerator, run.model, mean * mark, len(micro_batches))
        evaluated.append((loss.detach(), t, positions))
    lr = run.schedule(progress.images)
    norm = engine.step(accelerator, run.model, run.optimizer, lr, config.max_grad_norm)
    is_bad = ~norm.isfinite()
    decays = run.decays(progress.images, run.global_batch_size)
    if run.state.ema is not None:
        run.state.ema.update(run.parameters, decays)
    meter.add([loss for loss, _, _ in evaluated], is_bad)
    return _Outcome(_on_its_way(is_bad), norm, lr, decays, evaluated)


def _on_its_way(value: Tensor) -> Callable[[], bool]:
    """Starts to copy a value from the device, which goes on working, and returns how to get it."""
    if value.device.type != "cuda":
        return lambda: bool(value)
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(copy)

    return read


def _settle(run: Run, progress: Progress, outcome: _Outcome, saved_step: int) -> Progress:
    """Counts the step that was the last, if it was skipped.

    Raises:
        RunError: it was the last of `max_bad_steps` in a row.
    """
    if not outcome.is_bad():
        return replace(progress, bad_steps_in_a_row=0, bad_steps_began="")
    in_a_row, began = progress.bad_steps_in_a_row + 1, progress.bad_steps_began
    if in_a_row == 1:
        began = f"step {progress.step}: {_suspects(run, outcome)}"
        _say(run.accelerator, f"a step is skipped, its loss or gradients are not finite: {began}")
    if in_a_row >= run.config.max_bad_steps:
        raise RunError(
            f"{in_a_row} steps in a row had no finite loss and gradients (max_bad_steps). They began at {began}. "
            + (f"The last checkpoint is checkpoint-{saved_step}. " if saved_step else "There is no checkpoint yet. ")
            + "Look at these images, or change a setting in config.yaml: a lower learning_rate, mixed_precision no"
        )
    num_bad_steps = progress.num_bad_steps + 1
    return replace(progress, num_bad_steps=num_bad_steps, bad_steps_in_a_row=in_a_row, bad_steps_began=began)


def _suspects(run: Run, outcome: _Outcome, limit: int = 8) -> str:
    """The images of a step whose loss is not finite, each with its noise level; for all processes to call."""
    mine = [
        {"loss": loss, "t": t, "position": position}
        for losses, timesteps, positions in outcome.evaluated
        for loss, t, position in zip(losses.tolist(), timesteps.tolist(), positions.tolist(), strict=True)
    ]
    everyone: list[dict[str, Any]] = gather_object(mine)
    found = [e for e in everyone if not math.isfinite(e["loss"])]
    heading = ""
    if not found:
        found = sorted(everyone, key=lambda e: -e["loss"])[:1]
        heading = "every loss is finite, a gradient is not; the largest loss: "
    shown = found[:limit]
    names = _by_main(run.accelerator, lambda: _image_names(run, [e["position"] for e in shown]))
    texts = [f"{name} at t = {e['t']}, loss {e['loss']:g}" for name, e in zip(names, shown, strict=True)]
    return heading + "; ".join(texts) + (f"; and {len(found) - limit} more" if len(found) > limit else "")


def _image_names(run: Run, positions: list[int]) -> list[str]:
    if isinstance(run.images, ImageStream):
        return [f"image {position} of the stream" for position in positions]
    numbers = []
    for position in positions:
        epoch, place = divmod(position, len(run.images))
        numbers.append(int(epoch_order(run.config.seed, epoch, len(run.images))[place]))
    if run.images.num_bad:
        return [f"readable image {number}" for number in numbers]
    try:
        dataset = open_dataset(run.config)
        return [name_of(dataset[number][dataset.column_names[0]], number) for number in numbers]
    except Exception:  # the images are in the cache, their files may be gone
        return [f"row {number}" for number in numbers]


def _record(run: Run, progress: Progress, outcome: _Outcome, meter: Meter) -> dict[str, Any]:
    norm = float(outcome.grad_norm)
    return {
        "step": progress.step,
        "images": progress.images,
        **meter.read(progress.seconds),
        "lr": outcome.lr,
        "grad_norm": norm if math.isfinite(norm) else None,
        "ema_decay": next(iter(outcome.decays.values())) if run.config.use_ema else None,
        "bad_steps": progress.num_bad_steps,
    }


def _log(run: Run, metrics: MetricsFile, record: dict[str, Any], bar: Any) -> None:
    loss, accelerator = record["loss"], run.accelerator
    bar.set_postfix(loss="-" if loss is None else f"{loss:.4f}", images_s=f"{record['images_per_second']:.0f}")
    problem = metrics.write(record) if accelerator.is_main_process else None
    if problem is not None:
        _say(accelerator, f"metrics.jsonl cannot be written now, its lines wait: {problem}. {FREE_SPACE}")
    tracked = {k: v for k, v in record.items() if k != "step" and v is not None}
    _try(run, lambda: accelerator.log(tracked, step=record["step"]))


def _fetch(batches: Iterator[Any], count: int) -> tuple[list[Any], Exception | None]:
    """The micro-batches of a step, or why there are none."""
    try:
        return [next(batches) for _ in range(count)], None
    except Exception as error:  # whatever a file system or a process that loads data comes to
        return [], error


def _read_on(progress: Progress, micro_batches: list[dict[str, Tensor]]) -> Progress:
    """Where this process is in its lanes of a stream, and what it has met there."""
    stream: Any = progress.stream
    places = {place[0]: place for place in stream["places"]}
    for batch in micro_batches:
        for place in batch["places"].tolist():
            places[place[0]] = max(place, places.get(place[0], place), key=lambda p: p[1])
    num_bad = sum(int(batch["num_bad"]) for batch in micro_batches)
    stream = {**stream, "places": list(places.values())}
    return replace(progress, stream=stream, num_bad_images=progress.num_bad_images + num_bad)


def _gathered_stream(progress: Progress, first: Progress) -> Progress:
    """Where all processes are, the furthest in each lane, and what they have met since `first`."""
    stream: Any = progress.stream
    places = {place[0]: place for place in sorted(gather_object(stream["places"]))}
    num_bad = first.num_bad_images + sum(gather_object([progress.num_bad_images - first.num_bad_images]))
    return replace(progress, stream={**stream, "places": list(places.values())}, num_bad_images=num_bad)


def _reason(error: Exception, workers: list[Any]) -> str:
    """Why there is no data: a process that loads them has died, or what it says, of which a traceback is left out."""
    for worker in workers:
        worker.join(timeout=1)
        if worker.exitcode:
            code = worker.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"process {worker.pid}, which loads data, {how}: is there memory for all dataloader_num_workers?"
    lines = [line for line in str(error).splitlines() if line.strip()]
    # Errors that a worker passes on begin with their class.
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else type(error).__name__


def _agreement(accelerator: Accelerator) -> Callable[[list[bool]], list[bool]]:
    """A function: flags of this process -> whether they are set on any process, the same on all."""
    if accelerator.num_processes == 1:
        return lambda flags: flags
    # Of its own, over the hosts: nothing waits for a device.
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=2))

    def agree(flags: list[bool]) -> list[bool]:
        votes = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=group)
        return [bool(vote) for vote in votes]

    return agree


def _by_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns in the main process, on every process; what it raises is raised on each."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except Exception as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def _say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        tqdm.write(text, file=sys.stderr)


def _scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else None


def _resolve(config: TrainingConfig, images: ImageCache | ImageStream, mixed_precision: str) -> TrainingConfig:
    """The config with what the data and the launcher decided."""
    return replace(
        config,
        dataset_name=config.dataset_name or (None if config.train_data_dir else "digits"),
        resolution=images.resolution,
        channels=images.channels,
        mixed_precision=mixed_precision,
    )


def _preview_steps(config: TrainingConfig) -> int:
    if config.ddpm_num_inference_steps is not None:
        return config.ddpm_num_inference_steps
    return config.ddpm_num_steps if config.prediction_type == "previous_sample" else min(20, config.ddpm_num_steps)


def _lr_factor(config: TrainingConfig, num_steps: int) -> Any:
    """diffusers' schedule as a function of the optimizer step: nothing steps it, so nothing can step it too often."""
    # `polynomial` ends at a rate of its own, which it divides by this one.
    unused = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler, unused, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
    )
    return schedule.lr_lambdas[0]


def _decays(config: TrainingConfig, schedule_batch_size: int) -> Callable[[int, int], dict[str, float]]:
    """(images seen, images of the step) -> the decay of each average, by its name."""
    halflives = config.ema_halflife_images or [halflife_from_decay(config.ema_max_decay, schedule_batch_size)]
    stds = TRACKED_STDS if config.ema_snapshots else ()
    ratio, ramp = config.ema_rampup_ratio, (config.ema_inv_gamma, config.ema_power, schedule_batch_size)

    def decay(images_seen: int, batch_size: int, halflife: float) -> float:
        if ratio is not None:
            return edm_decay(images_seen, batch_size, halflife, ratio)
        return ramped_decay(images_seen, batch_size, halflife, *ramp)

    def decays(images_seen: int, batch_size: int) -> dict[str, float]:
        exponential = {f"{HALFLIFE}{h:g}": decay(images_seen, batch_size, h) for h in halflives}
        return exponential | {f"std-{std:g}": power_decay(images_seen, batch_size, std) for std in stds}

    return decays


def _interval(epochs: int | None, steps_per_epoch: float, default_steps: int) -> int:
    return default_steps if epochs is None else max(1, round(epochs * steps_per_epoch))


def _batches(run: Run, progress: Progress, num_steps: int) -> tuple[Iterator[dict[str, Tensor]], list[Any]]:
    """The micro-batches of this process, and the processes that load them."""
    config, accelerator = run.config, run.accelerator
    cut: dict[str, Any] = {
        "seed": config.seed,
        "random_flip": config.random_flip,
        "batch_size": config.train_batch_size,
        "accumulation_steps": config.gradient_accumulation_steps,
        "rank": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "first_position": progress.images,
        "num_steps": num_steps,
    }
    if isinstance(run.images, ImageStream):
        stream: Any = progress.stream
        places = np.array(stream["places"], np.int64).reshape(-1, NUM_PLACE_COLUMNS)
        lanes = {"num_lanes": stream["num_lanes"], "chunk_size": stream["chunk_size"], "places": places}
        dataset: Any = StreamBatches(run.images, **cut, **lanes, shuffle_buffer_images=config.shuffle_buffer_images)
    else:
        dataset = MicroBatches(run.images, **cut)
    loader = DataLoader(
        dataset,
        batch_size=None,
        shuffle=False,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=accelerator.device.type == "cuda",
    )
    others = multiprocessing.active_children()
    # Garbage collection in the workers would write to every object that they inherit, and so copy its page of memory.
    gc.freeze()
    batches = iter(loader)
    gc.unfreeze()
    # torch would raise the death of a worker wherever this process is, perhaps between the halves of a step; without
    # this handler it is the next batch that raises it.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if hasattr(signal, "SIGCHLD") and config.dataloader_num_workers and in_main_thread:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches, [child for child in multiprocessing.active_children() if child not in others]


def _averaged_unet(run: Run, average: list[Tensor] | None) -> UNet2DModel:
    """The network with averaged weights, or its own, on the CPU; for all processes to call."""
    unet = run.state.unet
    weights = gathered(run.names, run.parameters if average is None else average)
    buffers = {name: buffer.cpu() for name, buffer in unet.named_buffers() if name in unet.state_dict()}
    with torch.device("meta"):
        averaged: Any = UNet2DModel.from_config(unet.config)
    averaged.load_state_dict({**buffers, **weights}, assign=True)
    return averaged.eval()


def _save_preview(run: Run, step: int) -> Image.Image:
    """Samples from seeds 0, 1, ..., the same at each step and for any number of processes, as one sheet."""
    config, accelerator, unet, images = run.config, run.accelerator, run.state.unet, run.images
    pipeline = DDPMPipeline(unet, _preview_scheduler(run))
    pipeline.set_progress_bar_config(disable=True)
    num_images = config.eval_batch_size
    labels = [i % images.num_classes for i in range(num_images)] if images.num_classes else None
    unet.eval()
    precision = engine.autocast(accelerator.device, config.mixed_precision)
    with swapped(run.parameters, run.average or run.parameters), precision:
        samples = sample_shared(
            accelerator,
            pipeline,
            range(num_images),
            batch_size=-(-num_images // accelerator.num_processes),
            num_inference_steps=_preview_steps(config),
            class_labels=labels,
        )
        engine.reshard(unet)
    unet.train()
    sheet = figures.grid(figures.to_images(2 * samples - 1))
    if accelerator.is_main_process:
        content = io.BytesIO()
        sheet.save(content, "png")
        _try(run, lambda: write_atomically(run.output_dir / f"previews/step-{step:07d}.png", content.getvalue()))
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                pixels = {"samples": np.asarray(sheet.convert("RGB"))[None]}
                _try(run, partial(tracker.log_images, pixels, step=step, **layout))
    return sheet


def _measure(run: Run, monitor: Monitor, progress: Progress, evaluations: MetricsFile) -> None:
    """A line of eval.jsonl; the model of the least KID so far is kept in `best`."""
    unet, accelerator, path = run.state.unet, run.accelerator, evaluations.path
    pipeline = DDPMPipeline(unet, _preview_scheduler(run))
    pipeline.set_progress_bar_config(disable=True)
    unet.eval()
    precision = engine.autocast(accelerator.device, run.config.mixed_precision)
    with swapped(run.parameters, run.average or run.parameters), precision:
        measured = measure(monitor, accelerator, pipeline, run.objective, _preview_steps(run.config))
        engine.reshard(unet)
    unet.train()
    before = _by_main(accelerator, lambda: [r["kid"] for r in read_metrics(path) if r["kid"] is not None])
    record = {"step": progress.step, "images": progress.images, **measured}
    if accelerator.is_main_process:
        problem = evaluations.write(record)
        if problem is not None:
            _say(accelerator, f"eval.jsonl cannot be written now, its lines wait: {problem}. {FREE_SPACE}")
    tracked = {k: measured[k] for k in ("kid", "val_loss") if measured[k] is not None}
    _try(run, lambda: accelerator.log(tracked, step=progress.step))
    if measured["kid"] is not None and measured["kid"] <= min(before, default=math.inf):
        _save_model(run, run.average, run.output_dir / "best")
        if accelerator.is_main_process:
            _try(run, lambda: write_atomically(run.output_dir / "best/best.json", json.dumps(record, indent=2) + "\n"))


def _preview_scheduler(run: Run) -> Any:
    config = run.scheduler.config
    return named_scheduler(default_scheduler(config), config, _preview_steps(run.config))


def _save_model(run: Run, average: list[Tensor] | None, folder: Path) -> None:
    """The pipeline with one of the averages, each of its files whole; for all processes to call."""
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

    if run.accelerator.is_main_process:
        _try(run, write)


def _save_snapshot(run: Run, progress: Progress) -> None:
    """Once in each `ema_snapshots`-th part of the run, the power-function averages; for all processes to call."""
    count, before = run.config.ema_snapshots, progress.images - run.global_batch_size
    if run.state.ema is None or count * progress.images // run.total_images == count * before // run.total_images:
        return
    averages = {std: gathered(run.names, run.state.ema.averages[f"std-{std:g}"]) for std in TRACKED_STDS}
    path = snapshot_path(run.output_dir, progress.images)
    if run.accelerator.is_main_process:
        _try(run, lambda: write_atomically(path, snapshot_bytes(progress.images, averages)))


def _try(run: Run, write: Callable[[], None]) -> None:
    try:
        write()
    except (OSError, SafetensorError) as error:
        _say(run.accelerator, f"a file could not be written, the run goes on: {error}. {FREE_SPACE}")


def _finish(run: Run, progress: Progress) -> DDPMPipeline:
    """Writes what a finished run leaves; a run that is finished already writes the same again."""
    config, accelerator, output_dir = run.config, run.accelerator, run.output_dir
    _save_model(run, run.average, output_dir)
    for name, average in list(run.state.ema.averages.items() if run.state.ema is not None else ())[1:]:
        if name.startswith(HALFLIFE):
            _save_model(run, average, output_dir / "ema" / name)
    samples = _save_preview(run, progress.step)
    averaged: Any = _averaged_unet(run, run.average)
    pipeline = DDPMPipeline(averaged.to(accelerator.device), DDPMScheduler.from_config(run.scheduler.config))

    def write() -> None:
        samples.save(output_dir / "figures" / "samples.png")
        sampled = {
            "scheduler": type(_preview_scheduler(run)).__name__,
            "num_inference_steps": _preview_steps(config),
            "seed": 0,
            "ema": config.use_ema,
        }
        write_report(config, pipeline, run.images, progress, run.global_batch_size, sampled, accelerator)
        if config.push_to_hub:
            push(config, progress.step)

    try:
        _by_main(accelerator, write)
    except OSError as error:
        raise RunError(f"the report could not be written: {error}. {FREE_SPACE}; {FINISHES}") from error
    return pipeline


def _prepare_output(config: TrainingConfig, output_dir: Path, progress: Progress, until_the_end: ExitStack) -> None:
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
    for left in output_dir.glob("partial-*"):  # by a kill
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
    for path in (output_dir / "previews").glob("step-*.png"):
        if int(path.stem.rpartition("-")[2]) > progress.step:
            path.unlink()


def _tracked(config: TrainingConfig) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(config).items() if k != "hub_token"}
    return {k: v if isinstance(v, int | float | str) else "" if v is None else str(v) for k, v in settings.items()}
