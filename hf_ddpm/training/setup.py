"""The setup of a run before its first step: data, resumed state, network, optimizer, all that is decided once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from hf_ddpm.data.cache import Accept
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.given import GivenImages
from hf_ddpm.data.held_out import require_share
from hf_ddpm.data.images import X_0, dtype_of_conditions, load_dataset, load_images
from hf_ddpm.data.labels import with_network_labels
from hf_ddpm.data.shards import open_stream
from hf_ddpm.data.splits import check_groups, check_split
from hf_ddpm.data.tables import divide_training
from hf_ddpm.evaluation.feature_weights import check_network
from hf_ddpm.hub.card import check_readme, write_card
from hf_ddpm.image_size import Size, to_resolution
from hf_ddpm.labels import scales_of, takes_floats
from hf_ddpm.network import compile_network
from hf_ddpm.runtime import slurm
from hf_ddpm.runtime.devices import process_device_type, require_compiler
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.processes import Processes, share_cores
from hf_ddpm.runtime.run_files import REPLACED_RUN
from hf_ddpm.training import sharding
from hf_ddpm.training.augmentation import attach_map
from hf_ddpm.training.automatic import check_batch, choose_batch, choose_compile, keep_batch
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.checkpoint import Progress, TrainingState, load_checkpoint
from hf_ddpm.training.checks import is_resumed
from hf_ddpm.training.conditions import condition_of
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.finetuning import (
    condition_range_to_keep,
    range_to_keep,
    require_type,
    take_over,
    with_range,
    with_range_of_conditions,
)
from hf_ddpm.training.folder import prepare_folder, restore_replaced, set_aside
from hf_ddpm.training.model import labels_of_run, make_network, make_objective, make_scheduler, on_scales_of_start
from hf_ddpm.training.optimizer import make_optimizer
from hf_ddpm.training.parts import Parts
from hf_ddpm.training.publishing import (
    checkpoint_pusher,
    create_places,
    finish_checkpoint_push,
    model_pusher,
    no_upload_bars,
)
from hf_ddpm.training.run import FREE_SPACE, Run, print_once, send_alert, try_to_write
from hf_ddpm.training.schedules import average_decays, learning_rate_schedule
from hf_ddpm.training.start import Images, find_start, require_same_run
from hf_ddpm.training.tracking import finish_trackers, start_trackers
from hf_ddpm.training.trial import try_run
from hf_ddpm.training.tuning import checksum_of_teacher, num_teachers
from hf_ddpm.training.validation import open_validation
from hf_ddpm.value_range import ValueRange

# The longest that processes wait while one of them decodes the images, or writes the report.
LONGEST_WAIT = timedelta(hours=2)

# What Accelerate keeps for the whole process beside the devices and their processes.
_ACCELERATE_STATES = (AcceleratorState, GradientState)


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
        # Several processes work on the CPU only if they are told to. GPUs that SLURM gave must be found.
        cpu=slurm.gives_no_gpu() and process_device_type() == "cpu",
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
    check_batch(config, processes)
    config, images = _load_images(config, accelerator, processes, parts)
    if images.value_range is not None:
        _check_arrays(config, images.value_range)
    if config.train_batch_size == "auto":
        config = _divide_step(config, images, accelerator, processes, parts)
    start = find_start(config, images, processes)
    config, progress = start.config, start.progress
    num_steps, size, channels = start.num_steps, images.size, images.channels
    compile, reason = processes.on_main(lambda: choose_compile(config, accelerator.device, num_steps, size, channels))
    config = replace(config, compile=compile)
    if reason is not None:
        print_once(processes, reason)
    _check_extra_images(config, images, start.global_batch_size)
    condition = condition_of(config, images)
    labels = labels_of_run(config, images, parts.network)
    labels = on_scales_of_start(config, labels, start)
    known = progress.teacher
    teacher = processes.on_main(lambda: checksum_of_teacher(config, labels, known))
    progress = replace(progress, label_scales=scales_of(labels), teacher=teacher)
    images = with_network_labels(images, labels)
    validation = None
    if config.eval_steps is not None:
        validation = open_validation(config, images, labels, condition, processes, accelerator.device)
    scheduler = make_scheduler(config)
    objective = make_objective(config, scheduler, images, labels, accelerator.device)
    new_unet = make_network(config, images, labels, condition, start.checkpoint, parts.network)
    if config.augment_probability:
        attach_map(new_unet)
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
    config, processes = run.config, run.processes
    with ExitStack() as cleanup:
        if config.push_to_hub:
            processes.on_main(lambda: create_places(config, partial(print_once, processes)))
        try:
            processes.on_main(lambda: _take_folder(run, progress, cleanup))
        except BlockingIOError as error:
            raise busy(config, error) from error
        except OSError as error:
            message = f"output_dir must be writable, got {config.output_dir!r}: {error}. {FREE_SPACE}"
            raise UsageError(message) from error
        if config.push_to_hub and run.is_main:
            pusher = model_pusher(config, partial(print_once, processes))
            cleanup.callback(pusher.close, seconds=0)
            run = replace(run, pusher=pusher)
            if config.hub_strategy == "checkpoint":
                cleanup.enter_context(no_upload_bars())
                run = replace(run, checkpoint_pusher=checkpoint_pusher(config, partial(print_once, processes)))
                cleanup.callback(finish_checkpoint_push, run, seconds=0)
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
        raise busy(config, error) from error
    if is_back:
        print_once(processes, "the run that was to be overwritten is back: the one that replaces it had no model")


def end_processes(run: Run) -> None:
    """Wait for all processes, then end the trackers and the process group."""
    # A process that ends while gloo still finishes a gather of another one can hang in the destructor of DDP.
    run.accelerator.wait_for_everyone()
    finish_trackers(run)
    run.accelerator.state.destroy_process_group()


def _check_device(config: TrainingConfig, accelerator: Accelerator) -> None:
    if config.compile is True:
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

    def load() -> tuple[TrainingConfig, Images, bool]:
        config = take_over(requested)
        require_same_run(config)
        if not config.overwrite_output_dir:
            check_readme(Path(config.output_dir))
        if config.eval_steps is not None:
            check_split(config, config.eval_split, "eval_split")
            check_groups(config, config.eval_split, "eval_split")
            check_network(config.eval_network, config.eval_network_path)
        if config.eval_fraction is not None and not is_resumed(config):
            require_share(divide_training(config), config)
        # What the settings leave open is tried as soon as the images have decided it.
        is_known = config.resolution is not None or config.model_config_name_or_path is not None
        if is_known and parts.network is None:
            try_run(config, accelerator.device)
        is_open = not is_known or (config.model_config_name_or_path is not None and config.channels is None)
        is_open = is_open and parts.network is None
        values = range_to_keep(config)

        def accept(size: Size, channels: int, dtype: str | None) -> None:
            if dtype != X_0:
                _require_types(config, parts, dtype)
            if is_open:
                try_run(config, accelerator.device, size, channels)

        images = _open_images(config, parts, accept, values)
        images = images if values is None else with_range(images, values)
        of_conditions = condition_range_to_keep(config)
        if of_conditions is not None:
            images = with_range_of_conditions(images, of_conditions)
        return config, images, values is not None

    config, images, keeps_units = processes.main_then_rest(load, accelerator.is_local_main_process)
    processes.require_equal(images.fingerprint, "images")
    if keeps_units:
        print_once(processes, f"-1 and 1 stand for what they do in the model in init_from: {images.value_range}")
    for line in processes.on_main(lambda: describe_images(config, images)):
        print_once(processes, line)
    config = replace(
        config,
        dataset_name=config.dataset_name or (None if config.train_data_dir or parts.dataset is not None else "digits"),
        resolution=to_resolution(images.size),
        channels=images.channels,
        mixed_precision=accelerator.mixed_precision,
    )
    return config, images


def _require_types(config: TrainingConfig, parts: Parts, dtype: str | None) -> None:
    """Check that images and their conditions are of types that can have the units of the model in `init_from`.

    Raises:
        UsageError: When they are not.
    """
    values, of_conditions = range_to_keep(config), condition_range_to_keep(config)
    if values is not None:
        require_type(values, dtype)
    if of_conditions is not None:
        require_type(of_conditions, dtype_of_conditions(config, parts.dataset), config.condition_column)


def _open_images(config: TrainingConfig, parts: Parts, accept: Accept, values: ValueRange | None) -> Images:
    """Open the images that the settings name, or the data set of the user's own code.

    Args:
        config: The settings.
        parts: The user's own parts.
        accept: As of `load_images`.
        values: The values that a stream of floats takes from another model; None for its own.
    """
    if parts.dataset is not None:
        return load_dataset(parts.dataset, config, accept)
    if not config.streaming:
        return load_images(config, accept)
    stream = open_stream(config, None if values is None else (values.low, values.high))
    accept(stream.size, stream.channels, None if stream.value_range is None else stream.value_range.dtype)
    return stream


def _check_arrays(config: TrainingConfig, values: ValueRange) -> None:
    """Check what settings ask of arrays that only images have.

    Raises:
        UsageError: When one does.
    """
    if config.variance_type.startswith("learned") and not values.is_integer:
        raise UsageError(
            f"variance_type must be fixed_small or fixed_large for {values.dtype}, got {config.variance_type}: a "
            "learned variance is trained by the likelihood of integers"
        )


def _divide_step(
    config: TrainingConfig, images: Images, accelerator: Accelerator, processes: Processes, parts: Parts
) -> TrainingConfig:
    """Return the config with the batch and the accumulation that `train_batch_size auto` stands for."""
    kept, line = keep_batch(config)
    if line is None:
        labels = labels_of_run(config, images, parts.network)
        unet = make_network(config, images, labels, condition_of(config, images), None, parts.network)
        num_averages = len(average_decays(config, 1)(0, 1)) if config.use_ema else 0
        num_copies = num_averages + num_teachers(config, labels)
        kept, line = choose_batch(config, unet, accelerator.device, num_copies, processes)
    print_once(processes, line)
    return kept


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


def busy(config: TrainingConfig, error: BlockingIOError) -> UsageError:
    """Return what a run says whose output folder belongs to another process."""
    return UsageError(f"output_dir must be of one run at a time, got {config.output_dir!r}: {error}")
