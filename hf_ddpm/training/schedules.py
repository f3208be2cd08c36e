"""The values that change with the images that a run has seen: the learning rate, and the decays of the averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.averages import edm_decay, halflife_from_decay, ramped_decay
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.posthoc import TRACKED_STDS, power_decay
from hf_ddpm.training.run import print_once
from hf_ddpm.training.saving import HALFLIFE_PREFIX


def learning_rate_schedule(
    config: TrainingConfig, num_steps: int, schedule_batch_size: int, processes: Processes
) -> Callable[[int], float]:
    """Return the learning rate as a function of the images seen.

    It is diffusers' schedule; nothing steps it, so nothing can step it too often.
    """
    peak = config.peak_learning_rate
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= num_steps:
        print_once(
            processes,
            f"lr_warmup_steps should be less than the {num_steps} steps of the run, got {config.lr_warmup_steps}: "
            f"the learning rate never reaches {peak:g}",
        )
    # `polynomial` ends at a rate of its own, which it divides by this one.
    unused = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_scheduler(
        config.lr_scheduler, unused, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
    )
    factor: Any = schedule.lr_lambdas[0]
    return lambda images_seen: peak * factor(images_seen / schedule_batch_size)


def average_decays(config: TrainingConfig, schedule_batch_size: int) -> Callable[[int, int], dict[str, float]]:
    """Return a function from (images seen, images of the step) to the decay of each average, by its name."""
    halflives = config.ema_halflife_images or [halflife_from_decay(config.ema_max_decay, schedule_batch_size)]
    stds = TRACKED_STDS if config.ema_snapshots else ()
    ratio, ramp = config.ema_rampup_ratio, (config.ema_inv_gamma, config.ema_power, schedule_batch_size)

    def decay(images_seen: int, batch_size: int, halflife: float) -> float:
        if ratio is not None:
            return edm_decay(images_seen, batch_size, halflife, ratio)
        return ramped_decay(images_seen, batch_size, halflife, *ramp)

    def decays(images_seen: int, batch_size: int) -> dict[str, float]:
        exponential = {f"{HALFLIFE_PREFIX}{h:g}": decay(images_seen, batch_size, h) for h in halflives}
        return exponential | {f"std-{std:g}": power_decay(images_seen, batch_size, std) for std in stds}

    return decays
