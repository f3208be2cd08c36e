"""The choice of what `auto` stands for in the settings of a run: by what the machine has, never by the clock.

A run that is resumed, here or on another machine, keeps what was chosen at its first start, and what a later start
gave in its place: its config.yaml has it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_ddpm.image_size import Size
from hf_ddpm.runtime.devices import has_amx, has_avx512, has_bfloat16, process_device_type, require_compiler
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.format import format_amount
from hf_ddpm.runtime.launch import environment_number, launcher_precision
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.checks import is_resumed
from hf_ddpm.training.config import DEFAULT_BATCH_SIZE, TrainingConfig
from hf_ddpm.training.memory import batch_that_fits, room_for_steps, step_memory
from hf_ddpm.training.parsing import load_config
from hf_ddpm.training.sharding import AUTOCAST

# Compiling takes as long as hundreds of steps of a small network, which a shorter run does not win back.
MIN_COMPILED_STEPS = 1000


def choose_precision(config: TrainingConfig) -> tuple[TrainingConfig, str | None]:
    """Choose what `auto` of `mixed_precision` stands for.

    Returns:
        The config with it, and a line that says why; without `auto` the config as it is, and a line only where
        bfloat16 is slow.
    """
    device = torch.device(process_device_type())
    if config.mixed_precision != "auto":
        asked = config.mixed_precision or launcher_precision()
        return config, _slowness(asked, device)
    chosen = _recorded(config, "mixed_precision")
    reason = "as in this run until now"
    if chosen is None and launcher_precision() != "no":
        chosen, reason = launcher_precision(), "as the launcher says"
    if chosen is None and has_bfloat16(device):
        chosen, reason = "bf16", "this processor multiplies in bfloat16"
    if chosen is None:
        chosen, reason = "no", "float32, as this processor has no instructions for bfloat16"
    line = f"mixed_precision auto is {chosen}: {reason}"
    return replace(config, mixed_precision=chosen), "; ".join(filter(None, [line, _slowness(chosen, device)]))


def _slowness(precision: str, device: torch.device) -> str | None:
    if precision != "bf16" or device.type != "cpu" or has_bfloat16(device):
        return None
    return "mixed_precision bf16 is slower than float32 on this processor, which has no instructions for bfloat16"


def choose_compile(
    config: TrainingConfig, device: torch.device, num_steps: int, size: Size, channels: int
) -> tuple[bool, str | None]:
    """Choose what `auto` of `compile` stands for.

    Args:
        config: The settings, with the precision that the run has.
        device: The device of this process.
        num_steps: The steps of the whole run.
        size: The height and width of the images.
        channels: Their channels.

    Returns:
        Whether to compile, and a line that says why; None without `auto`.
    """
    if config.compile != "auto":
        return config.compile, None
    chosen = _recorded(config, "compile")
    if chosen is None:
        why_not = _why_not_compiled(config, device, num_steps, size, channels)
        chosen, reason = why_not is None, why_not or "the processor has AVX-512"
    else:
        reason = "as in this run until now"
        if chosen:
            require_compiler(device)
    return chosen, f"compile auto is {'on' if chosen else 'off'}: {reason}"


def _why_not_compiled(
    config: TrainingConfig, device: torch.device, num_steps: int, size: Size, channels: int
) -> str | None:
    if device.type != "cpu":
        # On the one GPU that was measured, an H200, a compiled step took 50.6 ms where an eager one took 46.4.
        return "on GPUs no compiled step was seen to be faster"
    if not has_avx512():
        return "compiled steps pay with AVX-512, which this processor does not have"
    if num_steps < MIN_COMPILED_STEPS:
        return f"compiling would take longer than it saves in {num_steps:,} steps"
    is_known_to_work = (channels, *size) == (1, 28, 28) and not config.makes_from_images
    if config.mixed_precision == "bf16" and has_amx() and not is_known_to_work:
        # torch 2.13 compiled networks for 32x32 pixels with 3 or 6 channels, and for 16x16 gray ones, to gradients of
        # NaN there; the network of the recipe, for 28x28 gray pixels, it compiles rightly.
        return (
            "on processors with AMX, as this one, torch compiles some networks in bfloat16 to gradients of NaN; only "
            "gray images of 28 x 28 pixels are known to work"
        )
    try:
        require_compiler(device)
    except UsageError as error:
        return str(error)
    return None


def keep_batch(config: TrainingConfig) -> tuple[TrainingConfig, str | None]:
    """Return the config with the batch that a resumed run has had, where `train_batch_size` is auto.

    Returns:
        The config, and a line that says so; None where it is not auto, or the run is new.
    """
    batch_size = _recorded(config, "train_batch_size") if config.train_batch_size == "auto" else None
    if batch_size is None:
        return config, None
    accumulation = _recorded(config, "gradient_accumulation_steps")
    config = replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    return config, f"train_batch_size auto is {batch_size}: as in this run until now"


def check_batch(config: TrainingConfig, processes: Processes) -> None:
    """Check that the processes of a new run can share the images of a step evenly, where `train_batch_size` is auto.

    Raises:
        UsageError: They cannot.
    """
    of_step = config.global_batch_size or DEFAULT_BATCH_SIZE
    if config.train_batch_size == "auto" and not is_resumed(config) and of_step % processes.size:
        raise UsageError(
            f"global_batch_size, the images per step, must be a multiple of {processes.size}, the processes, got "
            f"{of_step}: give --global_batch_size one that is"
        )


def choose_batch(
    config: TrainingConfig, unet: Any, device: torch.device, num_copies: int, processes: Processes
) -> tuple[TrainingConfig, str]:
    """Choose what `auto` of `train_batch_size` stands for: the most images whose forward pass fits.

    It divides the images of a step and process evenly, and accumulation makes up for the rest of them, so that the
    step is the same. All processes call it and choose alike, by the one with the least memory.

    Args:
        config: The settings, with the precision that the run has.
        unet: The network, on the CPU.
        device: The device of this process.
        num_copies: See `step_memory`.
        processes: The processes.

    Returns:
        The config with numbers, and a line that says why.

    Raises:
        UsageError: The network cannot be run without numbers.
    """
    of_step = config.global_batch_size or DEFAULT_BATCH_SIZE
    of_process = of_step // processes.size
    on_machine = environment_number("LOCAL_WORLD_SIZE", processes.size)
    room = min(processes.gather(lambda: room_for_steps(device, on_machine)))
    try:
        memory = step_memory(unet, AUTOCAST[config.mixed_precision or "no"], num_copies, processes.size)
    except Exception as error:  # a network of the user's own raises any class
        raise UsageError(
            f"train_batch_size must be a number for a network whose memory cannot be computed: {in_one_line(error)}"
        ) from error
    batch_size = batch_that_fits(of_process, memory, room)
    accumulation = of_process // batch_size
    needed = format_amount(memory.of(batch_size), "B")
    line = (
        f"train_batch_size auto is {batch_size}, gradient_accumulation_steps {accumulation}, for {of_step} images per "
        f"step: the tensors of a step take {needed}, by computation, of {format_amount(room, 'B')} for them"
    )
    if memory.of(batch_size) > room:
        line += "; a single image may not fit"
    return replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation), line


def _recorded(config: TrainingConfig, name: str) -> Any:
    """Return what a resumed run has had for a setting until now; None if it says nothing, or for a new run."""
    path = Path(config.output_dir) / "config.yaml"
    if not is_resumed(config) or not path.is_file():
        return None
    value = getattr(load_config(str(path)), name)
    return None if value == "auto" else value
