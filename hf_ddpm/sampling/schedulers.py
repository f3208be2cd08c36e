"""TODO-docstring"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, complete_config, is_solvable

SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "unipc")


# Of the solvers, of which UniPC is the default: benchmarks/solvers/table.md.
DEFAULT_STEPS = 20


def default_scheduler(
    config: Any,
    searched: Mapping[tuple[str, int], Any] | None = None,
    num_inference_steps: int | None = None,
) -> str:
    """The name of the scheduler that samples a model best in few steps.

    Args:
        config: of the model's scheduler.
        searched: `SearchedTimesteps` by solver and number of steps. UniPC takes no timesteps, and gives way to those
            of DPM-Solver++ whose images are nearer to those of many steps than its own.
        num_inference_steps: default: DEFAULT_STEPS.
    """
    if not is_solvable(config):
        return "ddpm"
    found = (searched or {}).get(("dpmsolver++", num_inference_steps or DEFAULT_STEPS))
    return "dpmsolver++" if found is not None and found.is_nearer_than_unipc else "unipc"


def default_steps(scheduler: str, num_train: int) -> int:
    """All T = `num_train` of `ddpm`, DEFAULT_STEPS of a solver, or T if that is less."""
    return num_train if scheduler == "ddpm" else min(DEFAULT_STEPS, num_train)


def named_scheduler(name: str, config: Any, num_inference_steps: int | None = None) -> Any:
    """The scheduler called `name` for a model whose scheduler has this config.

    Args:
        num_inference_steps: what it will be used with; default: T.

    Raises:
        ValueError: no such name, or a step denoiser, which only `ddpm` can sample.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    ddpm = as_our_scheduler(config)
    if name == "ddpm":
        return ddpm
    config = complete_config(ddpm.config)
    if config["prediction_type"] == "previous_sample":
        raise ValueError(
            f"scheduler must be 'ddpm' for a step denoiser (prediction_type='previous_sample'), got {name!r}"
        )
    # The solvers' linspace is exact for each n < T and repeats timesteps for n = T, where trailing is exact. They
    # slice a learned variance off as if images had three channels; the pipeline has already dropped it.
    if not is_solvable(config):
        ends = "" if config["trained_betas"] is None else " with trained_betas that end in 1"
        raise ValueError(
            f"scheduler must be 'ddpm' for the noise schedule {config['beta_schedule']!r}{ends}, got {name!r}"
        )
    uses_all = num_inference_steps in (None, config["num_train_timesteps"])
    spacing = "trailing" if uses_all else "linspace"
    # A model that was saved with a solver has settings of its own there (final_sigmas_type, use_karras_sigmas, ...).
    of_model = {key: config[key] for key in inspect.signature(DDPMScheduler.__init__).parameters if key in config}
    exact = {**of_model, "timestep_spacing": spacing, "variance_type": None}
    # They do not know clip_sample, without which an error of eps_hat at T-1 is multiplied by thousands in x_0_hat.
    # Their thresholding is clipping if that is up to 1, and here for any limit. A model's own overrides clip_sample.
    clips, limit = config["clip_sample"] and not config["thresholding"], config["clip_sample_range"]
    if clips:
        exact |= {"thresholding": True, "sample_max_value": limit}
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 1 if name == "ddim" else 2}
    scheduler: Any = (
        UniPCMultistepScheduler.from_config(exact)
        if name == "unipc"
        else DPMSolverMultistepScheduler.from_config({**exact, **solver})
    )
    if clips:
        # For 1 the same bits without the quantile of all pixels, which is looked for at each step and held to 1.
        scheduler._threshold_sample = partial(_clip, limit=limit)
    return scheduler


def _clip(x_0_hat: Tensor, limit: float) -> Tensor:
    """To [-limit, limit]; what is not finite is NaN, so that the image is refused."""
    return torch.where(x_0_hat.isfinite(), x_0_hat.clamp(-limit, limit), math.nan)
