"""train(config): the loop.

A step sees the G images (G the global batch) that follow those already seen in an endless stream. Of these, process r
of P takes in its forward pass a the B = train_batch_size images from (aP + r)B on; a stable target also sees images
that follow the G. The order of the stream, crops and flips, t and eps are functions of (seed, position in the stream),
learning rate and averages of the images seen, so neither a run's process count nor its accumulation changes what it
computes beyond rounding, and resuming replays nothing. Only dropout, which draws for whole tensors, is a function of
(seed, step, slot) and differs with them.

Nothing in a step waits for the device. Steps without finite loss and gradients are skipped there; they are counted
here when a line is logged. A checkpoint that the schedule writes is a logged step, so that it holds no partial sums;
one that a stop writes logs nothing and keeps them. Either way the lines of a resumed run are those of a run that was
never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.conditional import Conditioned
from hf_ddpm.data.batches import to_x_0
from hf_ddpm.data.image_folder import listed_once
from hf_ddpm.data.sources import check_source
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import RunError, explain_full_memory
from hf_ddpm.runtime.launch import settle_place
from hf_ddpm.runtime.meeting import explain_lost_process, meeting
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.seeds import seed_step
from hf_ddpm.runtime.settings import with_plain_paths
from hf_ddpm.runtime.signals import StopRequest, hours_in_job
from hf_ddpm.training import sharding
from hf_ddpm.training.augmentation import told_parameters
from hf_ddpm.training.automatic import choose_precision
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.checks import check_config
from hf_ddpm.training.conditions import conditions_of_batch
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.draws import augmented, draw, hide_labels
from hf_ddpm.training.dry_run import estimate_cost, print_cost
from hf_ddpm.training.ending import announce, announce_end, checkpoint, end_early
from hf_ddpm.training.hub_resume import resume_from_hub
from hf_ddpm.training.loader import (
    advance_stream,
    merge_block_starts,
    next_batches,
    open_loader,
)
from hf_ddpm.training.loop_state import LoopState, StepResult
from hf_ddpm.training.machines import check_machines
from hf_ddpm.training.parts import Event, Parts, check_parts
from hf_ddpm.training.previews import next_preview, preview_path, save_preview, validate
from hf_ddpm.training.publishing import (
    FINAL_PUSH_TIMEOUT_SECONDS,
    check_places,
    finish_checkpoint_push,
    push_finished,
    start_push,
)
from hf_ddpm.training.report import finish_run
from hf_ddpm.training.run import (
    FREE_SPACE,
    Run,
    describe_start,
    naming_compilation,
    num_steps_left,
    print_once,
    send_alert,
    track_values,
)
from hf_ddpm.training.saving import save_guide, save_model, save_snapshot
from hf_ddpm.training.setup import (
    LONGEST_WAIT,
    build_run,
    busy,
    end_processes,
    make_accelerator,
    open_run,
    restore_output_dir,
    restored_process,
)
from hf_ddpm.training.skipped_steps import count_skipped_steps, require_finite_end

LESS_MEMORY = (
    "Give a smaller --train_batch_size and as many times more --gradient_accumulation_steps, which trains the same "
    "model, as --train_batch_size auto does in a new run; or --gradient_checkpointing; or, if it was in a preview, a "
    "smaller --eval_batch_size. A run that wrote a checkpoint goes on from it with --resume_from_checkpoint latest"
)
LOST_PROCESS = (
    "The message of that process, if it still runs, says more. A run that wrote a checkpoint goes on from it when all "
    "processes are started again with --resume_from_checkpoint latest"
)


@explain_full_memory(LESS_MEMORY)
@explain_lost_process(LOST_PROCESS)
def train(
    config: TrainingConfig,
    *,
    dataset: Any = None,
    network: Any = None,
    objective: Callable[..., Tensor] | None = None,
    callbacks: Sequence[Callable[[Event, Run], None]] = (),
) -> DDPMPipeline | None:
    """Train a model; `output_dir` then holds a diffusers pipeline, its card, figures and checkpoints.

    Each process of a distributed run calls it with the same arguments.

    Args:
        config: The settings.
        dataset: The images, in place of those that the settings name: a `datasets.Dataset`, or any data set with a
            length and an item for each index. An item is a PIL image, float32 values (C, H, W) in [-1, 1] that are
            used as they are, or a dict with either as `image` and an integer `label`; then the data set's `classes`
            names the classes. It is a function of its index. A run is resumed if the length and, where the data set
            has one, its text `fingerprint` agree.
        network: The network, in place of the one that the settings describe: a `ModelMixin` of diffusers that is
            called as `network(x_t, t).sample`, with `class_labels=` where there are classes. It is trained in place.
        objective: The training loss, called as `Objective` is: `objective(network, x_0, class_labels, timesteps=,
            noise=, extra_images=, extra_labels=)` returns the loss of each image, (B,).
        callbacks: Functions of an `Event` (`log`, `preview`, `checkpoint`, `end`) and the run. They are called on the
            main process, and on all if they have the attribute `on_all_processes`. A failure ends the run.

    Returns:
        The pipeline with the averaged weights; None for a `dry_run`, which prints what the run would cost.

    Raises:
        UsageError: Settings or data cannot work; nothing was written.
        RunError: Data or numbers went wrong, or the disk is full; the message says how to resume.
        StoppedOnPurpose: A signal or `max_train_hours` ended the run; a checkpoint was written. It is a RunError.
    """
    started = time.monotonic()
    settle_place()
    config = with_plain_paths(config, TrainingConfig)
    check_config(config)
    parts = Parts(dataset, network, objective, callbacks if callable(callbacks) else tuple(callbacks))
    check_parts(config, parts)
    if dataset is None:
        check_source(config, config.output_dir)
    with restored_process():
        return train_with(config, parts, started)


def train_with(config: TrainingConfig, parts: Parts, started: float) -> DDPMPipeline | None:
    """Train a model from what `train` has checked; `started` is the start of the run by `time.monotonic`."""
    requested = config
    config, reason = choose_precision(requested)
    with meeting():
        accelerator = make_accelerator(config)
        processes = Processes(LONGEST_WAIT)
    check_machines(requested, processes)
    if requested.resume_from_checkpoint == "hub":
        requested = take_from_hub(requested, processes)
        config, reason = choose_precision(requested)  # that of the run, which is known only now
        accelerator = make_accelerator(config)
    processes.require_equal(accelerator.mixed_precision, "mixed_precision", "give one that is not auto")
    if reason is not None:
        print_once(processes, reason)
    if config.overwrite_output_dir and not config.dry_run:
        restore_output_dir(config, processes)
    if config.push_to_hub and not config.dry_run:
        processes.on_main(lambda: check_places(config))
    with listed_once():
        run, progress = build_run(config, accelerator, processes, parts)
    if config.dry_run:
        print_cost(run, progress, estimate_cost(run, progress, take_step))
        end_processes(run)
        return None
    max_hours = config.max_train_hours
    if max_hours is None:
        max_hours, reason = processes.on_main(lambda: hours_in_job(started))
        if reason is not None:
            print_once(processes, reason)
    num_steps = progress.step + num_steps_left(run, progress)
    print_once(processes, describe_start(run, progress, next_preview(run, progress.step, num_steps)))
    with open_run(run, progress) as run:
        with StopRequest(max_hours, started) as stop:
            progress = run_loop(run, progress, stop)
        pipeline = finish_run(run, progress)
        failure = announce_end(run, progress)
        end_processes(run)
        finish_checkpoint_push(run, FINAL_PUSH_TIMEOUT_SECONDS)
        push_finished(run)
    if failure is not None:
        raise failure
    return pipeline


def take_from_hub(config: TrainingConfig, processes: Processes) -> TrainingConfig:
    """Bring the run's checkpoint from the Hub into the output folder, and return the config that takes it.

    All processes call it, each with its own paths and token.

    Raises:
        UsageError: It cannot be had, or a process is at work in the folder.
    """
    try:
        processes.on_main(lambda: resume_from_hub(config, partial(print_once, processes)))
    except BlockingIOError as error:
        raise busy(config, error) from error
    return replace(config, resume_from_checkpoint="latest")


@dataclass(frozen=True)
class Due:
    """The things to do after a step. The last step is finished by `finish_run`."""

    is_last: bool
    log: bool
    checkpoint: bool
    preview: bool
    model: bool
    validation: bool


def run_loop(run: Run, progress: Progress, stop: StopRequest) -> Progress:
    """Train to the end of the run, and return the progress there.

    Raises:
        StoppedOnPurpose: The run was asked to end; a checkpoint was written if there were new steps.
        RunError: No images came, or no finite numbers, also in the last steps; or the last checkpoint could not be
            written.
    """
    state = LoopState(run, progress)
    with closing(state.bar), open_loader(run, progress, num_steps_left(run, progress)) as loader:
        run.model.train()
        while progress.images < run.total_images:
            is_stopped = partial(stop.is_due, progress.step - state.first.step)
            micro_batches, failure = next_batches(loader, run.config.gradient_accumulation_steps, is_stopped)
            if any(run.processes.any([is_stopped(), failure is not None])):
                end_early(run, progress, state, stop, loader, failure)
            if progress.stream is not None:
                num_bad_images = progress.num_bad_images
                progress = advance_stream(progress, state.block_starts, micro_batches)
                if progress.num_bad_images > num_bad_images == state.first.num_bad_images:
                    send_alert(run, "images are lost", "an unreadable image was met, and left out")
            with naming_compilation(run, progress.step == state.first.step):
                result = take_step(run, progress, micro_batches)
            state.meter.add([loss for loss, _, _ in result.evaluated], result.is_bad)
            state.unread.append(result)
            state.bar.update()
            progress = replace(
                progress,
                step=progress.step + 1,
                images=progress.images + run.global_batch_size,
                seconds=state.seconds(),
            )
            progress, events = do_what_is_due(run, progress, state, result)
            announce(run, progress, state, events)
    require_finite_end(run.config, progress)
    if progress.stream is None:
        return progress
    return merge_block_starts(run.processes, progress, state.first, state.block_starts)


def do_what_is_due(run: Run, progress: Progress, state: LoopState, result: StepResult) -> tuple[Progress, list[Event]]:
    """Do what is due after a step; return the progress with the steps that were skipped, and what was done."""
    due, events = due_after(run, progress), []

    def note(name: str, values: dict[str, Any]) -> None:
        events.append(Event(name, progress.step, progress.images, values))

    if due.log:
        progress = count_skipped_steps(run, progress, state)
        note("log", log(run, progress, state, result))
    save_snapshot(run, progress)
    save_guide(run, progress)
    if due.validation:
        with naming(state.bar, "validation"):
            validate(run, progress, state.evaluations)
    if due.preview:
        with naming(state.bar, "preview"):
            save_preview(run, progress.step)
        if preview_path(run, progress.step).exists():
            note("preview", {"path": preview_path(run, progress.step)})
    if due.model and save_model(run, run.average, run.output_dir):
        start_push(run, progress)
    # While steps are skipped, the last good checkpoint stays the newest.
    if due.checkpoint and (due.is_last or progress.bad_steps_in_a_row == 0):
        with naming(state.bar, "checkpoint"):
            checkpoint(run, progress, state, due.is_last)
        if state.saved_step == progress.step:
            note("checkpoint", {"path": run.output_dir / f"checkpoint-{progress.step}"})
    return progress, events


@contextmanager
def naming(bar: tqdm, work: str) -> Iterator[None]:
    """Say on the bar of the steps what it waits for, for the duration of a `with` block."""
    bar.set_description(work)
    yield
    bar.set_description()


def take_step(run: Run, progress: Progress, micro_batches: list[dict[str, Any]]) -> StepResult:
    """Take one optimizer step. Without finite loss and gradients, weights and optimizer stay as they are."""
    config, accelerator = run.config, run.accelerator
    evaluated = []

    def on_device(batch: dict[str, Any], name: str) -> Tensor | None:
        return batch[name].to(run.device, non_blocking=True) if name in batch else None

    network = run.model
    if run.loss is not run.objective:  # which makes its network compute in mixed precision by itself
        network = sharding.under_autocast(run.model, run.device, config.mixed_precision)
    extra_pixels = on_device(micro_batches[0], "extra_images")
    extra_images = None if extra_pixels is None else to_x_0(extra_pixels, run.images.scale)
    extra_labels = on_device(micro_batches[0], "extra_labels")
    for micro, batch in enumerate(micro_batches):
        pixels = batch["pixels"].to(run.device, non_blocking=True)
        positions = batch["positions"].numpy()
        slot = micro * run.processes.size + run.processes.rank
        labels = on_device(batch, "labels")
        seed_step(config.seed, progress.step, slot)
        with sharding.gradient_sync(accelerator, run.model, is_last=micro == len(micro_batches) - 1):
            t, noise = draw(run, progress.step, slot, batch["positions"], pixels.shape[1:])
            condition = conditions_of_batch(run, batch, pixels)
            x_0, parameters = augmented(run, to_x_0(pixels, run.images.scale), batch["positions"])
            with told_parameters(run.state.unet, parameters):
                loss = run.loss(
                    network if condition is None else Conditioned(network, condition),
                    x_0,
                    hide_labels(config.seed, batch["positions"], labels, run.labels, config.class_dropout),
                    timesteps=t,
                    noise=noise,
                    extra_images=extra_images,
                    extra_labels=extra_labels,
                )
            if loss.shape != (len(pixels),):
                raise RunError(f"objective must return a loss for each image, ({len(pixels)},), got {(*loss.shape,)}")
            mean = loss.mean()
            # The gradients of a loss that is not finite are made NaN: by their norm every process learns of it.
            mark = torch.where(mean.detach().isfinite(), 1.0, math.nan)
            accelerator.backward(mean * mark / len(micro_batches))
        evaluated.append((loss.detach(), t, positions))
    learning_rate = run.learning_rate(progress.images)
    norm, is_bad = sharding.step(accelerator, run.parameters, run.optimizer, learning_rate, config.max_grad_norm)
    decays = run.decays(progress.images, run.global_batch_size)
    if run.state.ema is not None:
        run.state.ema.update(run.parameters, decays)
    return StepResult(progress.step + 1, is_bad, norm, learning_rate, decays, evaluated)


def due_after(run: Run, progress: Progress) -> Due:
    """Return what is due after the step that brought the run to `progress`."""
    config, done = run.config, progress.step
    num_steps = done + num_steps_left(run, progress)
    is_last = progress.images >= run.total_images
    is_checkpoint = done % config.checkpointing_steps == 0 or is_last
    saves_model = is_checkpoint
    if config.save_model_epochs is not None:
        steps_per_epoch = (run.images.num_images or 0) / run.global_batch_size
        saves_model = done % max(1, round(config.save_model_epochs * steps_per_epoch)) == 0
    return Due(
        is_last=is_last,
        log=done % config.logging_steps == 0 or is_checkpoint,
        checkpoint=is_checkpoint,
        preview=not is_last and next_preview(run, done - 1, num_steps) == done,
        model=not is_last and saves_model,
        validation=run.validation is not None and (done % (config.eval_steps or 1) == 0 or is_last),
    )


def log(run: Run, progress: Progress, state: LoopState, result: StepResult) -> dict[str, Any]:
    """Append a line to metrics.jsonl, give it to the trackers and to the progress bar, and return it."""
    record = metrics_line(run, progress, state, result)
    loss = record["loss"]
    state.bar.set_postfix(loss="-" if loss is None else f"{loss:.4f}", images_s=f"{record['images_per_second']:.3g}")
    problem = state.metrics.write(record) if run.is_main else None
    if problem is not None:
        print_once(run.processes, f"metrics.jsonl cannot be written now, its lines wait: {problem}. {FREE_SPACE}")
    track_values(run, {name: value for name, value in record.items() if name != "step"}, progress.step)
    return record


def metrics_line(run: Run, progress: Progress, state: LoopState, result: StepResult) -> dict[str, Any]:
    """Return a line of metrics.jsonl, and start new sums; all processes call it."""
    norm = float(result.grad_norm)
    return {
        "step": progress.step,
        "images": progress.images,
        **state.meter.read(progress.seconds),
        "lr": result.learning_rate,
        "grad_norm": norm if math.isfinite(norm) else None,
        "ema_decay": next(iter(result.decays.values())) if run.config.use_ema else None,
        "bad_steps": progress.num_bad_steps,
    }
