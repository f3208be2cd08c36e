"""The schedulers by name, all with exact lists of timesteps.

    name          class                          order  noise per step
    ddpm          hf_ddpm.DDPMScheduler          1      yes    Ho et al. 2020, Algorithm 2
    ddim          DPMSolverMultistepScheduler    1      no     Song et al. 2021, Eq. 12 with sigma = 0
    dpmsolver++   DPMSolverMultistepScheduler    2      no     Lu et al. 2022, arXiv 2211.01095
    unipc         UniPCMultistepScheduler        2      no     Zhao et al. 2023
    lcm           LCMScheduler                   -      yes    Luo et al. 2023, for models of `hf-ddpm tune` alone

sampler       such a name and a number of steps: how a model is sampled; one may be kept in its folder

DDIM is first-order DPM-Solver++ (Lu et al., Sec. 4). diffusers' own `DDIMScheduler` steps to t - T // n whatever its
list of timesteps says.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler
from torch import Tensor

from hf_ddpm.guidance import Guidance
from hf_ddpm.names import SCHEDULERS, TUNED_STEPS
from hf_ddpm.runtime.files import naming_damage, read_mapping, write_atomically
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.scheduler import (
    DDPMScheduler,
    as_our_scheduler,
    complete_config,
    is_solvable,
    is_tuned,
    require_num_inference_steps,
)
from hf_ddpm.timesteps import SearchedTimesteps, best_solver

SAMPLER_FILE = Path("scheduler", "sampler.json")

# The steps of the solvers. benchmarks/solvers/table.md compares them; UniPC is the default by it.
DEFAULT_STEPS = 20


class Sampler(NamedTuple):
    """A way to sample a model: a scheduler, a number of steps, and guidance.

    Args:
        scheduler: A name in SCHEDULERS.
        num_inference_steps: The number of steps.
        guidance: How predictions are guided; None: they are not.
        uses_guide: Whether the weaker network of guidance is the one in the model's folder `guide`, also for a model
            that could guide itself by its classes.
    """

    scheduler: str
    num_inference_steps: int
    guidance: Guidance | None = None
    uses_guide: bool = False


def read_sampler(folder: Path) -> Sampler | None:
    """Read the sampler that is kept in a pipeline's folder; None if there is none.

    Raises:
        UsageError: When the file is damaged.
    """
    path = folder / SAMPLER_FILE
    content = read_mapping(path, "remove it")
    if not content:
        return None
    with naming_damage(f"{path} cannot be read", "remove it"):
        guidance = content.pop("guidance", None)
        sampler = Sampler(**content, guidance=None if guidance is None else _read_guidance(guidance))
        if sampler.scheduler not in SCHEDULERS or type(sampler.num_inference_steps) is not int:
            raise ValueError(f"it must name one of {', '.join(SCHEDULERS)} and a number of steps, got {content}")
    return sampler


def write_sampler(folder: Path, sampler: Sampler) -> None:
    """Keep a sampler in a pipeline's folder, where stock diffusers does not read it."""
    content = sampler._asdict()
    if sampler.guidance is None:
        del content["guidance"], content["uses_guide"]
    else:
        settings = {
            name: value for name, value in asdict(sampler.guidance).items() if value != getattr(Guidance(), name)
        }
        if sampler.guidance.interval is not None:
            settings["interval"] = [end if math.isfinite(end) else None for end in sampler.guidance.interval]
        content["guidance"] = settings
    write_atomically(folder / SAMPLER_FILE, json.dumps(content, indent=2) + "\n")


def _read_guidance(content: Mapping[str, Any]) -> Guidance:
    interval = content.get("interval")
    if interval is not None:
        low, high = interval
        content = {**content, "interval": (low, math.inf if high is None else high)}
    return Guidance(**content)


def choose_sampler(
    config: Any,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    kept: Sampler | None = None,
    searched: Mapping[tuple[str, int], SearchedTimesteps] | None = None,
) -> Sampler:
    """Return how a model is sampled, by what was asked for, what is kept in its folder and what is best by default.

    Args:
        config: The config of the model's scheduler.
        scheduler: A name in SCHEDULERS. None: the kept one, or that of `default_scheduler`.
        num_inference_steps: The number of steps. None: the kept one for the kept scheduler, or `default_steps`.
        kept: The sampler in the model's folder.
        searched: The model's searched timesteps.

    Raises:
        ValueError: When the number of steps is not in [1, T].
    """
    num_train = config["num_train_timesteps"]
    name = scheduler or (kept.scheduler if kept is not None else None)
    name = name or default_scheduler(config, searched, num_inference_steps)
    steps = num_inference_steps
    if steps is None and kept is not None and kept.scheduler == name:
        steps = kept.num_inference_steps
    if steps is None:
        steps = default_steps(name, num_train)
    sampler = Sampler(name, require_num_inference_steps(steps, num_train))
    return sampler if kept is None else sampler._replace(guidance=kept.guidance, uses_guide=kept.uses_guide)


def default_scheduler(
    config: Any,
    searched: Mapping[tuple[str, int], SearchedTimesteps] | None = None,
    num_inference_steps: int | None = None,
) -> str:
    """Return the name of the scheduler that samples a model best in few steps.

    It is LCM for a tuned model. Else it is UniPC, with searched timesteps where there are some, or DPM-Solver++ where
    its searched timesteps are better, see `best_solver`.

    Args:
        config: The config of the model's scheduler.
        searched: The model's searched timesteps, by solver and number of steps.
        num_inference_steps: The number of steps. None: DEFAULT_STEPS.
    """
    if is_tuned(config):
        return "lcm"
    if not is_solvable(config):
        return "ddpm"
    steps = DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
    return best_solver(searched or {}, steps)


def default_steps(scheduler: str, num_train: int) -> int:
    """Return the default number of steps: all T for `ddpm`, TUNED_STEPS for `lcm`, and DEFAULT_STEPS for a solver.

    It is at most T.

    Args:
        scheduler: A name in SCHEDULERS.
        num_train: T.
    """
    if scheduler == "ddpm":
        return num_train
    return min(TUNED_STEPS if scheduler == "lcm" else DEFAULT_STEPS, num_train)


def named_scheduler(name: str, config: Any, num_inference_steps: int | None = None) -> Any:
    """Return the scheduler called `name` for a model.

    Args:
        name: A name in SCHEDULERS.
        config: The config of the model's scheduler.
        num_inference_steps: The number of steps that it will be used with. None: T.

    Raises:
        ValueError: When there is no such name, or only `ddpm` or `lcm` can sample the model.
    """
    require_choice("scheduler", name, SCHEDULERS)
    if name != "ddpm":  # whose formulas are those of a tuned model, too
        check_tuning(name, config)
    if name == "lcm":
        return tuned_scheduler(config)
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


def tuned_scheduler(config: Any) -> LCMScheduler:
    """Return the scheduler of a model that is tuned for few steps, which stock diffusers loads as it is.

    Each step goes to x_0_hat, and adds noise to it for the next one. With `original_inference_steps` = T it takes any
    number of steps n up to T, at timesteps that are even from T - 1 down.

    Args:
        config: The config of the model's scheduler, before or after it was tuned.
    """
    config = complete_config(config)
    known = inspect.signature(LCMScheduler.__init__).parameters
    settings = {name: value for name, value in config.items() if name in known}
    return LCMScheduler(**settings | {"original_inference_steps": config["num_train_timesteps"]})


def check_tuning(name: str, config: Any) -> None:
    """Check that a tuned model is sampled by `lcm`, and no other model is.

    Args:
        name: A name in SCHEDULERS.
        config: The config of the model's scheduler.

    Raises:
        ValueError: When it is not so.
    """
    if name != "lcm" and is_tuned(config):
        raise ValueError(
            f"scheduler must be 'lcm' for a model that was tuned for few steps, got {name!r}: leave it out, or take "
            "the model before it was tuned"
        )
    if name == "lcm" and not is_tuned(config):
        raise ValueError(
            "scheduler 'lcm' must have a model that was tuned for few steps, got another: leave it out, or tune the "
            "model by `hf-ddpm tune`"
        )


def require_no_guidance(config: Any) -> None:
    """Check that a model which is to be guided was not tuned for few steps.

    Args:
        config: The config of the model's scheduler.

    Raises:
        ValueError: When it was.
    """
    if is_tuned(config):
        raise ValueError(
            "guidance must be left out for a model that was tuned for few steps: `hf-ddpm tune --guidance_scale` "
            "makes it a part of the model"
        )


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
