"""What a run needs before its first step: the data, the state to go on from, and all that is decided once."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from hf_ddpm.data.cache import ImageCache, load_images
from hf_ddpm.data.shards import ImageStream, open_stream
from hf_ddpm.hub.background import Pusher
from hf_ddpm.network import compiled, make_unet
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.processes import Processes, share_cores
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training import sharding
from hf_ddpm.training.averages import EMA, edm_decay, halflife_from_decay, ramped_decay
from hf_ddpm.training.checkpoint import Progress, TrainingState, find_checkpoint, load_checkpoint, read_progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.finetuning import load_weights, network_of, take_over
from hf_ddpm.training.folder import prepare_output
from hf_ddpm.training.optimizer import make_optimizer
from hf_ddpm.training.parsing import check_same_run
from hf_ddpm.training.posthoc import TRACKED_STDS, power_decay
from hf_ddpm.training.publishing import create_for_run, repository_of
from hf_ddpm.training.run import FREE_SPACE, Run, say
from hf_ddpm.training.saving import HALFLIFE
from hf_ddpm.training.sharding import AUTOCAST
from hf_ddpm.training.validation import check_course, open_monitor

if TYPE_CHECKING:
    from accelerate import Accelerator


def set_up(config: TrainingConfig, accelerator: Accelerator, processes: Processes) -> tuple[Run, Progress]:
    """The run and where it goes on; nothing of it is written before `claim`.

    Raises:
        UsageError: settings or data that cannot work.
    """
    sharding.check(accelerator, config)
    asked = config
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and accelerator.mixed_precision == "fp16":
        raise UsageError("mixed_precision fp16 needs a GPU: its gradients are scaled there only; use bf16 or no")
    if on_cpu:
        share_cores(accelerator.num_processes, config.cpu_threads_per_process)

    def load() -> tuple[TrainingConfig, ImageCache | ImageStream]:
        taken = take_over(asked)
        return taken, open_stream(taken) if taken.streaming else load_images(taken)

    config, images = processes.local_main_then_rest(load, accelerator.is_local_main_process)
    processes.require_equal(images.fingerprint, "images")
    config = _resolve(config, images, accelerator.mixed_precision)
    checkpoint, progress = _find_progress(config, processes, images)
    if progress is not None:
        config = _divide(config, progress.global_batch_size, processes)
    num_processes = processes.size
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

    most = (images.num_images or 0) - global_batch_size
    if config.stable_target_images > max(0, most):
        raise UsageError(
            f"stable_target_images must be at most {max(0, most)}, got {config.stable_target_images}: the data are "
            f"{images.num_images} images, of which a step takes {global_batch_size}; 0 turns it off"
        )

    monitor = open_monitor(config, images, accelerator.device, processes) if config.eval_steps is not None else None
    scheduler = make_scheduler(config)
    network = None
    if checkpoint is not None and config.model_config_name_or_path is None:
        # Where this version makes another network for the data, or the model lies elsewhere, the run keeps its own.
        network = checkpoint / "unet"
    elif config.init_from is not None:
        network = network_of(config.init_from)
    new_unet = make_unet(
        images.channels,
        images.resolution,
        images.num_classes,
        model_config=config.model_config_name_or_path if network is None else str(network),
        variance_type=config.variance_type,
        dropout=None if config.model_config_name_or_path or config.init_from else config.dropout,
        seed=config.seed,
    )
    if config.gradient_checkpointing:
        new_unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        new_unet.enable_xformers_memory_efficient_attention()
    if network is not None and checkpoint is None:
        load_weights(new_unet, network)
    optimizer = make_optimizer(new_unet, config)
    model, prepared = sharding.prepare(accelerator, new_unet, optimizer, config, partial(say, processes))
    unet: Any = accelerator.unwrap_model(model)
    if config.compile:
        # Its config grows when diffusers first writes it, and would be compiled for once more after a checkpoint.
        unet.to_json_string()
        # Beside the network, whose own forward pass is not compiled: previews have another shape.
        model = compiled(model, unet, accelerator.device)
    decays = _decays(config, schedule_batch_size)
    ema = EMA(list(unet.parameters()), list(decays(0, global_batch_size))) if config.use_ema else None
    state = TrainingState(unet, prepared.optimizer, ema)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
        progress = replace(progress, num_resumes=progress.num_resumes + 1)
        if accelerator.scaler is not None and progress.scaler is not None:
            accelerator.scaler.load_state_dict(progress.scaler)
    lr_factor = _lr_factor(config, num_steps)
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= num_steps:
        say(
            processes,
            f"lr_warmup_steps should be less than the {num_steps} steps of the run, got {config.lr_warmup_steps}: "
            f"the learning rate never reaches {config.peak_learning_rate:g}",
        )
    run = Run(
        config=config,
        output_dir=Path(config.output_dir),
        accelerator=accelerator,
        processes=processes,
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
            noise_level_mean=config.noise_level_mean,
            noise_level_std=config.noise_level_std,
            autocast_dtype=AUTOCAST[config.mixed_precision or "no"],
        ),
        monitor=monitor,
        pusher=None,
        schedule=lambda images_seen: config.peak_learning_rate * lr_factor(images_seen / schedule_batch_size),
        decays=decays,
        total_images=total_images,
        global_batch_size=global_batch_size,
    )
    return run, progress


def claim(run: Run, progress: Progress, until_the_end: ExitStack) -> Run:
    """The run with an output folder, trackers and a repository of its own: the first things that it writes.

    Args:
        until_the_end: what has to be undone when the run is over.

    Raises:
        UsageError: it cannot have them.
    """
    config, processes, output_dir = run.config, run.processes, run.output_dir
    # config.yaml has the batch that was asked for, not how these processes divide it.
    asked = replace(
        config,
        train_batch_size=progress.train_batch_size,
        gradient_accumulation_steps=progress.gradient_accumulation_steps,
    )
    if config.push_to_hub:
        processes.on_main(lambda: create_for_run(config, partial(say, processes)))
    try:
        processes.on_main(lambda: prepare_output(asked, output_dir, progress, until_the_end))
    except BlockingIOError as error:
        raise UsageError(f"output_dir must be of one run at a time, got {config.output_dir!r}: {error}") from error
    except OSError as error:
        message = f"output_dir must be writable, got {config.output_dir!r}: {error}. {FREE_SPACE}"
        raise UsageError(message) from error
    if config.push_to_hub and processes.rank == 0:
        public = not config.hub_private_repo
        pusher = Pusher(output_dir, *repository_of(config), public, partial(say, processes))
        until_the_end.callback(pusher.close, seconds=0)
        run = replace(run, pusher=pusher)
    if config.logger is not None:
        try:
            processes.gather(lambda: run.accelerator.init_trackers(output_dir.name, config=_tracked(config)))
        except Exception as error:  # without a login, a network, a folder; none has a common type
            if progress.step == 0 and processes.rank == 0:
                (output_dir / "config.yaml").unlink()  # so that the same command may begin again
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"logger must be able to start, got {config.logger!r}: {reason}") from error
    return run


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


def _find_progress(
    config: TrainingConfig, processes: Processes, images: ImageCache | ImageStream
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
        check_course(config, output_dir / "eval.jsonl")
    checkpoint, passed_over = processes.on_main(lambda: find_checkpoint(output_dir, name))
    for problem in passed_over:
        say(processes, problem)
    if checkpoint is None:
        say(processes, f"{config.output_dir} holds no checkpoint: the run begins at step 0")
        return None, None
    progress = read_progress(checkpoint)
    if progress.data_fingerprint != images.fingerprint:
        raise UsageError(
            f"{checkpoint.name} was trained on other images ({progress.num_images} with fingerprint "
            f"{progress.data_fingerprint[:12]}, here {images.num_images} with {images.fingerprint[:12]}): "
            "give the data set and settings of its config.yaml"
        )
    say(processes, f"the run goes on from {checkpoint.name}, after {progress.images} images")
    asked = {name: getattr(config, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
    if any(value != getattr(progress, name) for name, value in asked.items()):  # changed on purpose
        wanted = config.train_batch_size * config.gradient_accumulation_steps * processes.size
        if wanted != progress.global_batch_size:
            _say_new_batch(processes, progress.global_batch_size, wanted)
        progress = replace(progress, global_batch_size=wanted, **asked)
    return checkpoint, progress


def _divide(config: TrainingConfig, global_batch_size: int, processes: Processes) -> TrainingConfig:
    """The config with the batch and accumulation by which these processes keep the global batch, if they can."""
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    num_processes = processes.size
    if batch_size * accumulation * num_processes == global_batch_size:
        return config
    share, rest = divmod(global_batch_size, num_processes)
    if rest == 0:
        batch_size = next(size for size in range(min(batch_size, share), 0, -1) if share % size == 0)
        accumulation = share // batch_size
        say(
            processes,
            f"{num_processes} processes keep {global_batch_size} images per step by train_batch_size {batch_size} "
            f"and gradient_accumulation_steps {accumulation}",
        )
    else:
        accumulation = max(1, round(global_batch_size / (batch_size * num_processes)))
        _say_new_batch(processes, global_batch_size, batch_size * accumulation * num_processes)
    return replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)


def _say_new_batch(processes: Processes, before: int, now: int) -> None:
    say(
        processes,
        f"the global batch changes from {before} to {now} images; learning rate, averages and the end of the run "
        "stay functions of the images seen",
    )


def _resolve(config: TrainingConfig, images: ImageCache | ImageStream, mixed_precision: str) -> TrainingConfig:
    """The config with what the data and the launcher decided."""
    return replace(
        config,
        dataset_name=config.dataset_name or (None if config.train_data_dir else "digits"),
        resolution=images.resolution,
        channels=images.channels,
        mixed_precision=mixed_precision,
    )


def _lr_factor(config: TrainingConfig, num_steps: int) -> Any:
    """diffusers' schedule as a function of the optimizer step: nothing steps it, so nothing can step it too often."""
    # `polynomial` ends at a rate of its own, which it divides by this one.
    unused = torch.optim.SGD([torch.zeros(1)], lr=config.peak_learning_rate)
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


def _tracked(config: TrainingConfig) -> dict[str, Any]:
    settings = {**asdict(config), "learning_rate": config.peak_learning_rate}
    del settings["hub_token"]
    return {k: v if isinstance(v, int | float | str) else "" if v is None else str(v) for k, v in settings.items()}
