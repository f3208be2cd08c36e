"""The searched timesteps, kept in a file beside a pipeline's scheduler.

For a model, a solver and a number of steps n, `hf-ddpm schedule` finds the n timesteps whose images come nearest to
the images of many steps. They are stored in scheduler/searched_timesteps.json. diffusers downloads the file from the
Hub with everything else in that folder, but does not read it. Nothing here loads torch.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_mapping, weights_sha256, write_atomically

FILE = Path("scheduler", "searched_timesteps.json")

# The solvers whose timesteps can be searched, and the number of steps whose images they imitate.
SOLVERS = ("unipc", "dpmsolver++", "ddim")
REFERENCE_STEPS = 100

# A noise level at which next to nothing is seen of values in [-1, 1]: their signal-to-noise ratio is below 1/400.
_HIGH_SIGMA = 20.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchedTimesteps:
    """The result of one search.

    A distance is the root of the mean squared difference of pixels in [-1, 1] to the images of `reference_steps` steps
    from the same noises, which the search did not use. A kernel distance compares the features of the same images. The
    distance of pixels does not tell which of two solvers makes the better images, so the kernel distance decides where
    it was measured.

    Args:
        scheduler: The name of the solver: `unipc`, `dpmsolver++` or `ddim`.
        timesteps: The timesteps, falling, in [0, T).
        distance: The distance of the images of these timesteps.
        uniform_distance: The distance of the images of as many timesteps that were not searched.
        num_images: The number of noises of the search, and of the others on which distances were measured.
        seed: The seed of the first noise.
        reference_steps: The number of steps of the trajectories that the search imitates.
        unipc_distance: The distance of the images of as many uniform steps of UniPC; None if it was not measured.
        network: The feature network of the kernel distances; None if they were not measured.
        kernel_distance: The kernel distance of the images of these timesteps.
        uniform_kernel_distance: That of as many timesteps that were not searched.
        unipc_kernel_distance: That of as many uniform steps of UniPC.
    """

    scheduler: str
    timesteps: tuple[int, ...]
    distance: float
    uniform_distance: float
    num_images: int
    seed: int
    reference_steps: int
    unipc_distance: float | None = None
    network: str | None = None
    kernel_distance: float | None = None
    uniform_kernel_distance: float | None = None
    unipc_kernel_distance: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The solver and the number of steps."""
        return self.scheduler, len(self.timesteps)

    @property
    def is_better_than_uniform(self) -> bool:
        """True if these timesteps are better than the solver's own: by the kernel distance, else by that of pixels."""
        if self.kernel_distance is not None and self.uniform_kernel_distance is not None:
            return self.kernel_distance < self.uniform_kernel_distance
        return self.distance < self.uniform_distance

    @property
    def lead_over_unipc(self) -> float:
        """The distance of uniform steps of UniPC minus that of these, of kernels where measured, else of pixels.

        Infinite if UniPC was not measured.
        """
        if self.kernel_distance is not None and self.unipc_kernel_distance is not None:
            return self.unipc_kernel_distance - self.kernel_distance
        return math.inf if self.unipc_distance is None else self.unipc_distance - self.distance


def best_solver(searched: Mapping[tuple[str, int], SearchedTimesteps], num_steps: int) -> str:
    """Return `unipc` or `dpmsolver++`, whichever is better in so many steps; UniPC may take uniform ones.

    Args:
        searched: The model's searched timesteps, by solver and number of steps.
        num_steps: n.
    """
    rows = [row for name in ("unipc", "dpmsolver++") if (row := searched.get((name, num_steps)))]
    # A lead of pixels does not compare with one of kernels.
    measured = [row for row in rows if row.kernel_distance is not None] or rows
    best = max(measured, key=lambda row: row.lead_over_unipc, default=None)
    return best.scheduler if best is not None and best.lead_over_unipc > 0 else "unipc"


def check_search(num_steps: Sequence[int], solvers: Sequence[str], reference_steps: int = REFERENCE_STEPS) -> None:
    """Check what is to be searched.

    Raises:
        UsageError: When a number of steps is not in [2, reference_steps), or there is no such solver.
    """
    for n in num_steps:
        if not 2 <= n < reference_steps:
            raise UsageError(f"steps must be in [2, {reference_steps}), got {n}: a reference has {reference_steps}")
    for solver in solvers:
        if solver not in SOLVERS:
            raise UsageError(f"scheduler must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not num_steps or not solvers:
        raise UsageError(f"steps and scheduler must name something to search, got {[*num_steps]} and {[*solvers]}")


def read_searched(folder: Path) -> dict[tuple[str, int], SearchedTimesteps]:
    """Read the searched timesteps of a pipeline.

    Args:
        folder: The pipeline's folder.

    Returns:
        The timesteps by solver and number of steps. There are none if they belong to other weights, with a warning.

    Raises:
        UsageError: When the file is damaged.
    """
    path = folder / FILE
    content = read_mapping(path, "remove it")
    if not content:
        return {}
    with naming_damage(f"{path} cannot be read", "remove it"):
        rows = [SearchedTimesteps(**{**row, "timesteps": tuple(row["timesteps"])}) for row in content["searched"]]
        weights = content["weights_sha256"]
    if weights != weights_sha256(folder):
        logger.warning("%s belongs to other weights and is not used: run `hf-ddpm schedule` again", path)
        return {}
    return {row.key: row for row in rows}


def write_searched(folder: Path, searched: Sequence[SearchedTimesteps], weights: str | None) -> None:
    """Write searched timesteps in place of all that are stored.

    Args:
        folder: The pipeline's folder.
        searched: The timesteps.
        weights: The sha256 of the weights that they belong to.
    """
    rows = sorted(searched, key=lambda row: row.key)
    content = {"weights_sha256": weights, "searched": [asdict(row) for row in rows]}
    write_atomically(folder / FILE, json.dumps(content, indent=2) + "\n")


def solver_name(scheduler: Any) -> str | None:
    """Return the name in SOLVERS if the scheduler is that solver, whose timesteps can be searched; else None."""
    config, order = scheduler.config, scheduler.config.get("solver_order")
    if not takes_timesteps(scheduler):
        return None
    match type(scheduler).__name__:
        case "DPMSolverMultistepScheduler" if config["algorithm_type"] == "dpmsolver++":
            return {1: "ddim", 2: "dpmsolver++"}.get(order)
        case "UniPCMultistepScheduler" if config["predict_x0"] and config["solver_type"] == "bh2":
            return "unipc" if order == 2 else None
    return None


def takes_timesteps(scheduler: Any) -> bool:
    """Return whether `set_timesteps` can give the scheduler a list."""
    config, is_unipc = scheduler.config, type(scheduler).__name__ == "UniPCMultistepScheduler"
    own_levels = ("karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas", "flow_sigmas")
    if any(config.get(f"use_{name}") for name in own_levels):
        return False
    return is_unipc or "timesteps" in inspect.signature(scheduler.set_timesteps).parameters


def timesteps_even_in_log_sigma(alpha_bar: Sequence[float], n: int) -> list[int]:
    """Return n timesteps whose noise levels are about evenly spaced in log sigma, as solvers of Lu et al. take them.

    The solvers' own spacing, even in t, takes few small steps: of 20 the last one goes from sigma = 0.08 to no noise,
    and takes the mean of all that it cannot see. Of images this loses next to nothing. Of fields whose small scales
    have little power it loses these (benchmarks/random_fields/table.md).

    Args:
        alpha_bar: alpha_bar_t of each t in [0, T), falling.
        n: A number in [1, T].

    Returns:
        Falling timesteps: T-1; then from sigma = sqrt((1 - alpha_bar) / alpha_bar) = 20, or from T-2, down to 0.

    Source:
        Lu et al. 2022, "DPM-Solver" (arXiv 2206.00927), whose steps are even in log(alpha / sigma).
    """
    # In float32, alpha_bar may have become 1.
    variances = [max(1 - value, 2.0**-24) for value in alpha_bar]
    ratios = [
        variance / value if value > 0 else math.inf for variance, value in zip(variances, alpha_bar, strict=True)
    ]
    log_sigma = [math.log(ratio) / 2 for ratio in ratios]
    first, last = min(math.log(_HIGH_SIGMA), log_sigma[-1]), log_sigma[0]
    levels = [last + (first - last) * i / max(n - 2, 1) for i in reversed(range(n - 1))]
    nearest = [min(range(len(log_sigma)), key=lambda t: abs(log_sigma[t] - level)) for level in levels]
    timesteps = [len(log_sigma) - 1, *nearest]
    # Near 0 the levels of neighbors are farther apart than what was asked for: each t is taken once.
    for i in reversed(range(n - 1)):
        timesteps[i] = max(timesteps[i], timesteps[i + 1] + 1)
    return [min(t, len(log_sigma) - 1 - i) for i, t in enumerate(timesteps)]


def set_timesteps(scheduler: Any, timesteps: Sequence[int]) -> None:
    """Give a scheduler that `takes_timesteps` a list of timesteps.

    diffusers' UniPC has no argument for it: its noise levels are set here, as it sets them for a list of its own.

    Args:
        scheduler: The scheduler.
        timesteps: The timesteps, falling, in [0, T).
    """
    if type(scheduler).__name__ != "UniPCMultistepScheduler":
        scheduler.set_timesteps(timesteps=[*timesteps])
        return
    scheduler.set_timesteps(len(timesteps))
    last = float(scheduler.sigmas[-1])
    scheduler.timesteps = scheduler.timesteps.new_tensor([*timesteps])
    scheduler.num_inference_steps = len(timesteps)
    alpha_bar = scheduler.alphas_cumprod[[*timesteps]]
    scheduler.sigmas = scheduler.sigmas.new_tensor([*(((1 - alpha_bar) / alpha_bar) ** 0.5).tolist(), last])
