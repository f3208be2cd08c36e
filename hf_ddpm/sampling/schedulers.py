"""Schedulers by name, all with exact lists of timesteps.

    name          class                          order  noise per step
    ddpm          hf_ddpm.DDPMScheduler          1      yes    Ho et al. 2020, Algorithm 2
    ddim          DPMSolverMultistepScheduler    1      no     Song et al. 2021, Eq. 12 with sigma = 0
    dpmsolver++   DPMSolverMultistepScheduler    2      no     Lu et al. 2022, arXiv 2211.01095
    unipc         UniPCMultistepScheduler        2      no     Zhao et al. 2023

DDIM is first-order DPM-Solver++ (Lu et al., Sec. 4). diffusers' own `DDIMScheduler` steps to t - T // n whatever its
list of timesteps says.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.sampling.names import SCHEDULERS
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, complete_config, is_solvable
from hf_ddpm.timesteps import SearchedTimesteps

# The steps of the solvers. benchmarks/solvers/table.md compares them; UniPC is the default by it.
DEFAULT_STEPS = 20


def default_scheduler(
    config: Any,
    searched: Mapping[tuple[str, int], SearchedTimesteps] | None = None,
    num_inference_steps: int | None = None,
) -> str:
    """Return the name of the scheduler that samples a model best in few steps.

    UniPC does not accept a list of timesteps. Where the images of searched timesteps of DPM-Solver++ are nearer to
    those of many steps than UniPC's, they go before it.

    Args:
        config: The config of the model's scheduler.
        searched: The model's searched timesteps, by solver and number of steps.
        num_inference_steps: The number of steps. None: DEFAULT_STEPS.
    """
    if not is_solvable(config):
        return "ddpm"
    steps = DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
    timesteps = (searched or {}).get(("dpmsolver++", steps))
    return "dpmsolver++" if timesteps is not None and timesteps.is_nearer_than_unipc else "unipc"


def default_steps(scheduler: str, num_train: int) -> int:
    """Return the default number of steps: all T for `ddpm`, and DEFAULT_STEPS for a solver, but at most T.

    Args:
        scheduler: A name in SCHEDULERS.
        num_train: T.
    """
    return num_train if scheduler == "ddpm" else min(DEFAULT_STEPS, num_train)


def named_scheduler(name: str, config: Any, num_inference_steps: int | None = None) -> Any:
    """Return the scheduler called `name` for a model.

    Args:
        name: A name in SCHEDULERS.
        config: The config of the model's scheduler.
        num_inference_steps: The number of steps that it will be used with. None: T.

    Raises:
        ValueError: When there is no such name, or only `ddpm` can sample the model.
    """
    require_choice("scheduler", name, SCHEDULERS)
    ddpm = as_our_scheduler(config)
    if name == "ddpm":
        return ddpm
    config = complete_config(ddpm.config)
    _check_solvable(name, config)
    uses_all = num_inference_steps in (None, config["num_train_timesteps"])
    # A model that was saved with a solver has settings of that solver in its config (final_sigmas_type,
    # use_karras_sigmas, ...), which are left out here.
    model_settings = {
        key: config[key] for key in inspect.signature(DDPMScheduler.__init__).parameters if key in config
    }
    settings = {
        **model_settings,
        # The solvers' linspace is exact for each n < T, and repeats timesteps for n = T, where trailing is exact.
        "timestep_spacing": "trailing" if uses_all else "linspace",
        # They drop a learned variance as if images had three channels; the pipeline has already dropped it.
        "variance_type": None,
    }
    # The solvers do not know clip_sample, without which an error of eps_hat at T-1 is multiplied by thousands in
    # x_0_hat. Their thresholding is clipping if its limit is at most 1; here it clips to any limit. A thresholding of
    # the model's own goes before clip_sample.
    clips, limit = config["clip_sample"] and not config["thresholding"], config["clip_sample_range"]
    if clips:
        settings |= {"thresholding": True, "sample_max_value": limit}
    if name == "unipc":
        scheduler: Any = UniPCMultistepScheduler.from_config(settings)
    else:
        solver = {"algorithm_type": "dpmsolver++", "solver_order": 1 if name == "ddim" else 2}
        scheduler = DPMSolverMultistepScheduler.from_config({**settings, **solver})
    if clips:
        # For a limit of 1 this gives the same bits as thresholding, which computes a quantile of all pixels at each
        # step and then limits it to 1.
        scheduler._threshold_sample = partial(_clip, limit=limit)
    return scheduler


def _check_solvable(name: str, config: Any) -> None:
    """Check that solvers can sample the model."""
    if config["prediction_type"] == "previous_sample":
        raise ValueError(
            f"scheduler must be 'ddpm' for a step denoiser (prediction_type='previous_sample'), got {name!r}"
        )
    if not is_solvable(config):
        ending = "" if config["trained_betas"] is None else " with trained_betas that end in 1"
        raise ValueError(
            f"scheduler must be 'ddpm' for the noise schedule {config['beta_schedule']!r}{ending}, got {name!r}"
        )


def _clip(x_0_hat: Tensor, limit: float) -> Tensor:
    """Clip to [-limit, limit]; what is not finite becomes NaN, so that the image is refused."""
    return torch.where(x_0_hat.isfinite(), x_0_hat.clamp(-limit, limit), math.nan)
