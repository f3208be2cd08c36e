"""Searched timesteps, as a file in the folder of a pipeline.

`hf-ddpm schedule` finds, for a model, a solver and a number of steps n, the n timesteps whose images come nearest to
those of many steps. They are kept in scheduler/searched_timesteps.json, which diffusers downloads from the Hub with
all else of that folder, and does not read.
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
    """What was found for one number of steps.

    Args:
        scheduler: the name of the solver, `ddim` or `dpmsolver++`.
        timesteps: falling, in [0, T).
        distance: of its images to those of `reference_steps` steps, on noises that the search had not seen: the root
            of the mean squared difference of pixels in [-1, 1].
        uniform_distance: the same, of as many steps of the solver's own spacing.
        num_images: on how many noises it was searched, and on as many others measured.
        seed: of the first of them.
        reference_steps: of the trajectories that it was searched on.
        unipc_distance: the same, of as many steps of UniPC; None where it was not measured.
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
        return self.scheduler, len(self.timesteps)

    @property
    def is_nearer_than_unipc(self) -> bool:
        return self.unipc_distance is None or self.distance < self.unipc_distance


def read_searched(folder: Path) -> dict[tuple[str, int], SearchedTimesteps]:
    """Those of the pipeline in `folder`, by solver and number of steps; none, with a warning, if they are of other
    weights.

    Raises: UsageError for a damaged file.
    """
    path = folder / FILE
    content = read_mapping(path, "remove it")
    if not content:
        return {}
    with naming_damage(f"{path} cannot be read", "remove it"):
        rows = [SearchedTimesteps(**{**row, "timesteps": tuple(row["timesteps"])}) for row in content["searched"]]
        weights = content["weights_sha256"]
    if weights != weights_sha256(folder):
        logger.warning("%s is of other weights and not used: run `hf-ddpm schedule` again", path)
        return {}
    return {row.key: row for row in rows}


def write_searched(folder: Path, searched: Sequence[SearchedTimesteps], weights: str | None) -> None:
    """Writes them for the weights with that sha256, instead of all that are there."""
    rows = sorted(searched, key=lambda row: row.key)
    content = {"weights_sha256": weights, "searched": [asdict(row) for row in rows]}
    write_atomically(folder / FILE, json.dumps(content, indent=2) + "\n")


def solver_name(scheduler: Any) -> str | None:
    """`ddim` or `dpmsolver++`, whose timesteps can be searched; None for what is neither."""
    config = scheduler.config
    if type(scheduler).__name__ != "DPMSolverMultistepScheduler" or config["algorithm_type"] != "dpmsolver++":
        return None
    if any(config.get(f"use_{name}") for name in ("karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas")):
        return None  # it has noise levels of its own
    if config.get("use_flow_sigmas"):
        return None
    return {1: "ddim", 2: "dpmsolver++"}.get(config["solver_order"])
