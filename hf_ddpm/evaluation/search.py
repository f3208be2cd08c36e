"""The search for n timesteps whose images come nearest to the images of many steps.

    distance(t_1 > ... > t_n) = sqrt(mean((x_0(t_1, ..., t_n; x_T) - x_0(reference; x_T))^2)),  t_1 = T - 1

The mean is one over images x_0 in [-1, 1] of the same noises x_T. A solver without noise makes each step's image a
function of x_T and the timesteps alone, and REFERENCE_STEPS of them follow the ODE closely (Song et al. 2021, Sec.
4.3). Xue et al. 2024 bound this distance, and Tong et al. 2024 learn timesteps on it.

The search is a coordinate descent: it moves one timestep after the other, by a stride that is halved when no move
helps. It starts at the best of spacings that are uniform in t^p. Lists that begin with the same timesteps share the
network's outputs for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.hub.card import check_readme, write_card
from hf_ddpm.hub.download import find_model
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import RunError, UsageError, in_one_line
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.seeds import check_seeds
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
    """Search timesteps, and keep those that are better than uniform ones in the model's folder and on its card.

    Args:
        model: See `load_for_sampling`.
        num_steps: See `search_timesteps`.
        device: See `load_for_sampling`.
        dtype: See `load_for_sampling`.
        compile: See `load_for_sampling`.
        settings: The other arguments of `search_timesteps` by name.

    Yields:
        The result for each number of steps, and the file that it was written to. None instead of the file where
        uniform timesteps are as good, for a model of the Hub, which has no folder here, and where it could not be
        written.

    Raises:
        ValueError: When something cannot work, before the search; or when the model has been replaced since then.
        OSError: When the folder cannot be read.
        RunError: At the end, when better timesteps could not be written.
    """
    folder, repo_id = find_model(model)
    if repo_id is None and not os.access(folder, os.W_OK):
        raise ValueError(f"model must be a folder to write to, got {model!r}")
    if repo_id is None:
        check_readme(folder)
    weights = weights_sha256(folder)
    pipeline, _ = load_for_sampling(model, "ddpm", device=device, dtype=dtype, compile=compile)
    problem = None
    for result in search_timesteps(pipeline, num_steps, **settings):
        if weights_sha256(folder) != weights:  # a training run saves into the folder
            raise ValueError(f"model must keep its weights during the search, but {model!r} has others now: repeat it")
        is_kept = repo_id is None and result.distance < result.uniform_distance
        if is_kept:
            try:
                write_searched(folder, [*{**read_searched(folder), result.key: result}.values()], weights)
                write_card(folder)
            except (OSError, UsageError) as error:  # what took minutes to find is not lost by that
                problem, is_kept = in_one_line(error), False
        yield result, folder / FILE if is_kept else None
    if problem is not None:
        raise RunError(
            f"timesteps could not be written into {str(folder)!r}: {problem}. Make room there, and repeat it"
        )


class Trajectories:
    """The images of one set of noises by a solver, for one list of timesteps after another.

    Unlike the pipeline, it remembers the network's outputs for lists that begin with the same timesteps.

    Attributes:
        network_evaluations: The number of images that the network has been evaluated on.

    Args:
        pipeline: A pipeline of the model; its scheduler's config says which timesteps there are.
        scheduler: `ddim` or `dpmsolver++`.
        seeds: The seeds of the noises.
        batch_size: Images per forward pass.
        class_labels: One for each seed, if the model has classes.
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
        # The timesteps up to a step -> the network's output for all noises at that step.
        self._outputs: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def images(self, timesteps: Sequence[int], remember: bool = False) -> Tensor:
        """Sample by these timesteps.

        Args:
            timesteps: Falling, in [0, T).
            remember: Whether to remember the network's outputs, for lists that begin with the same timesteps, instead
                of the outputs that are remembered now.

        Returns:
            x_0 in [-1, 1], (len(seeds), C, H, W).
        """
        solver = named_scheduler(self.scheduler, self.config, len(timesteps))
        solver.set_timesteps(timesteps=[*timesteps])
        images, outputs = self._solve(solver, self._outputs)
        if remember:
            self._outputs = outputs
        return images

    @torch.no_grad()
    def unipc_images(self, n: int) -> Tensor:
        """Sample the same noises by n steps of UniPC, which does not accept a list of timesteps."""
        solver = named_scheduler("unipc", self.config, n)
        solver.set_timesteps(n)
        return self._solve(solver, {})[0]

    def _solve(
        self, solver: Any, remembered: dict[tuple[int, ...], Tensor]
    ) -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        """Return x_0, and the network's outputs by the timesteps up to each step."""
        x_t = self.x_T * solver.init_noise_sigma
        outputs: dict[tuple[int, ...], Tensor] = {}
        timesteps = [int(t) for t in solver.timesteps]
        for i, t in enumerate(solver.timesteps):
            visited = tuple(timesteps[: i + 1])
            outputs[visited] = remembered[visited] if visited in remembered else self._output(x_t, t)
            x_t = solver.step(outputs[visited], t, x_t).prev_sample
        return x_t.clamp(-1, 1), outputs

    def _output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Evaluate the network; a learned variance is dropped."""
        parts = []
        for first in range(0, len(x_t), self.batch_size):
            batch = slice(first, first + self.batch_size)
            conditions = {} if self.labels is None else {"class_labels": self.labels[batch]}
            parts.append(self.unet(x_t[batch], t, **conditions).sample[:, : x_t.shape[1]].float())
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
    """Yield the best timesteps for each number of steps, as soon as they are found.

    Args:
        pipeline: A pipeline of `load_for_sampling`.
        num_steps: The numbers of timesteps to search, each in [2, reference_steps).
        scheduler: `ddim` or `dpmsolver++`.
        num_images: The number of noises to search on; the result is measured on as many others. A model of classes
            samples each class in turn.
        seed: Image i has the seed `seed` + i.
        batch_size: Images per forward pass.
        reference_steps: The number of steps whose images are the target.

    Raises:
        ValueError: When a number of steps cannot be searched, the solver cannot sample the model, or images are not
            finite.
    """
    num_train = pipeline.scheduler.config.num_train_timesteps
    reference_steps = min(reference_steps, num_train)
    _check(pipeline, num_steps, scheduler, num_images, seed, reference_steps)
    reference = uniform_timesteps(pipeline.scheduler.config, scheduler, reference_steps)
    labels = classes_in_turn(pipeline.unet.config.num_class_embeds, range(num_images))
    searched, unseen = (
        Trajectories(pipeline, scheduler, range(first, first + num_images), batch_size, labels)
        for first in (seed, seed + num_images)
    )
    target, unseen_target = searched.images(reference), unseen.images(reference)
    if not (target.isfinite().all() and unseen_target.isfinite().all()):
        raise ValueError("images must be finite, got NaN: the weights are damaged or overflow")
    for n in dict.fromkeys(num_steps):
        best = descend(
            starting_timesteps(num_train, n),
            lambda timesteps: distance(searched.images(timesteps), target),
            lambda timesteps: searched.images(timesteps, remember=True),
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
    pipeline: DDPMPipeline,
    num_steps: Sequence[int],
    scheduler: str,
    num_images: int,
    seed: int,
    reference_steps: int,
) -> None:
    if scheduler not in SOLVERS:
        raise ValueError(f"scheduler must be one of {', '.join(SOLVERS)}, got {scheduler!r}")
    named_scheduler(scheduler, pipeline.scheduler.config)
    for n in num_steps:
        if not 2 <= n < reference_steps:
            raise ValueError(f"steps must be in [2, {reference_steps}), got {n}: a reference has {reference_steps}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    check_seeds(seed, 2 * num_images)
    if pipeline.unet.config.class_embed_type is not None:
        kind = pipeline.unet.config.class_embed_type
        raise ValueError(f"model must have classes that are numbers, or none, got embeddings {kind!r}")


def uniform_timesteps(config: Any, scheduler: str, n: int) -> list[int]:
    """Return the solver's own n timesteps.

    Args:
        config: The config of the model's scheduler.
    """
    solver = named_scheduler(scheduler, config, n)
    solver.set_timesteps(n)
    return [int(t) for t in solver.timesteps]


def distance(images: Tensor, target: Tensor) -> float:
    """Return the root of the mean squared difference."""
    return float((images - target).square().mean().sqrt())


def starting_timesteps(num_train: int, n: int) -> list[tuple[int, ...]]:
    """Return n timesteps for each of STARTING_POWERS."""
    return [spaced_timesteps(num_train, n, power) for power in STARTING_POWERS]


def spaced_timesteps(num_train: int, n: int, power: float) -> tuple[int, ...]:
    """Return round((T - 1) (1 - i / n)^power), i = 0, ..., n - 1, moved apart where rounding makes two equal."""
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
    """Find falling integers such that moving any of them but the first by 1 lowers the value no more.

    Args:
        starts: Lists to begin at; the best of them is taken.
        value: The function to minimize.
        accept: A function that is called with each list that the descent moves to.
    """
    values = {start: value(start) for start in starts}
    best = min(values, key=lambda start: values[start])
    accept(best)
    stride = 2 ** max(0, math.ceil(math.log2(best[0] / len(best) / 4)))
    while stride >= 1:
        has_moved = False
        for i in reversed(range(1, len(best))):
            for move in (stride, -stride):
                candidate = (*best[:i], best[i] + move, *best[i + 1 :])
                lower_bound = candidate[i + 1] if i + 1 < len(candidate) else -1
                if not lower_bound < candidate[i] < candidate[i - 1] or candidate in values:
                    continue
                values[candidate] = value(candidate)
                if values[candidate] < values[best]:
                    best, has_moved = candidate, True
                    accept(best)
        if not has_moved:
            stride //= 2
    return best
