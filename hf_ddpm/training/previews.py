"""Pictures and measurements while a model trains, of the weights that would be saved."""

from __future__ import annotations

import io
import json
import math
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from hf_ddpm import figures
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.files import read_metrics, write_atomically
from hf_ddpm.sampling.sampler import classes_in_turn, sample_all
from hf_ddpm.sampling.schedulers import default_scheduler, default_steps, named_scheduler
from hf_ddpm.training import sharding
from hf_ddpm.training.averages import swapped
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.metrics import MetricsFile
from hf_ddpm.training.run import FREE_SPACE, Run, say, try_to_track, try_to_write
from hf_ddpm.training.saving import save_model
from hf_ddpm.training.validation import OF_COURSE, Monitor, measure


def save_preview(run: Run, step: int) -> Image.Image:
    """Samples from seeds 0, 1, ..., the same at each step and for any number of processes, as one sheet."""
    config, accelerator, unet, images = run.config, run.accelerator, run.state.unet, run.images
    pipeline = DDPMPipeline(unet, _preview_scheduler(run))
    pipeline.set_progress_bar_config(disable=True)
    num_images = config.eval_batch_size
    labels = classes_in_turn(images.num_classes, range(num_images))
    unet.eval()
    precision = sharding.autocast(accelerator.device, config.mixed_precision)
    with swapped(run.parameters, run.average or run.parameters), precision:
        samples = sample_all(
            pipeline,
            range(num_images),
            run.processes,
            batch_size=-(-num_images // accelerator.num_processes),
            num_inference_steps=_preview_steps(run),
            class_labels=labels,
        )
        sharding.reshard(unet)
    unet.train()
    sheet = figures.grid(figures.to_images(samples / 127.5 - 1))
    if accelerator.is_main_process:
        content = io.BytesIO()
        sheet.save(content, "png")
        try_to_write(
            run, lambda: write_atomically(run.output_dir / f"previews/step-{step:07d}.png", content.getvalue())
        )
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                pixels = {"samples": np.asarray(sheet.convert("RGB"))[None]}
                try_to_track(run, partial(tracker.log_images, pixels, step=step, **layout))
    return sheet


def _preview_scheduler(run: Run) -> Any:
    config = run.scheduler.config
    return named_scheduler(default_scheduler(config), config, _preview_steps(run))


def _preview_steps(run: Run) -> int:
    config = run.scheduler.config
    return run.config.ddpm_num_inference_steps or default_steps(
        default_scheduler(config), config["num_train_timesteps"]
    )


def write_measurement(run: Run, monitor: Monitor, progress: Progress, evaluations: MetricsFile) -> None:
    """A line of eval.jsonl; the model of the least kernel distance so far is kept in `best`."""
    unet, accelerator, path = run.state.unet, run.accelerator, evaluations.path
    pipeline = DDPMPipeline(unet, _preview_scheduler(run))
    pipeline.set_progress_bar_config(disable=True)
    unet.eval()
    precision = sharding.autocast(accelerator.device, run.config.mixed_precision)
    with swapped(run.parameters, run.average or run.parameters), precision:
        measured = measure(monitor, run.processes, pipeline, run.objective, _preview_steps(run))
        sharding.reshard(unet)
    unet.train()
    lines = run.processes.on_main(lambda: [*read_metrics(path), *map(json.loads, evaluations.waiting)])
    before = [line["kid"] for line in lines if line["kid"] is not None]
    record = {"step": progress.step, "images": progress.images, **measured}
    record |= {name: getattr(run.config, name) for name in OF_COURSE}
    if accelerator.is_main_process:
        problem = evaluations.write(record)
        if problem is not None:
            say(run.processes, f"eval.jsonl cannot be written now, its lines wait: {problem}. {FREE_SPACE}")
    tracked = {k: measured[k] for k in ("kid", "val_loss") if measured[k] is not None}
    try_to_track(run, lambda: accelerator.log(tracked, step=progress.step))
    if measured["kid"] is not None and measured["kid"] <= min(before, default=math.inf):
        of_best = run.output_dir / "best/best.json"

        def describe() -> None:
            of_best.unlink(missing_ok=True)  # it is of the model that was there before
            write_atomically(of_best, json.dumps(record, indent=2) + "\n")

        if save_model(run, run.average, of_best.parent):
            try_to_write(run, describe)
