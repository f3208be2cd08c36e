"""Searched timesteps, kept in a file beside a pipeline's scheduler.

For a model, a solver and a number of steps n, `hf-ddpm schedule` finds the n timesteps whose images come nearest to
the images of many steps. They are stored in scheduler/searched_timesteps.json. diffusers downloads the file from the
Hub with everything else in that folder, but does not read it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_ddpm.runtime.files import naming_damage, read_mapping, weights_sha256, write_atomically

FILE = Path("scheduler", "searched_timesteps.json")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchedTimesteps:
    """The result of one search.

    A distance is the root of the mean squared difference of pixels in [-1, 1] to the images of `reference_steps` steps
    from the same noises, which the search did not use.

    Args:
        scheduler: The name of the solver, `ddim` or `dpmsolver++`.
        timesteps: The timesteps, falling, in [0, T).
        distance: The distance of the images of these timesteps.
        uniform_distance: The distance of the images of as many steps with the solver's own spacing.
        num_images: The number of noises of the search, and of the others on which distances were measured.
        seed: The seed of the first noise.
        reference_steps: The number of steps of the trajectories that the search imitates.
        unipc_distance: The distance of the images of as many steps of UniPC; None if it was not measured.
    """

    scheduler: str
    timesteps: tuple[int, ...]
    distance: float
    uniform_distance: float
    num_images: int
    seed: int
    reference_steps: int
    unipc_distance: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The solver and the number of steps."""
        return self.scheduler, len(self.timesteps)

    @property
    def is_nearer_than_unipc(self) -> bool:
        """True if the images come nearer than those of UniPC, or UniPC was not measured."""
        return self.unipc_distance is None or self.distance < self.unipc_distance


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
    """Return `ddim` or `dpmsolver++` if the scheduler is that solver, whose timesteps can be searched; else None."""
    config = scheduler.config
    if type(scheduler).__name__ != "DPMSolverMultistepScheduler" or config["algorithm_type"] != "dpmsolver++":
        return None
    if any(config.get(f"use_{name}") for name in ("karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas")):
        return None  # these have noise levels of their own
    if config.get("use_flow_sigmas"):
        return None
    return {1: "ddim", 2: "dpmsolver++"}.get(config["solver_order"])
