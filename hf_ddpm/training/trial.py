"""The trial of a run before images are decoded and the output folder is touched.

A network without numbers passes an image, its memory is estimated, and the weights and the compiler are looked for.
Whatever fails here has cost seconds, and the corrected command finds everything as it was.
"""

from __future__ import annotations

import os

import torch

from hf_ddpm.image_size import Size, format_size, require_factor, to_size
from hf_ddpm.network import Trial, load_unet, try_network
from hf_ddpm.runtime.devices import memory_of
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.format import format_amount
from hf_ddpm.training.checks import is_resumed
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.finetuning import is_conditional_network, network_of

FLOAT_BYTES = 4
TABLES = 8  # of T numbers in 64 bits that a scheduler and an objective hold, at the least


def try_run(
    config: TrainingConfig, device: torch.device, size: Size | None = None, channels: int | None = None
) -> None:
    """Try what the settings decide of a run; nothing if it is resumed, since its first start has passed.

    Args:
        config: The settings, with what the model of `init_from` decides.
        device: The device of this process.
        size: The height and width of the images; None: that of the settings, if any.
        channels: Their channels; None: those of the settings, if any.

    Raises:
        UsageError: When the network cannot pass an image, its weights are damaged, or the memory cannot hold the run.
    """
    if is_resumed(config):
        return
    channels = channels or config.channels
    if size is None and config.resolution is not None:
        size = to_size(config.resolution)
    network, source, widens = None, network_source(config), False
    if config.init_from is not None:
        network = network_of(config.init_from)
        load_unet(network, source)
        widens = config.makes_from_images and not is_conditional_network(network)
    model_config = config.model_config_name_or_path if network is None else str(network)
    if model_config is None and size is None:
        return
    condition_channels = 0
    if config.makes_from_images:
        condition_channels = channels if config.condition_column is None else None
    trial = try_network(
        channels,
        size,
        model_config=model_config,
        variance_type=config.variance_type,
        source=source,
        condition_channels=condition_channels,
        widens=widens,
    )
    if config.super_resolution is not None:
        require_factor(config.super_resolution, trial.size)
    require_memory(config, trial, device)


def network_source(config: TrainingConfig) -> str:
    """Return what error messages call the config of the network."""
    return "the model config" if config.init_from is None else f"init_from {config.init_from!r}"


def require_memory(config: TrainingConfig, trial: Trial, device: torch.device) -> None:
    """Check that the memory holds what a step needs at the least: a run that passes may still need more.

    Raises:
        UsageError: When it does not; the message names what takes most of it.
    """
    image = trial.channels * trial.size[0] * trial.size[1]
    batch = 1 if config.train_batch_size == "auto" else config.train_batch_size
    # Weights, gradients, one moment of the optimizer, and the average; input and output of the largest layer.
    copies = 4 if config.use_ema else 3
    # FSDP divides all of these among its processes.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    shards = int(os.environ.get("WORLD_SIZE", "1")) if is_sharded else 1
    size = f"{format_size(trial.size)} pixels"
    parts = {
        f"{trial.num_parameters:,} parameters of the network": copies * FLOAT_BYTES * trial.num_parameters // shards,
        f"the largest layer for train_batch_size {batch} of {size}": FLOAT_BYTES * trial.largest_output * batch,
        f"the images of gradient_accumulation_steps {config.gradient_accumulation_steps} batches": image
        * batch
        * config.gradient_accumulation_steps,
        f"a preview of eval_batch_size {config.eval_batch_size} images of {size}": image * config.eval_batch_size,
        f"the tables of ddpm_num_steps {config.ddpm_num_steps}": 2 * FLOAT_BYTES * TABLES * config.ddpm_num_steps,
    }
    if config.tuned_steps is not None:  # each process holds the whole teacher
        parts[f"{trial.num_parameters:,} parameters of the teacher"] = FLOAT_BYTES * trial.num_parameters
    needed, available = sum(parts.values()), memory_of(device)
    if needed > available:
        most = max(parts, key=lambda name: parts[name])
        raise UsageError(
            f"a step must fit in the memory of this {'machine' if device.type == 'cpu' else 'device'}, "
            f"{format_amount(available, 'B')}, got at least {format_amount(needed, 'B')}, most of it for {most}: give "
            "smaller numbers, or a smaller network"
        )
