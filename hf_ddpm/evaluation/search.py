"""The search for timesteps: n of them, whose images come nearest to those of many steps.

    distance(t_1 > ... > t_n) = sqrt(mean((x_0(t_1, ..., t_n; x_T) - x_0(reference; x_T))^2)),  t_1 = T - 1

over images x_0 in [-1, 1] of the same noises x_T. A solver without noise makes each step's image a function of x_T and
the timesteps alone, and REFERENCE_STEPS of them follow the ODE closely (Song et al. 2021, Sec. 4.3; the distance that
Xue et al. 2024 bound and Tong et al. 2024 learn timesteps on). The search is a descent along one timestep after the
other, by a stride that is halved when no move helps; it starts at the best of spacings that are uniform in
t^p. Of a candidate that differs in its i-th timestep, the network's first i - 1 outputs are known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.download import find_model
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.sampling.sampler import classes_in_turn, load_for_sampling, seeded_generators
from hf_ddpm.sampling.schedulers import named_scheduler
from hf_ddpm.timesteps import FILE, SearchedTimesteps, read_searched, write_searched

SOLVERS = ("dpmsolver++", "ddim")

REFERENCE_STEPS = 100
STARTING_POWERS = (1.0, 1.5, 2.0, 3.0)


def search_and_keep(
    model: str,
    num_steps: Sequence[int],
    *,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    **settings: Any,
) -> Iterator[tuple[SearchedTimesteps, Path | None]]:
    """Searches, and keeps what is better than uniform timesteps in the model's folder and on its card.

    Args:
        model, device, dtype, compile: as of `load_for_sampling`.
        num_steps, settings: as of `search_timesteps`.

    Returns: what was found, and the file that it was written to; None where uniform timesteps are as good, and for a
        model of the Hub, which has no folder here.

    Raises:
        ValueError: what cannot work, before the search; or the model has been replaced since that began.
        OSError: the folder cannot be read or written.
    """
    folder, repo_id = find_model(model)
    if repo_id is None and not os.access(folder, os.W_OK):
        raise ValueError(f"model must be a folder to write to, got {model!r}")
    weights = weights_sha256(folder)
    pipeline, _ = load_for_sampling(model, "ddpm", device=device, dtype=dtype, compile=compile)
    for found in search_timesteps(pipeline, num_steps, **settings):
        if weights_sha256(folder) != weights:  # a run trains there
            raise ValueError(f"model must keep its weights during the search, but {model!r} has others now: repeat it")
        keep = repo_id is None and found.distance < found.uniform_distance
        if keep:
            write_searched(folder, [*{**read_searched(folder), found.key: found}.values()], weights)
            write_card(folder)
        yield found, folder / FILE if keep else None


class Trajectories:
    """Images of one set of noises by a solver, for one list of timesteps after another.

    Args:
        pipeline: its network is the model; its scheduler's config says which timesteps there are.
        scheduler: `ddim` or `dpmsolver++`.
        seeds: of the noises.
        batch_size: images per forward pass.
        class_labels: one for each seed.
    """

    def __init__(
        self,
        pipeline: DDPMPipeline,
        scheduler: str,
        seeds: Sequence[int],
        batch_size: int,
        class_labels: Sequence[int] | None = None,
    ):
        unet = pipeline.unet
        size = unet.config.sample_size
        shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        generators = seeded_generators(seeds, pipeline.device)
        noises = [torch.randn(shape, generator=g, device=g.device) for g in generators]
        self.x_T = torch.stack(noises).to(pipeline.device)
        self.labels = None if class_labels is None else torch.tensor(class_labels, device=pipeline.device)
        self.unet, self.config, self.scheduler = unet, pipeline.scheduler.config, scheduler
        self.batch_size = batch_size
        self.network_evaluations = 0
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def images(self, timesteps: Sequence[int], keep: bool = False) -> Tensor:
        """x_0 in [-1, 1] by these timesteps, (len(seeds), C, H, W).

        Args:
            keep: remember the network's outputs, for lists that begin alike, instead of those remembered before.
        """
        solver = named_scheduler(self.scheduler, self.config, len(timesteps))
        solver.set_timesteps(timesteps=[*timesteps])
        images, outputs = self._solve(solver, self._known)
        if keep:
            self._known = outputs
        return images

    @torch.no_grad()
    def unipc_images(self, n: int) -> Tensor:
        """The same by n steps of UniPC, which takes no timesteps."""
        solver = named_scheduler("unipc", self.config, n)
        solver.set_timesteps(n)
        return self._solve(solver, {})[0]

    def _solve(
        self, solver: Any, known: dict[tuple[int, ...], Tensor]
    ) -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        """x_0, and the network's outputs by the timesteps up to each."""
        x_t, outputs = self.x_T * solver.init_noise_sigma, {}
        timesteps = [int(t) for t in solver.timesteps]
        for i, t in enumerate(solver.timesteps):
            past = tuple(timesteps[: i + 1])
            outputs[past] = known[past] if past in known else self._output(x_t, t)
            x_t = solver.step(outputs[past], t, x_t).prev_sample
        return x_t.clamp(-1, 1), outputs

    def _output(self, x_t: Tensor, t: Tensor) -> Tensor:
        parts = []
        for first in range(0, len(x_t), self.batch_size):
            part = slice(first, first + self.batch_size)
            conditions = {} if self.labels is None else {"class_labels": self.labels[part]}
            parts.append(self.unet(x_t[part], t, **conditions).sample[:, : x_t.shape[1]].float())
        self.network_evaluations += len(x_t)
        return torch.cat(parts)


def search_timesteps(
    pipeline: DDPMPipeline,
    num_steps: Sequence[int],
    *,
    scheduler: str = "dpmsolver++",
    num_images: int = 32,
    seed: int = 0,
    batch_size: int = 32,
    reference_steps: int = REFERENCE_STEPS,
) -> Iterator[SearchedTimesteps]:
    """The best timesteps for each number of steps, as soon as they are found.

    Args:
        pipeline: of `load_for_sampling`.
        num_steps: how many timesteps, each in [2, reference_steps).
        scheduler: `ddim` or `dpmsolver++`.
        num_images: noises of the search; as many others measure what it found. Of a model of classes, each in turn.
        seed: image i has the seed `seed` + i.

    Raises: ValueError for a number of steps that cannot be searched, or a model that the solver cannot sample.
    """
    num_train = pipeline.scheduler.config.num_train_timesteps
    reference_steps = min(reference_steps, num_train)
    _check(pipeline, num_steps, scheduler, num_images, reference_steps)
    many = uniform_timesteps(pipeline.scheduler.config, scheduler, reference_steps)
    labels = classes_in_turn(pipeline.unet.config.num_class_embeds, range(num_images))
    seen, unseen = (
        Trajectories(pipeline, scheduler, range(first, first + num_images), batch_size, labels)
        for first in (seed, seed + num_images)
    )
    target, unseen_target = seen.images(many), unseen.images(many)
    if not (target.isfinite().all() and unseen_target.isfinite().all()):
        raise ValueError("images must be finite, got NaN: the weights are damaged or overflow")
    for n in dict.fromkeys(num_steps):
        best = descend(
            starting_timesteps(num_train, n),
            lambda timesteps: distance(seen.images(timesteps), target),
            lambda timesteps: seen.images(timesteps, keep=True),
        )
        uniform = uniform_timesteps(pipeline.scheduler.config, scheduler, n)
        yield SearchedTimesteps(
            scheduler=scheduler,
            timesteps=best,
            distance=distance(unseen.images(best), unseen_target),
            uniform_distance=distance(unseen.images(uniform), unseen_target),
            num_images=num_images,
            seed=seed,
            reference_steps=reference_steps,
            unipc_distance=distance(unseen.unipc_images(n), unseen_target),
        )


def _check(
    pipeline: DDPMPipeline, num_steps: Sequence[int], scheduler: str, num_images: int, reference_steps: int
) -> None:
    if scheduler not in SOLVERS:
        raise ValueError(f"scheduler must be one of {', '.join(SOLVERS)}, got {scheduler!r}")
    named_scheduler(scheduler, pipeline.scheduler.config)
    for n in num_steps:
        if not 2 <= n < reference_steps:
            raise ValueError(f"steps must be in [2, {reference_steps}), got {n}: a reference has {reference_steps}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if pipeline.unet.config.class_embed_type is not None:
        kind = pipeline.unet.config.class_embed_type
        raise ValueError(f"model must have classes that are numbers, or none, got embeddings {kind!r}")


def uniform_timesteps(config: Any, scheduler: str, n: int) -> list[int]:
    """The solver's own n timesteps."""
    solver = named_scheduler(scheduler, config, n)
    solver.set_timesteps(n)
    return [int(t) for t in solver.timesteps]


def distance(images: Tensor, target: Tensor) -> float:
    """The root of the mean squared difference."""
    return float((images - target).square().mean().sqrt())


def starting_timesteps(num_train: int, n: int) -> list[tuple[int, ...]]:
    """Spaced by each of STARTING_POWERS."""
    return [spaced_timesteps(num_train, n, power) for power in STARTING_POWERS]


def spaced_timesteps(num_train: int, n: int, power: float) -> tuple[int, ...]:
    """round((T - 1) (1 - i / n)^power), i = 0, ..., n - 1, moved apart where rounding makes two equal."""
    timesteps = [num_train - 1]
    for i in range(1, n):
        t = round((num_train - 1) * (1 - i / n) ** power)
        timesteps.append(max(n - 1 - i, min(t, timesteps[-1] - 1)))
    return tuple(timesteps)


def descend(
    starts: Sequence[tuple[int, ...]],
    value: Callable[[tuple[int, ...]], float],
    accept: Callable[[tuple[int, ...]], object],
) -> tuple[int, ...]:
    """The falling integers that no move of one of them by 1, all but the first, brings to a lower value.

    Args:
        starts: the best of them is where it begins.
        value: what is made small.
        accept: called with what it goes on from, each time that changes.
    """
    values = {start: value(start) for start in starts}
    best = min(values, key=lambda start: values[start])
    accept(best)
    stride = 2 ** max(0, math.ceil(math.log2(best[0] / len(best) / 4)))
    while stride >= 1:
        has_moved = False
        for i in reversed(range(1, len(best))):
            for move in (stride, -stride):
                other = (*best[:i], best[i] + move, *best[i + 1 :])
                low = other[i + 1] if i + 1 < len(other) else -1
                if not low < other[i] < other[i - 1] or other in values:
                    continue
                values[other] = value(other)
                if values[other] < values[best]:
                    best, has_moved = other, True
                    accept(best)
        if not has_moved:
            stride //= 2
    return best
