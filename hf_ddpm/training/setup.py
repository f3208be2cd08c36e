"""What a run needs before its first step: data, resumed state, network, optimizer, and all that is decided once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from hf_ddpm.classes import Classes
from hf_ddpm.condition import Condition
from hf_ddpm.data.cache import ImageCache, load_dataset, load_images
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.given import GivenImages
from hf_ddpm.data.labels import labels_of, with_network_labels
from hf_ddpm.data.shards import ImageStream, open_stream
from hf_ddpm.data.splits import check_split
from hf_ddpm.evaluation.features import check_network
from hf_ddpm.hub.background import Pusher
from hf_ddpm.hub.card import check_readme, write_card
from hf_ddpm.labels import (
    Labels,
    Values,
    describe_labels,
    on_scales,
    read_labels,
    scales_of,
    structure_of,
    takes_floats,
)
from hf_ddpm.network import compile_network, make_unet, num_classes_of
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.devices import require_compiler
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.processes import Processes, share_cores
from hf_ddpm.runtime.run_files import REPLACED_RUN
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training import sharding
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.checkpoint import Progress, TrainingState, find_checkpoint, load_checkpoint, read_progress
from hf_ddpm.training.conditions import condition_of
from hf_ddpm.training.config import CLASS_DROPOUT, TrainingConfig
from hf_ddpm.training.finetuning import is_conditional_network, load_weights, network_of, take_over
from hf_ddpm.training.folder import prepare_folder, restore_replaced, set_aside
from hf_ddpm.training.optimizer import make_optimizer
from hf_ddpm.training.parsing import check_same_run
from hf_ddpm.training.parts import Parts, check_given_network
from hf_ddpm.training.publishing import create_run_repository, repository_of
from hf_ddpm.training.run import FREE_SPACE, Run, print_once, send_alert, try_to_write
from hf_ddpm.training.schedules import average_decays, learning_rate_schedule
from hf_ddpm.training.tracking import finish_trackers, start_trackers
from hf_ddpm.training.trial import network_source, try_run
from hf_ddpm.training.validation import check_validation_settings, open_validation
from hf_ddpm.value_range import ValueRange

# The longest that processes wait while one of them decodes the images, or writes the report.
LONGEST_WAIT = timedelta(hours=2)

# What Accelerate keeps for the whole process beside the devices and their processes.
_ACCELERATE_STATES = (AcceleratorState, GradientState)

Images = ImageCache | ImageStream | GivenImages


@dataclass(frozen=True)
class _Start:
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


@contextmanager
def restored_process() -> Iterator[None]:
    """Leave the process as it was, however a `with` block ends: Accelerate's state, torch's number of threads.

    A notebook goes on after a run, also after one that failed. Its next run may ask for another precision, as may an
    `Accelerator` of the user's own, and one that the user has made before still works.
    """
    states, num_threads = [dict(kind._shared_state) for kind in _ACCELERATE_STATES], torch.get_num_threads()
    try:
        yield
    finally:
        for kind, state in zip(_ACCELERATE_STATES, states, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)
        torch.set_num_threads(num_threads)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Make Accelerate's view of this process, whatever the process did with Accelerate before; it writes nothing."""
    for kind in _ACCELERATE_STATES:
        kind._reset_state()
    logging_dir = str(Path(config.output_dir) / config.logging_dir)
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=[*config.logger.split(",")] if config.logger else None,  # pyright: ignore[reportArgumentType]
        project_config=ProjectConfiguration(config.output_dir, logging_dir=logging_dir),
        # Accelerate chooses the backend by the device when it is None.
        kwargs_handlers=[InitProcessGroupKwargs(backend=None, timeout=LONGEST_WAIT)],
    )


def build_run(
    config: TrainingConfig, accelerator: Accelerator, processes: Processes, parts: Parts
) -> tuple[Run, Progress]:
    """Build the run and return it with the progress that it starts from; nothing is written before `open_run`.

    Raises:
        UsageError: Settings or data cannot work.
    """
    sharding.check(accelerator)
    _check_device(config, accelerator)
    config, images = _load_images(config, accelerator, processes, parts)
    if images.value_range is not None:
        _check_arrays(config, images.value_range)
    start = _find_start(config, images, processes)
    config, progress = start.config, start.progress
    _check_extra_images(config, images, start.global_batch_size)
    condition = condition_of(config, images)
    labels = _labels_of(config, images, parts.network)
    labels = _on_scales_of_start(config, labels, start)
    progress = replace(progress, label_scales=scales_of(labels))
    images = with_network_labels(images, labels)
    validation = None
    if config.eval_steps is not None:
        validation = open_validation(config, images, labels, condition, processes, accelerator.device)
    scheduler = make_scheduler(config)
    objective = _make_objective(config, scheduler, images, labels)
    new_unet = _make_unet(config, images, labels, condition, start.checkpoint, parts.network)
    optimizer = make_optimizer(new_unet, config)
    if labels is not None and takes_floats(labels):
        sharding.keep_inputs(accelerator)
    model, prepared = accelerator.prepare(new_unet, optimizer)
    unet: Any = accelerator.unwrap_model(model)
    if config.compile:
        # Its config grows when diffusers first writes it, and would be compiled for once more after a checkpoint.
        unet.to_json_string()
        # Beside the network, whose own forward pass is not compiled: previews have another shape.
        model = compile_network(model, unet, accelerator.device)
    decays = average_decays(config, progress.schedule_batch_size)
    averages = list(decays(0, start.global_batch_size))
    state = TrainingState(unet, prepared.optimizer, EMA(list(unet.parameters()), averages) if config.use_ema else None)
    if start.checkpoint is not None:
        progress = _restore(state, progress, start.checkpoint, accelerator)
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
        objective=objective,
        loss=objective if parts.objective is None else parts.objective,
        callbacks=parts.callbacks,
        labels=labels,
        condition=condition,
        validation=validation,
        learning_rate=learning_rate_schedule(config, start.num_steps, progress.schedule_batch_size, processes),
        decays=decays,
        total_images=start.num_steps * progress.schedule_batch_size,
        global_batch_size=start.global_batch_size,
    )
    return run, progress


@contextmanager
def open_run(run: Run, progress: Progress) -> Iterator[Run]:
    """Give the run a repository, an output folder of its own and trackers: the first things that it writes.

    Raises:
        UsageError: It cannot have them.
    """
    config, processes, output_dir = run.config, run.processes, run.output_dir
    with ExitStack() as cleanup:
        if config.push_to_hub:
            processes.on_main(lambda: create_run_repository(config, partial(print_once, processes)))
        try:
            processes.on_main(lambda: _take_folder(run, progress, cleanup))
        except BlockingIOError as error:
            raise _busy(config, error) from error
        except OSError as error:
            message = f"output_dir must be writable, got {config.output_dir!r}: {error}. {FREE_SPACE}"
            raise UsageError(message) from error
        if config.push_to_hub and run.is_main:
            public = not config.hub_private_repo
            pusher = Pusher(output_dir, *repository_of(config), public, partial(print_once, processes))
            cleanup.callback(pusher.close, seconds=0)
            run = replace(run, pusher=pusher)
        if config.logger is not None:
            cleanup.callback(finish_trackers, run)
            run = start_trackers(run, progress)
            if run.images.num_bad:
                send_alert(run, "images are lost", f"unreadable images were left out: {run.images.num_bad:,}")
        yield run


def restore_output_dir(config: TrainingConfig, processes: Processes) -> None:
    """Put back the run that was to be overwritten if the one that replaces it was ended before it had a model.

    Only a run that begins with a file of the old one needs that before it starts; any other takes the folder as it is,
    once it is known to start.

    Raises:
        UsageError: A process is at work in the folder.
    """
    inputs = [config.init_from, config.model_config_name_or_path]
    output_dir = Path(config.output_dir).resolve()
    if not any(path is not None and Path(path).resolve().is_relative_to(output_dir) for path in inputs):
        return
    try:
        is_back = processes.on_main(lambda: restore_replaced(Path(config.output_dir)))
    except BlockingIOError as error:
        raise _busy(config, error) from error
    if is_back:
        print_once(processes, "the run that was to be overwritten is back: the one that replaces it had no model")


def end_processes(run: Run) -> None:
    """Wait for all processes, then end the trackers and the process group."""
    # A process that ends while gloo still finishes a gather of another one can hang in the destructor of DDP.
    run.accelerator.wait_for_everyone()
    finish_trackers(run)
    run.accelerator.state.destroy_process_group()


def make_scheduler(config: TrainingConfig) -> DDPMScheduler:
    """Make the scheduler of training, which sampling never touches; it is saved with the model.

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


def _check_device(config: TrainingConfig, accelerator: Accelerator) -> None:
    if config.compile:
        require_compiler(accelerator.device)
    if accelerator.device.type != "cpu":
        return
    if accelerator.mixed_precision == "fp16":
        raise UsageError("mixed_precision fp16 needs a GPU: its gradients are scaled there only; use bf16 or no")
    share_cores(accelerator.num_processes, config.cpu_threads_per_process)


def _load_images(
    requested: TrainingConfig, accelerator: Accelerator, processes: Processes, parts: Parts
) -> tuple[TrainingConfig, Images]:
    """Load the images on each machine once; return them, and the config with what they and the launcher decide."""

    def load() -> tuple[TrainingConfig, Images]:
        config = take_over(requested)
        require_same_run(config)
        if not config.overwrite_output_dir:
            check_readme(Path(config.output_dir))
        if config.eval_steps is not None:
            check_split(config, config.eval_split, "eval_split")
            check_network(config.eval_network, config.eval_network_path)
        # What the settings leave open is tried as soon as the images have decided it.
        is_known = config.resolution is not None or config.model_config_name_or_path is not None
        if is_known and parts.network is None:
            try_run(config, accelerator.device)
        is_open = not is_known or (config.model_config_name_or_path is not None and config.channels is None)
        is_open = is_open and parts.network is None
        accept = partial(try_run, config, accelerator.device) if is_open else None
        if parts.dataset is not None:
            return config, load_dataset(parts.dataset, config, accept)
        if not config.streaming:
            return config, load_images(config, accept)
        stream = open_stream(config)
        if accept is not None:
            accept(stream.resolution, stream.channels)
        return config, stream

    config, images = processes.main_then_rest(load, accelerator.is_local_main_process)
    processes.require_equal(images.fingerprint, "images")
    for line in processes.on_main(lambda: describe_images(config, images)):
        print_once(processes, line)
    config = replace(
        config,
        dataset_name=config.dataset_name or (None if config.train_data_dir or parts.dataset is not None else "digits"),
        resolution=images.resolution,
        channels=images.channels,
        mixed_precision=accelerator.mixed_precision,
    )
    return config, images


def _check_arrays(config: TrainingConfig, values: ValueRange) -> None:
    """Check what settings ask of arrays that only images have.

    Raises:
        UsageError: When one does.
    """
    if config.super_resolution is not None:
        raise UsageError(
            f"super_resolution must be left out for arrays, got {config.super_resolution}: it is for images"
        )
    if config.variance_type.startswith("learned") and not values.is_integer:
        raise UsageError(
            f"variance_type must be fixed_small or fixed_large for {values.dtype}, got {config.variance_type}: a "
            "learned variance is trained by the likelihood of integers"
        )


def _find_start(config: TrainingConfig, images: Images, processes: Processes) -> _Start:
    """Find where the run starts, and how long it is.

    Raises:
        UsageError: The checkpoint is of other settings or images, or has seen more images than the run is to see.
    """
    checkpoint, progress = _find_checkpoint(config, processes, images)
    if progress is not None:
        config = _split_global_batch(config, progress.global_batch_size, processes)
    global_batch_size = config.train_batch_size * config.gradient_accumulation_steps * processes.size
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
    return _Start(config, progress, checkpoint, global_batch_size, num_steps)


def _new_progress(config: TrainingConfig, images: Images, global_batch_size: int, processes: Processes) -> Progress:
    stream = None
    if config.streaming:
        num_substreams = processes.size * max(1, config.dataloader_num_workers)
        stream = {"num_substreams": num_substreams, "chunk_size": config.train_batch_size, "block_starts": []}
    return Progress(
        step=0,
        images=0,
        seconds=0.0,
        num_resumes=0,
        global_batch_size=global_batch_size,
        schedule_batch_size=global_batch_size,
        num_images=images.num_images,
        data_fingerprint=images.fingerprint,
        train_batch_size=config.train_batch_size,
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
        requested_batch = config.train_batch_size * config.gradient_accumulation_steps * processes.size
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
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
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


def _check_extra_images(config: TrainingConfig, images: Images, global_batch_size: int) -> None:
    columns = None if isinstance(images, GivenImages) else images.label_columns
    numbers = [column.name for column in columns or () if column.class_names is None]
    if config.stable_target_images and numbers:
        raise UsageError(
            f"stable_target_images must be 0 with a column of numbers, got {config.stable_target_images} with "
            f"{numbers[0]!r}: hardly two images have the same number, and only those of one label count"
        )
    max_extra_images = max(0, (images.num_images or 0) - global_batch_size)
    if config.stable_target_images > max_extra_images:
        raise UsageError(
            f"stable_target_images must be at most {max_extra_images}, got {config.stable_target_images}: the data "
            f"are {images.num_images} images, of which a step takes {global_batch_size}; 0 turns it off"
        )


def _labels_of(config: TrainingConfig, images: Images, given: Any) -> Labels | None:
    """Return the labels of the images, with one for `class_dropout` where the network has a place for it."""
    if not isinstance(images, GivenImages) and images.label_columns is not None:
        if given is not None:
            raise UsageError(
                f"label_column must be one column of classes for a network that is passed, got {config.label_column}: "
                "leave out network=, or take another column"
            )
        assert images.labels is not None
        return labels_of(images.label_columns, images.labels, config.class_dropout > 0)
    if images.num_classes is None:
        if config.class_dropout not in (0, CLASS_DROPOUT):
            raise UsageError(f"class_dropout = {config.class_dropout} has no effect: the images have no classes")
        return None
    classes = Classes(tuple(images.class_names or map(str, range(images.num_classes))))
    has_place = given is None or num_classes_of(given.config) == len(classes) + 1
    if given is not None and not has_place and config.class_dropout not in (0, CLASS_DROPOUT):
        raise UsageError(
            f"class_dropout = {config.class_dropout} needs a network of {len(classes) + 1} classes, one more than the "
            f"images have, got {num_classes_of(given.config)}"
        )
    return replace(classes, has_unconditional=config.class_dropout > 0 and has_place)


def _make_unet(
    config: TrainingConfig,
    images: Images,
    labels: Labels | None,
    condition: Condition | None,
    checkpoint: Path | None,
    given: Any,
) -> Any:
    """Make the network of the run: that of the checkpoint or of `init_from`, one from a config, or a new one.

    One that was passed to `train` is taken as it is.
    """
    condition_channels = 0 if condition is None else condition.channels
    if given is not None:
        check_given_network(given, config, images, condition_channels)
        if config.gradient_checkpointing:
            given.enable_gradient_checkpointing()
        return given
    network, widens = None, False
    if checkpoint is not None and config.model_config_name_or_path is None:
        # Where this version makes another network for the data, or the model lies elsewhere, the run keeps its own.
        network = checkpoint / "unet"
    elif config.init_from is not None:
        network = network_of(config.init_from)
        widens = condition is not None and not is_conditional_network(network)
    unet = make_unet(
        images.channels,
        images.resolution,
        labels.num_embeddings if isinstance(labels, Classes) else None,
        model_config=config.model_config_name_or_path if network is None else str(network),
        variance_type=config.variance_type,
        dropout=None if config.model_config_name_or_path or config.init_from else config.dropout,
        seed=config.seed,
        source=network_source(config) if checkpoint is None else f"the network of {checkpoint.name}",
        condition_channels=condition_channels,
        widens=widens,
        labels=None if isinstance(labels, Classes) else labels,
    )
    if network is not None and checkpoint is None:
        load_weights(unet, network, network_source(config))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    return unet


def _on_scales_of_start(config: TrainingConfig, labels: Labels | None, start: _Start) -> Labels | None:
    """Return the labels on the scales of what the run begins with: a number means to its network what it meant."""
    if start.checkpoint is not None:
        return on_scales(labels, start.progress.label_scales)
    if config.init_from is None:
        return labels
    of_model = read_labels(network_of(config.init_from).parent)
    _check_same_labels(config, labels, of_model)
    return labels if of_model is None else on_scales(labels, scales_of(of_model))


def _check_same_labels(config: TrainingConfig, labels: Labels | None, of_model: Labels | None) -> None:
    """Check that the labels of the images are those of the model of `init_from`: its classes, in its order."""
    if of_model is None or labels is None:
        return
    if isinstance(labels, Classes) and isinstance(of_model, Classes):
        if of_model.names != labels.names:
            raise UsageError(
                f"the images must have the classes of {config.init_from!r}, {', '.join(of_model.names)}, in this "
                f"order, got {', '.join(labels.names)}: give other images, or begin with a model without classes"
            )
        return
    if structure_of(labels) != structure_of(of_model):
        raise UsageError(
            f"the images must have the labels of {config.init_from!r}, {describe_labels(of_model)}, got "
            f"{describe_labels(labels)}: give other images, or begin with a model without labels"
        )
    if of_model.has_unconditional != labels.has_unconditional:
        raise UsageError(
            f"class_dropout must be {'above 0' if of_model.has_unconditional else '0'}, as that of the model "
            f"{config.init_from!r}, got {config.class_dropout}"
        )


def _make_objective(
    config: TrainingConfig, scheduler: DDPMScheduler, images: Images, labels: Labels | None
) -> Objective:
    unconditional = None if labels is None or isinstance(labels, Values) else labels.unconditional
    return Objective(
        scheduler=scheduler,
        weighting=config.loss_weighting,
        min_snr_gamma=config.min_snr_gamma,
        density=config.timestep_density,
        noise_level_mean=config.noise_level_mean,
        noise_level_std=config.noise_level_std,
        autocast_dtype=sharding.AUTOCAST[config.mixed_precision or "no"],
        max_value=images.max_value if images.value_range is None else images.value_range.num_steps or images.max_value,
        unconditional_class=unconditional,
    )


def _restore(state: TrainingState, progress: Progress, checkpoint: Path, accelerator: Accelerator) -> Progress:
    """Load a checkpoint into the state and into the loss scaler of fp16; return the progress, one resume later."""
    load_checkpoint(state, checkpoint)
    if accelerator.scaler is not None and progress.scaler is not None:
        accelerator.scaler.load_state_dict(progress.scaler)
    return replace(progress, num_resumes=progress.num_resumes + 1)


def _take_folder(run: Run, progress: Progress, cleanup: ExitStack) -> None:
    """Lock the output folder for this run alone, and prepare it."""
    existed = run.output_dir.exists()
    run.output_dir.mkdir(parents=True, exist_ok=True)
    cleanup.enter_context(lock(run.output_dir))
    if run.config.overwrite_output_dir and existed and set_aside(run.output_dir):
        aside = str(run.output_dir / REPLACED_RUN)
        print_once(run.processes, f"the run in output_dir is kept in {aside!r} until the new one has a model")
    # config.yaml has the batch that was requested, not how these processes split it.
    requested = replace(
        run.config,
        train_batch_size=progress.train_batch_size,
        gradient_accumulation_steps=progress.gradient_accumulation_steps,
    )
    prepare_folder(requested, run.output_dir, progress)
    if (run.output_dir / "README.md").is_file():  # its card is of the end before this one
        try_to_write(run, lambda: write_card(run.output_dir))


def _busy(config: TrainingConfig, error: BlockingIOError) -> UsageError:
    return UsageError(f"output_dir must be of one run at a time, got {config.output_dir!r}: {error}")
