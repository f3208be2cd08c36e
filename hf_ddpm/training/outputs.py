"""What a run writes besides metrics and checkpoints: previews, measurements, models, snapshots, and its report."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from hf_ddpm import figures
from hf_ddpm.hub.upload import KEPT_README, push, repository_of
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.files import lock, write_atomically
from hf_ddpm.runtime.run_files import previews, run_files
from hf_ddpm.sampling.sampler import default_scheduler, default_steps, named_scheduler, sample_shared
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training import sharding
from hf_ddpm.training.averages import swapped
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig, save_config
from hf_ddpm.training.metrics import MetricsFile, cut_metrics, read_metrics
from hf_ddpm.training.posthoc import TRACKED_STDS, snapshot_bytes, snapshot_path, snapshots
from hf_ddpm.training.report import write_report
from hf_ddpm.training.run import FINISHES, FREE_SPACE, Run, say
from hf_ddpm.training.sharding import gathered
from hf_ddpm.training.validation import OF_COURSE, Monitor, measure

LAST_PAUSES_SECONDS = (2.0, 10.0)  # between attempts to push the finished run,
LONGEST_PUSH_SECONDS = 600.0  # for which one that is on its way has so long to arrive
# How the names of the averages begin that are saved as models; the others are for snapshots.
HALFLIFE = "halflife-"


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


def save_preview(run: Run, step: int) -> Image.Image:
    """Samples from seeds 0, 1, ..., the same at each step and for any number of processes, as one sheet."""
    config, accelerator, unet, images = run.config, run.accelerator, run.state.unet, run.images
    pipeline = DDPMPipeline(unet, _preview_scheduler(run))
    pipeline.set_progress_bar_config(disable=True)
    num_images = config.eval_batch_size
    labels = [i % images.num_classes for i in range(num_images)] if images.num_classes else None
    unet.eval()
    precision = sharding.autocast(accelerator.device, config.mixed_precision)
    with swapped(run.parameters, run.average or run.parameters), precision:
        samples = sample_shared(
            accelerator,
            pipeline,
            range(num_images),
            batch_size=-(-num_images // accelerator.num_processes),
            num_inference_steps=_preview_steps(run),
            class_labels=labels,
        )
        sharding.reshard(unet)
    unet.train()
    sheet = figures.grid(figures.to_images(2 * samples - 1))
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


def write_measurement(run: Run, monitor: Monitor, progress: Progress, evaluations: MetricsFile) -> None:
    """A line of eval.jsonl; the model of the least kernel distance so far is kept in `best`."""
    unet, accelerator, path = run.state.unet, run.accelerator, evaluations.path
    pipeline = DDPMPipeline(unet, _preview_scheduler(run))
    pipeline.set_progress_bar_config(disable=True)
    unet.eval()
    precision = sharding.autocast(accelerator.device, run.config.mixed_precision)
    with swapped(run.parameters, run.average or run.parameters), precision:
        measured = measure(monitor, accelerator, pipeline, run.objective, _preview_steps(run))
        sharding.reshard(unet)
    unet.train()
    lines = run.processes.only_first(lambda: [*read_metrics(path), *map(json.loads, evaluations.waiting)])
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
    averages = {std: gathered(run.names, run.state.ema.averages[f"std-{std:g}"]) for std in TRACKED_STDS}
    path = snapshot_path(run.output_dir, progress.images)
    if run.accelerator.is_main_process:
        try_to_write(run, lambda: write_atomically(path, snapshot_bytes(progress.images, averages)))


def finish(run: Run, progress: Progress) -> DDPMPipeline:
    """Writes what a finished run leaves; a run that is finished already writes the same again."""
    config, output_dir = run.config, run.output_dir
    saved = [save_model(run, run.average, output_dir)]
    for name, average in list(run.state.ema.averages.items() if run.state.ema is not None else ())[1:]:
        if name.startswith(HALFLIFE):
            saved.append(save_model(run, average, output_dir / "ema" / name))
    if not run.processes.only_first(lambda: all(saved)):
        raise RunError(f"the model could not be written, its last checkpoint is whole. {FREE_SPACE}; {FINISHES}")
    samples = save_preview(run, progress.step)
    averaged: Any = _averaged_unet(run, run.average)
    pipeline = DDPMPipeline(averaged.to(run.accelerator.device), DDPMScheduler.from_config(run.scheduler.config))

    def write() -> None:
        samples.save(output_dir / "figures" / "samples.png")
        sampled = {
            "scheduler": type(_preview_scheduler(run)).__name__,
            "num_inference_steps": _preview_steps(run),
            "seed": 0,
            "ema": config.use_ema,
        }
        write_report(config, pipeline, run.images, progress, run.global_batch_size, sampled, run.accelerator)

    try:
        run.processes.only_first(write)
    except (OSError, UsageError) as error:  # the latter of a file that somebody edits, with its own remedy
        remedy = "" if isinstance(error, UsageError) else f". {FREE_SPACE}"
        raise RunError(f"the report could not be written: {error}{remedy}; {FINISHES}") from error
    return pipeline


def start_push(run: Run, progress: Progress) -> None:
    """The model as it was saved last goes to the Hub, while training goes on."""
    if run.pusher is not None:
        pusher, message = run.pusher, f"Step {progress.step:,}, {progress.images:,} images"
        pngs = [path for _, path in previews(run.output_dir)]
        try_to_write(run, lambda: pusher.start(message, pngs[-1] if pngs else None))


def push_finished(run: Run) -> None:
    """A failure is said, and harms nothing that was trained; for all processes to call, none of which waits."""
    if run.pusher is None:
        return
    run.pusher.close(LONGEST_PUSH_SECONDS)
    repo_id, token, revision = repository_of(run.config)
    for pause in (*LAST_PAUSES_SECONDS, None):
        try:
            pushed = push(
                run.output_dir,
                repo_id,
                public=not run.config.hub_private_repo,
                revision=revision,
                token=token,
                averages=run.config.hub_averages,
            )
        except Exception as error:  # the model is safe
            if pause is not None and getattr(error, "is_passing", False):
                time.sleep(pause)
                continue
            command = ["hf-ddpm", "push", str(run.output_dir), repo_id]
            command += [] if run.config.hub_private_repo else ["--public"]
            command += [] if revision == "main" else ["--revision", revision]
            command += ["--averages"] if run.config.hub_averages else []
            say(
                run.processes,
                f"the model is whole in {str(run.output_dir)!r}, but was not pushed: {error}. "
                f"{shlex.join(command)} does it later",
            )
        else:
            say(run.processes, f"{pushed.url}: {pushed.commit[:12]}")
            if pushed.kept_readme:
                say(run.processes, KEPT_README)
        return


def try_to_write(run: Run, write: Callable[[], None]) -> bool:
    """Whether it could be written. Without it the run can go on, so it does where the disk is full."""
    try:
        write()
        return True
    except (OSError, SafetensorError) as error:
        say(run.processes, f"a file could not be written, the run goes on: {error}. {FREE_SPACE}")
        return False


def try_to_track(run: Run, track: Callable[[], None]) -> None:
    """Trackers raise what they like: nothing that happens in one may end a training."""
    try:
        track()
    except Exception as error:
        say(run.processes, f"a tracker failed, the run goes on: {error!r}")


def _averaged_unet(run: Run, average: list[Tensor] | None) -> UNet2DModel:
    """The network with averaged weights, or its own, on the CPU; for all processes to call."""
    unet = run.state.unet
    weights = gathered(run.names, run.parameters if average is None else average)
    buffers = {name: buffer.cpu() for name, buffer in unet.named_buffers() if name in unet.state_dict()}
    with torch.device("meta"):
        averaged: Any = UNet2DModel.from_config(unet.config)
    averaged.load_state_dict({**buffers, **weights}, assign=True)
    return averaged.eval()


def _preview_scheduler(run: Run) -> Any:
    config = run.scheduler.config
    return named_scheduler(default_scheduler(config), config, _preview_steps(run))


def _preview_steps(run: Run) -> int:
    config = run.scheduler.config
    return run.config.ddpm_num_inference_steps or default_steps(
        default_scheduler(config), config["num_train_timesteps"]
    )
