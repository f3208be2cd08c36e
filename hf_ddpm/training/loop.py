"""train(config): the loop.

A step sees the G images (G the global batch) that follow those already seen in an endless stream. Of these, process r
of P takes in its forward pass a the B = train_batch_size images from (aP + r)B on; a stable target also sees images
that follow the G. The order of the stream, crops and flips, t and eps are functions of (seed, position in the stream),
learning rate and averages of the images seen, so neither a run's process count nor its accumulation changes what it
computes beyond rounding, and resuming replays nothing. Only dropout, which draws for whole tensors, is a function of
(seed, step, slot) and differs with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.data.batches import to_x_0
from hf_ddpm.data.sources import check_source
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import RunError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.seeds import image_draws, seed_step
from hf_ddpm.runtime.signals import StoppedOnPurpose, StopRequest
from hf_ddpm.training import sharding
from hf_ddpm.training.checkpoint import Progress, save_checkpoint
from hf_ddpm.training.checks import check_config
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.dry_run import show_dry_run
from hf_ddpm.training.loader import fetch, gathered_stream, image_names, open_batches, read_on, why_none
from hf_ddpm.training.metrics import Meter, MetricsFile
from hf_ddpm.training.previews import save_preview, write_measurement
from hf_ddpm.training.publishing import push_finished, start_push
from hf_ddpm.training.report import finish
from hf_ddpm.training.run import FINISHES, FREE_SPACE, Run, say, try_to_track
from hf_ddpm.training.saving import save_model, save_snapshot
from hf_ddpm.training.setup import claim, set_up

# The others wait while one process decodes the images, or writes the report.
LONGEST_WAIT = timedelta(hours=2)


def train(config: TrainingConfig) -> DDPMPipeline | None:
    """Trains a model; `output_dir` then holds a diffusers pipeline, its card, figures and checkpoints.

    Each process of a distributed run calls it with the same config.

    Returns: the pipeline with the averaged weights; None of a `dry_run`, which prints what the run would cost.

    Raises:
        UsageError: before anything is written, settings or data that cannot work.
        RunError: data or numbers went wrong, or the disk is full; the message says how the run goes on.
        StoppedOnPurpose: a signal or `max_train_hours` ended the run; a checkpoint was written.
    """
    started = time.monotonic()
    check_config(config)
    check_source(config, config.output_dir)
    # A second run in one process, of a notebook, may ask for another precision.
    AcceleratorState._reset_state()
    output_dir = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.logger,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(output_dir / config.logging_dir)),
        kwargs_handlers=[InitProcessGroupKwargs(backend=sharding.backend(), timeout=LONGEST_WAIT)],
    )
    processes = Processes(LONGEST_WAIT)
    with ExitStack() as until_the_end:
        run, progress = set_up(config, accelerator, processes)
        pipeline = None
        if config.dry_run:
            show_dry_run(run, progress, _step)
        else:
            run = claim(run, progress, until_the_end)
            with StopRequest(config.max_train_hours, started) as stop:
                progress = _take_steps(run, progress, stop)
            pipeline = finish(run, progress)
        # A process that ends while gloo still finishes a gather of another one can hang in the destructor of DDP.
        accelerator.wait_for_everyone()
        try_to_track(run, accelerator.end_training)
        accelerator.state.destroy_process_group()  # which a tracker that fails leaves undone
        push_finished(run)
    return pipeline


def _take_steps(run: Run, progress: Progress, stop: StopRequest) -> Progress:
    """Trains to the end of the run; returns where it is then.

    Raises: StoppedOnPurpose or RunError, after a checkpoint where there is something new to keep.
    """
    config, accelerator, processes, output_dir = run.config, run.accelerator, run.processes, run.output_dir
    main, started, seconds_before = accelerator.is_main_process, time.perf_counter(), progress.seconds
    image_steps, model_steps = (
        _interval(epochs, (run.images.num_images or 0) / run.global_batch_size, config.checkpointing_steps)
        for epochs in (config.save_images_epochs, config.save_model_epochs)
    )
    num_steps = math.ceil((run.total_images - progress.images) / run.global_batch_size)
    meter, metrics = Meter(accelerator, progress.losses, progress.seconds), MetricsFile(output_dir / "metrics.jsonl")
    evaluations = MetricsFile(output_dir / "eval.jsonl")
    for file in (metrics, evaluations) if main else ():
        file.take_up(progress.waiting_lines.get(file.path.name, ()))
    batches, workers = open_batches(run, progress, num_steps)
    bar = tqdm(initial=progress.step, total=progress.step + num_steps, disable=not accelerator.is_local_main_process)
    first, saved_step, outcome, failure, is_due = progress, progress.step, None, None, False

    def save() -> str | None:
        for file in (metrics, evaluations):
            file.write()
        waiting = {"metrics.jsonl": metrics.waiting, "eval.jsonl": evaluations.waiting}
        now = replace(progress, losses=meter.state(), scaler=_scaler_state(accelerator), waiting_lines=waiting)
        if now.stream is not None:
            now = gathered_stream(processes, now, first)
        problem = save_checkpoint(run.state, now, output_dir, config.checkpoints_total_limit, main)
        return processes.on_main(lambda: problem)

    run.model.train()
    for number in range(num_steps):
        micro_batches, failure = fetch(batches, config.gradient_accumulation_steps)
        is_stopped, is_failed = processes.any([stop.reason(number) is not None, failure is not None])
        if outcome is not None:
            progress = _settle(run, progress, outcome, saved_step)
        if is_stopped or is_failed:
            break
        if progress.stream is not None:
            progress = read_on(progress, micro_batches)
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
        save_snapshot(run, progress)
        if run.monitor is not None and (done % (config.eval_steps or 1) == 0 or is_last):
            write_measurement(run, run.monitor, progress, evaluations)
        if done % image_steps == 0 and not is_last:
            save_preview(run, done)
        if done % model_steps == 0 and not is_last and save_model(run, run.average, output_dir):
            start_push(run, progress)
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
                say(processes, f"checkpoint-{done} could not be written, the run goes on: {problem}. {FREE_SPACE}")
    bar.close()
    if progress.images >= run.total_images:
        problem = processes.on_main(lambda: metrics.write() or evaluations.write())
        if problem is not None:
            raise RunError(f"the last lines of metrics could not be written: {problem}. {FREE_SPACE}; {FINISHES}")
        return progress if progress.stream is None else gathered_stream(processes, progress, first)

    problem = save() if progress.step > saved_step else None
    saved_step = progress.step if problem is None else saved_step
    again = f"the same command with --resume_from_checkpoint latest goes on from step {saved_step}"
    if problem is not None:
        again = f"checkpoint-{progress.step} could not be written: {problem}. {FREE_SPACE}; {again}"
    reasons = [r for r in processes.gather(lambda: None if failure is None else why_none(failure, workers)) if r]
    if reasons:
        raise RunError(f"{reasons[0]}. The run ends after step {progress.step}; {again}") from failure
    reasons = [r for r in processes.gather(lambda: stop.reason(1)) if r]
    if problem is not None:
        raise RunError(f"{reasons[0]}, but {again}")
    say(processes, f"{reasons[0]}: the run ends after step {progress.step}; {again}")
    accelerator.wait_for_everyone()
    raise StoppedOnPurpose


def _scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else None


def _interval(epochs: int | None, steps_per_epoch: float, default_steps: int) -> int:
    return default_steps if epochs is None else max(1, round(epochs * steps_per_epoch))


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

    def on_device(batch: dict[str, Tensor], name: str) -> Tensor | None:
        return batch[name].to(accelerator.device, non_blocking=True) if name in batch else None

    others = on_device(micro_batches[0], "others")
    if others is not None:
        others = to_x_0(others, run.images.max_value)
    other_labels = on_device(micro_batches[0], "other_labels")
    for micro, batch in enumerate(micro_batches):
        pixels = batch["pixels"].to(accelerator.device, non_blocking=True)
        positions = batch["positions"].numpy()
        slot = micro * accelerator.num_processes + accelerator.process_index
        seed_step(config.seed, progress.step, slot)
        is_last = micro == len(micro_batches) - 1
        with sharding.accumulating(accelerator, run.model, is_last):
            uniform, noise = image_draws(config.seed, batch["positions"], pixels.shape[1:], accelerator.device)
            t = run.objective.timesteps_from_uniform(
                uniform,
                first_index=slot * config.train_batch_size,
                global_batch_size=run.global_batch_size,
            )
            loss = run.objective(
                run.model,
                to_x_0(pixels, run.images.max_value),
                on_device(batch, "labels"),
                timesteps=t,
                noise=noise,
                extra_images=others,
                extra_labels=other_labels,
            )
            mean = loss.mean()
            # The gradients of a loss that is not finite are made NaN: by their norm every process learns of it.
            mark = torch.where(mean.detach().isfinite(), 1.0, math.nan)
            sharding.backward(accelerator, run.model, mean * mark, len(micro_batches))
        evaluated.append((loss.detach(), t, positions))
    lr = run.schedule(progress.images)
    norm, is_bad = sharding.step(accelerator, run.model, run.optimizer, lr, config.max_grad_norm)
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
        say(run.processes, f"a step is skipped, its loss or gradients are not finite: {began}")
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
    everyone = [image for images in run.processes.gather(lambda: mine) for image in images]
    found = [e for e in everyone if not math.isfinite(e["loss"])]
    heading = ""
    if not found:
        found = sorted(everyone, key=lambda e: -e["loss"])[:1]
        heading = "every loss is finite, a gradient is not; the largest loss: "
    shown = found[:limit]
    names = run.processes.on_main(lambda: image_names(run, [e["position"] for e in shown]))
    texts = [f"{name} at t = {e['t']}, loss {e['loss']:g}" for name, e in zip(names, shown, strict=True)]
    return heading + "; ".join(texts) + (f"; and {len(found) - limit} more" if len(found) > limit else "")


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
        say(run.processes, f"metrics.jsonl cannot be written now, its lines wait: {problem}. {FREE_SPACE}")
    tracked = {k: v for k, v in record.items() if k != "step" and v is not None}
    try_to_track(run, lambda: accelerator.log(tracked, step=record["step"]))
