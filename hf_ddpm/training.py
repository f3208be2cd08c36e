"""train(config): the loop.

Step k sees the images at positions kG, ..., kG + G - 1 of an endless stream (G the global batch). Of these, process r
of P takes in its forward pass a the B = train_batch_size images from kG + (aP + r)B. The order of the stream, crops
and flips, t and eps are functions of (seed, position), learning rate and EMA decay of the images seen, so neither a
run's process count nor its accumulation changes what it computes beyond rounding, and resuming replays nothing. Only
dropout, which draws for whole tensors, is a function of (seed, step, slot) and differs with them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_ddpm import figures
from hf_ddpm.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from hf_ddpm.config import TrainingConfig, UsageError, check_config, check_same_run, run_files, save_config
from hf_ddpm.data import ImageCache, MicroBatches, load_images, to_x_0
from hf_ddpm.ema import EMA, ema_decay, halflife_from_decay
from hf_ddpm.objective import Objective
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.report import push, read_metrics, write_report
from hf_ddpm.sampling import default_scheduler, named_scheduler, sample_shared
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.sources import check_source
from hf_ddpm.unet import make_unet

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: TrainingConfig) -> DDPMPipeline:
    """Trains a model; `output_dir` then holds a diffusers pipeline, its card, figures and checkpoints.

    Each process of a distributed run calls it with the same config.

    Returns: the pipeline with the averaged weights.

    Raises:
        UsageError: before anything is written, settings or data that cannot work.
    """
    check_config(config)
    check_source(config)
    output_dir = Path(config.output_dir)
    # A second run in one process, of a notebook, may ask for another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.logger,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(output_dir / config.logging_dir)),
        # The others wait while one process decodes the images, or writes the report.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise UsageError("mixed_precision fp16 needs a GPU: its gradients are scaled there only; use bf16 or no")
    if accelerator.device.type == "cpu":
        _set_threads(config, accelerator)
    with accelerator.local_main_process_first():
        images = load_images(config)
    config = _resolve(config, images, accelerator.mixed_precision)
    if config.resume_from_checkpoint is not None:
        check_same_run(config, output_dir / "config.yaml")
    scheduler = make_scheduler(config)
    new_unet = make_unet(config, images.channels, images.resolution, images.num_classes)
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    num_steps = config.max_train_steps or math.ceil(config.num_epochs * len(images) / global_batch)
    steps_per_epoch = len(images) / global_batch

    optimizer = torch.optim.AdamW(
        new_unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    lr_factor = _lr_factor(config, num_steps)
    model, optimizer = accelerator.prepare(new_unet, optimizer)
    unet: Any = accelerator.unwrap_model(model)
    ema = EMA(unet) if config.use_ema else None
    averaged: Any = unet if ema is None else ema.module
    halflife = config.ema_halflife_images or halflife_from_decay(config.ema_max_decay, global_batch)
    progress = Progress(0, 0.0, 0, global_batch, images.fingerprint)
    if config.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
        progress = load_checkpoint(accelerator, ema, checkpoint, progress)
        if progress.step >= num_steps:
            raise UsageError(f"{checkpoint.name} has done all of max_train_steps = {num_steps}: give more to go on")
    if accelerator.is_main_process:
        _prepare_output(config, output_dir, progress.step)
    if config.logger is not None:
        accelerator.init_trackers(output_dir.name, config=_tracked(config))
    accelerator.wait_for_everyone()

    objective = Objective(
        scheduler=scheduler,
        weighting=config.loss_weighting,
        min_snr_gamma=config.min_snr_gamma,
        density=config.timestep_density,
        autocast_dtype=AUTOCAST[accelerator.mixed_precision],
    )
    preview = _preview_pipeline(config, averaged, scheduler)
    every = {
        "image": _interval(config.save_images_epochs, steps_per_epoch, config.checkpointing_steps),
        "model": _interval(config.save_model_epochs, steps_per_epoch, config.checkpointing_steps),
        "checkpoint": config.checkpointing_steps,
    }
    batches = _batches(config, images, accelerator, progress.step, num_steps)
    meter = _Meter(accelerator, progress.seconds)
    bar = tqdm(initial=progress.step, total=num_steps, disable=not accelerator.is_local_main_process)
    started, seconds_before = time.perf_counter(), progress.seconds
    model.train()
    for step in range(progress.step, num_steps):
        for micro in range(config.gradient_accumulation_steps):
            batch = next(batches)
            pixels = batch["pixels"].to(accelerator.device, non_blocking=True)
            labels = batch["labels"].to(accelerator.device, non_blocking=True) if "labels" in batch else None
            positions = batch["positions"].numpy()
            slot = micro * accelerator.num_processes + accelerator.process_index
            # Dropout draws from the global generator.
            torch.manual_seed(int(_seeds(config.seed, np.array([step]), stream=2 + slot)[0]))
            is_last = micro == config.gradient_accumulation_steps - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                loss, _ = objective(
                    model,
                    to_x_0(pixels, images.max_value),
                    image_generators(config.seed, positions, accelerator.device),
                    labels,
                    stratum=(slot * config.train_batch_size, global_batch),
                )
                accelerator.backward(loss.mean() / config.gradient_accumulation_steps)
            meter.add(loss)
        grad_norm: Any = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        lr = config.learning_rate * lr_factor(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        decay = ema_decay(step * global_batch, global_batch, halflife, config.ema_inv_gamma, config.ema_power)
        if ema is not None:
            ema.update(unet, decay)

        done = step + 1
        bar.update()
        progress = replace(progress, step=done, seconds=seconds_before + time.perf_counter() - started)
        if done % config.logging_steps == 0 or done == num_steps:
            record: dict[str, Any] = {"step": done, "images": done * global_batch, **meter.read(progress.seconds)}
            norm = float(grad_norm)
            record |= {
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
                "ema_decay": decay if ema else None,
            }
            bar.set_postfix(loss=f"{record['loss']:.4f}", images_s=f"{record['images_per_second']:.0f}")
            _log(accelerator, output_dir, record)
        if done % every["image"] == 0 and done < num_steps:
            _save_preview(accelerator, config, preview, images, output_dir, done)
        if done % every["checkpoint"] == 0 or done == num_steps:
            save_checkpoint(accelerator, ema, progress, output_dir, config.checkpoints_total_limit)
        if (done % every["model"] == 0 or done == num_steps) and accelerator.is_main_process:
            _save_model(averaged, scheduler, output_dir)
    bar.close()
    progress = replace(progress, seconds=seconds_before + time.perf_counter() - started)

    samples = _save_preview(accelerator, config, preview, images, output_dir, num_steps)
    averaged.eval()
    pipeline = DDPMPipeline(averaged, DDPMScheduler.from_config(scheduler.config))
    if accelerator.is_main_process:
        samples.save(output_dir / "figures" / "samples.png")
        sampled = {
            "scheduler": type(preview.scheduler).__name__,
            "num_inference_steps": _preview_steps(config),
            "seed": 0,
            "ema": config.use_ema,
        }
        write_report(config, pipeline, images, progress, sampled, accelerator)
        if config.push_to_hub:
            push(config, progress.step)
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


def image_generators(seed: int, positions: np.ndarray, device: torch.device) -> list[torch.Generator]:
    """One generator for each image of the stream: its t and eps do not depend on the batch it is in."""
    return [torch.Generator(device).manual_seed(int(s)) for s in _seeds(seed, positions, stream=1)]


def _seeds(seed: int, index: np.ndarray, stream: int) -> np.ndarray:
    """Seeds that are a hash of (seed, stream, index); generators use their low 32 bits."""
    x = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64) + index.astype(np.uint64)
    # The finalizer of SplitMix64 (Steele et al. 2014): neighbors share no bits.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _set_threads(config: TrainingConfig, accelerator: Accelerator) -> None:
    # `accelerate launch` gives each process one thread unless told otherwise, and leaves the other cores idle.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
    if config.cpu_threads_per_process is not None:
        torch.set_num_threads(config.cpu_threads_per_process)
    elif os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, available // processes))


class _Meter:
    """Loss and speed since the last reading; nothing leaves the device until then."""

    def __init__(self, accelerator: Accelerator, seconds: float):
        self.accelerator = accelerator
        self.sum = torch.zeros((), device=accelerator.device)
        self.count = 0
        self.seconds = seconds

    def add(self, loss: Tensor) -> None:
        self.sum += loss.detach().sum()
        self.count += len(loss)

    def read(self, seconds: float) -> dict[str, float]:
        """Mean loss over all processes, the run's seconds and its images per second."""
        count = self.count * self.accelerator.num_processes
        total: Any = self.accelerator.reduce(self.sum, reduction="sum")
        loss, speed = float(total) / count, count / (seconds - self.seconds)
        self.sum.zero_()
        self.count, self.seconds = 0, seconds
        return {"loss": loss, "seconds": round(seconds, 3), "images_per_second": round(speed, 3)}


def _resolve(config: TrainingConfig, images: ImageCache, mixed_precision: str) -> TrainingConfig:
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
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(
        config.lr_scheduler, unused, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
    )
    return schedule.lr_lambdas[0]


def _interval(epochs: int | None, steps_per_epoch: float, default_steps: int) -> int:
    return default_steps if epochs is None else max(1, round(epochs * steps_per_epoch))


def _batches(
    config: TrainingConfig, images: ImageCache, accelerator: Accelerator, first_step: int, num_steps: int
) -> Iterator[dict[str, Tensor]]:
    dataset = MicroBatches(
        images,
        seed=config.seed,
        random_flip=config.random_flip,
        batch_size=config.train_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_step=first_step,
        num_steps=num_steps,
    )
    loader = DataLoader(
        dataset,
        batch_size=None,
        shuffle=False,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


def _preview_pipeline(config: TrainingConfig, unet: UNet2DModel, scheduler: DDPMScheduler) -> DDPMPipeline:
    name = default_scheduler(scheduler.config)
    pipeline = DDPMPipeline(unet, named_scheduler(name, scheduler.config, _preview_steps(config)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _save_preview(
    accelerator: Accelerator,
    config: TrainingConfig,
    preview: DDPMPipeline,
    images: ImageCache,
    output_dir: Path,
    step: int,
) -> Image.Image:
    """Samples from seeds 0, 1, ..., the same at each step and for any number of processes, as one sheet."""
    num_images = config.eval_batch_size
    labels = [i % images.num_classes for i in range(num_images)] if images.num_classes else None
    was_training = preview.unet.training
    preview.unet.eval()
    with accelerator.autocast():
        samples = sample_shared(
            accelerator,
            preview,
            range(num_images),
            batch_size=-(-num_images // accelerator.num_processes),
            num_inference_steps=_preview_steps(config),
            class_labels=labels,
        )
    preview.unet.train(was_training)
    sheet = figures.grid(figures.to_images(2 * samples - 1))
    if accelerator.is_main_process:
        sheet.save(output_dir / "previews" / f"step-{step:07d}.png")
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(sheet.convert("RGB"))[None]}, step=step, **layout)
    return sheet


def _save_model(unet: UNet2DModel, scheduler: DDPMScheduler, output_dir: Path) -> None:
    DDPMPipeline(unet, DDPMScheduler.from_config(scheduler.config)).save_pretrained(output_dir)


def _prepare_output(config: TrainingConfig, output_dir: Path, first_step: int) -> None:
    """An output folder with the run's config, and metrics up to the step it goes on from."""
    if config.overwrite_output_dir:
        for path in run_files(output_dir):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    for folder in (output_dir, output_dir / "previews", output_dir / "figures"):
        folder.mkdir(parents=True, exist_ok=True)
    save_config(config, output_dir / "config.yaml")
    metrics = output_dir / "metrics.jsonl"
    kept = [record for record in read_metrics(output_dir) if record["step"] <= first_step]
    partial = metrics.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    partial.replace(metrics)


def _log(accelerator: Accelerator, output_dir: Path, record: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        with (output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    accelerator.log({k: v for k, v in record.items() if k != "step" and v is not None}, step=record["step"])


def _tracked(config: TrainingConfig) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(config).items() if k != "hub_token"}
    return {k: "" if v is None else v for k, v in settings.items()}
