"""The pictures and validations while a model trains, of the weights that would be saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_ddpm import figures
from hf_ddpm.data.conditions import example_pairs
from hf_ddpm.evaluation.training_share import SIGNIFICANCE
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.files import read_metrics, write_atomically
from hf_ddpm.sampling.sampler import grid_by_label, labels_in_turn, sample_all, sheet_by_label, strip_by_label
from hf_ddpm.solvers import default_scheduler, default_steps, named_scheduler, tuned_scheduler
from hf_ddpm.training import sharding
from hf_ddpm.training.averages import swap_in
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.metrics import LinesFile
from hf_ddpm.training.run import (
    FREE_SPACE,
    Run,
    lacks,
    print_once,
    send_alert,
    track_values,
    try_to_track,
    try_to_write,
)
from hf_ddpm.training.saving import pipeline_of, save_model
from hf_ddpm.training.validation import VALIDATION_SETTINGS, measure_validation
from hf_ddpm.value_range import pictured

MIN_STEPS_BETWEEN = 10
# The values of a validation that trackers get.
TRACKED = ("kid", "val_loss", "psnr", "training_share", "copied_share", "training_distance")


def save_preview(run: Run, step: int, has_bar: bool = False) -> Image.Image:
    """Save a sheet of samples, give it to the trackers and return it; all processes call it."""
    sheet = sample_sheet(run, has_bar)
    if run.is_main:
        path = preview_path(run, step)
        try_to_write(run, lambda: write_atomically(path, figures.png_bytes(sheet)))
        track_sheet(run, sheet, step)
    return sheet


def track_sheet(run: Run, sheet: Image.Image, step: int) -> None:
    """Give a sheet of samples to all trackers that lack it."""
    for tracker in run.trackers:
        if lacks(run, tracker, step, "samples"):
            try_to_track(run, lambda tracker=tracker: _track_sheet(tracker, sheet, step))


def preview_path(run: Run, step: int) -> Path:
    """Return where the preview after a step is written."""
    return run.output_dir / f"previews/step-{step:07d}.png"


def sample_sheet(run: Run, has_bar: bool = False) -> Image.Image:
    """Sample seeds 0, 1, ... into one sheet: the same seeds at each step and for any number of processes.

    Images that are made from images stand between these and those of the data. Those of a model that is tuned for
    several numbers of steps stand beside one another, from the same noises, with a row for each label.

    All processes call it.

    Args:
        has_bar: Whether each forward batch has a progress bar of its sampling steps.
    """
    num_images, columns = grid_by_label(run.config.eval_batch_size, run.labels)
    pairs = None
    if run.condition is not None:
        pairs = example_pairs(run.condition, run.images, run.config.eval_batch_size)
        num_images = len(pairs.images)
    with averaged_pipeline(run) as pipeline:
        pipeline.set_progress_bar_config(desc="samples", leave=False, disable=not (has_bar and run.is_main))
        samples = {
            num_steps: sample_all(
                pipeline,
                range(num_images),
                run.processes,
                batch_size=-(-num_images // run.processes.size),
                num_inference_steps=num_steps,
                class_labels=labels_in_turn(run.labels, range(num_images)) if pairs is None else pairs.labels,
                conditions=None if pairs is None else pairs.conditions,
            )
            for num_steps in sorted(run.config.tuned_steps or [preview_steps(run)])
        }
    values = run.images.value_range
    title = "sample" if run.config.tuned_steps is None else None
    shown = {title or _in_steps(num_steps): pictured(images, values) for num_steps, images in samples.items()}
    if pairs is not None and run.condition is not None:
        of_conditions = values if run.condition.super_resolution else run.condition.value_range
        shown = {
            run.condition.label: pictured(pairs.conditions, of_conditions),
            **shown,
            "truth": pictured(pairs.images, values),
        }
    pictures = {title: figures.to_pil(images) for title, images in shown.items()}
    if len(pictures) == 1:
        (images,) = pictures.values()
        return sheet_by_label(images, columns, run.labels)
    if pairs is None and columns is not None and run.labels is not None:
        return strip_by_label(pictures, columns, run.labels)
    return figures.side_by_side([*pictures.values()], [*pictures])


def _in_steps(num_steps: int) -> str:
    return "1 step" if num_steps == 1 else f"{num_steps} steps"


def next_preview(run: Run, done: int, num_steps: int) -> int:
    """Return the step after which the next preview is saved.

    Args:
        done: The steps that are done.
        num_steps: The steps of the whole run; at its end there is a preview anyway.
    """
    if run.config.save_images_epochs is None:
        steps = default_preview_steps(num_steps, steps_per_preview(run))
        return next((step for step in steps if step > done), num_steps)
    steps_per_epoch = (run.images.num_images or 0) / run.global_batch_size
    every = max(1, round(run.config.save_images_epochs * steps_per_epoch))
    return min(num_steps, (done // every + 1) * every)


def default_preview_steps(num_steps: int, steps_per_preview: float) -> list[int]:
    """Return the steps of a run after which there is a preview unless the settings say when.

    They are 1/50, 1/20 and each tenth of the run. Between two, and from the start and to the end, where there is a
    preview anyway, there are at least MIN_STEPS_BETWEEN steps, and as many as take as long as a preview. Steps decide,
    so that a resumed run has the same ones.

    Args:
        num_steps: The steps of the whole run.
        steps_per_preview: The training steps that take as long as a preview.
    """
    steps, least = [0], max(MIN_STEPS_BETWEEN, steps_per_preview)
    for percent in (2, 5, *range(10, 100, 10)):
        step = -(-num_steps * percent // 100)
        if min(step - steps[-1], num_steps - step) >= least:
            steps.append(step)
    return steps[1:]


def steps_per_preview(run: Run) -> float:
    """Return how many training steps take as long as a preview: one takes three forward passes of its images."""
    return run.config.eval_batch_size * preview_steps(run) / (3 * run.global_batch_size)


def validate(run: Run, progress: Progress, evaluations: LinesFile) -> None:
    """Append a line to eval.jsonl, and keep the model of the least kernel distance so far in `best`."""
    assert run.validation is not None
    with averaged_pipeline(run) as pipeline:
        measured = measure_validation(
            run.validation,
            run.processes,
            pipeline,
            run.objective,
            preview_steps(run),
            run.device,
            run.config.tuned_steps,
        )
    path = evaluations.path
    earlier = run.processes.on_main(lambda: [*read_metrics(path), *map(json.loads, evaluations.waiting)])
    earlier_distances = [line["kid"] for line in earlier if line["kid"] is not None]
    settings = {name: getattr(run.config, name) for name in VALIDATION_SETTINGS}
    record = {"step": progress.step, "images": progress.images, **measured, **settings}
    if run.is_main:
        problem = evaluations.write(record)
        if problem is not None:
            print_once(run.processes, f"eval.jsonl cannot be written now, its lines wait: {problem}. {FREE_SPACE}")
    track_values(run, {name: measured[name] for name in TRACKED if name in measured}, progress.step)
    if memorizes(measured) and not any(memorizes(line) for line in earlier):
        text = describe_memorization(measured, progress.step)
        print_once(run.processes, text)
        send_alert(run, "the model memorizes", text)
    if measured["kid"] is not None and measured["kid"] <= min(earlier_distances, default=math.inf):
        _save_best(run, record)


def memorizes(measured: dict[str, Any]) -> bool:
    """Return whether more samples are nearest to a training image than chance explains, in a line of eval.jsonl."""
    return measured.get("training_share_p_value", 1.0) <= SIGNIFICANCE


def describe_memorization(measured: dict[str, Any], step: int) -> str:
    """Return in words what was measured of memorization, and what helps."""
    return (
        f"memorization is measured at step {step}: {measured['training_share']:.1%} of the samples are nearer to a "
        f"training image than to any held-out one, by chance {measured['training_share_by_chance']:.1%} "
        f"(p = {measured['training_share_p_value']:.2g}), and {measured['copied_share']:.1%} are copies of one. More "
        "images, fewer steps or --augment_probability help"
    )


@contextmanager
def averaged_pipeline(run: Run) -> Iterator[DDPMPipeline]:
    """Give the pipeline that previews sample, with the averaged weights, for the duration of a `with` block."""
    unet = run.state.unet
    pipeline = pipeline_of(run, unet, _preview_scheduler(run))
    pipeline.set_progress_bar_config(disable=True)
    unet.eval()
    precision = sharding.autocast(run.device, run.config.mixed_precision)
    with swap_in(run.parameters, run.average or run.parameters), precision:
        yield pipeline
        sharding.reshard(unet)
    unet.train()


def preview_settings(run: Run) -> dict[str, Any]:
    """Return how previews are sampled, for the card."""
    return {
        "scheduler": type(_preview_scheduler(run)).__name__,
        "num_inference_steps": preview_steps(run),
        "seed": 0,
        "ema": run.config.use_ema,
    }


def preview_steps(run: Run) -> int:
    """Return the number of sampling steps of a preview; of a model that is tuned for several numbers, the largest."""
    config = run.scheduler.config
    if run.config.tuned_steps is not None:
        return max(run.config.tuned_steps)
    return run.config.ddpm_num_inference_steps or default_steps(
        default_scheduler(config), config["num_train_timesteps"]
    )


def _preview_scheduler(run: Run) -> Any:
    config = run.scheduler.config
    if run.config.tuned_steps is not None:
        return tuned_scheduler(config)
    return named_scheduler(default_scheduler(config), config, preview_steps(run))


def _save_best(run: Run, record: dict[str, Any]) -> None:
    description = run.output_dir / "best/best.json"

    if run.is_main:
        # It describes the model that is replaced now. A run that is killed in between leaves a model without figures.
        try_to_write(run, lambda: description.unlink(missing_ok=True))
    if save_model(run, run.average, description.parent):
        try_to_write(run, lambda: write_atomically(description, json.dumps(record, indent=2) + "\n"))


def _track_sheet(tracker: Any, sheet: Image.Image, step: int) -> None:
    if tracker.name == "trackio":  # of which Accelerate tracks no images
        import trackio  # pyright: ignore[reportMissingImports]

        tracker.log({"samples": trackio.Image(sheet.convert("RGB"))}, step=step)
    elif hasattr(tracker, "log_images"):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": np.asarray(sheet.convert("RGB"))[None]}, step=step, **layout)
        if tracker.name == "tensorboard":
            tracker.tracker.flush()  # as Accelerate does after numbers: a run that is killed must not lose it
