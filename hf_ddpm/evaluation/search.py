"""The search for n timesteps whose images come nearest to the images of many steps.

    distance(t_1 > ... > t_n) = sqrt(mean((x_0(t_1, ..., t_n; x_T) - x_0(reference; x_T))^2)),  t_1 = T - 1

The mean is one over images x_0 in [-1, 1] of the same noises x_T. A solver without noise makes each step's image a
function of x_T and the timesteps alone, and REFERENCE_STEPS of DPM-Solver++ follow the ODE closely (Song et al. 2021,
Sec. 4.3). They are the reference of every solver, and every solver, as they do, ends at x_0, the noise level 0. Xue et
al. 2024 bound this distance, and Tong et al. 2024 learn timesteps on it.

The search is a coordinate descent: it moves one timestep after the other, by a stride that is halved when no move
helps. It starts at the best of spacings that are uniform in t^p. Lists that begin with the same timesteps share the
network's outputs for them.

This distance does not tell which of two solvers makes the better images: a blurred image may be nearer than a sharp
one. Where a feature network is at hand, the kernel distance of the images' features to those of the reference decides
what is kept and which solver is the default.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_ddpm.evaluation.distances import paired_kernel_distance
from hf_ddpm.evaluation.features import FeatureNetwork, network_at_hand
from hf_ddpm.evaluation.trajectories import Trajectories
from hf_ddpm.hub.card import check_readme, write_card
from hf_ddpm.hub.download import find_model
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import RunError, UsageError, in_one_line
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.sampling.loading import load_for_sampling, require_known_labels
from hf_ddpm.sampling.sampler import labels_in_turn
from hf_ddpm.scheduler import is_tuned
from hf_ddpm.solvers import named_scheduler
from hf_ddpm.timesteps import FILE, REFERENCE_STEPS, SearchedTimesteps, check_search, read_searched, write_searched

# The solver of the reference.
REFERENCE_SOLVER = "dpmsolver++"
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
        The result for each number of steps and solver, and the file that it was written to. None instead of the file
        where uniform timesteps are as good, for a model of the Hub, which has no folder here, and where it could not
        be written.

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
        is_kept = repo_id is None and result.is_better_than_uniform
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


@dataclass(frozen=True)
class _Reference:
    """The images that few steps imitate.

    Args:
        searched: Those of the noises of the search, (num_images, C, H, W).
        unseen: Those of the noises on which results are measured.
        network: The network of the kernel distances; None: there are none.
        features: The features of `unseen`.
    """

    searched: Tensor
    unseen: Tensor
    network: FeatureNetwork | None
    features: Tensor | None

    def kernel_distance(self, images: Tensor) -> float | None:
        """Return the kernel distance of images of the unseen noises; None without a network."""
        if self.network is None or self.features is None:
            return None
        return paired_kernel_distance(self.network(_to_uint8(images)), self.features)


def search_timesteps(
    pipeline: DDPMPipeline,
    num_steps: Sequence[int],
    *,
    schedulers: Sequence[str] = ("unipc", "dpmsolver++"),
    num_images: int = 32,
    seed: int = 0,
    batch_size: int = 32,
    reference_steps: int = REFERENCE_STEPS,
) -> Iterator[SearchedTimesteps]:
    """Yield the best timesteps for each number of steps and solver, as soon as they are found.

    Kernel distances are measured where the packages of `efficientnet-lite0` are installed, on images of 1 or 3
    channels.

    Args:
        pipeline: A pipeline, as `DDPMPipeline.from_pretrained` loads it, on the device that is to compute.
        num_steps: The numbers of timesteps to search, each in [2, reference_steps).
        schedulers: The solvers, of `unipc`, `dpmsolver++` and `ddim`.
        num_images: The number of noises to search on; the result is measured on as many others. A model of labels
            samples each in turn.
        seed: Image i has the seed `seed` + i.
        batch_size: Images per forward pass.
        reference_steps: The number of steps whose images are the target.

    Raises:
        ValueError: When a number of steps cannot be searched, a solver cannot sample the model, or images are not
            finite.
    """
    reference_steps = min(reference_steps, pipeline.scheduler.config.num_train_timesteps)
    _check(pipeline, num_steps, schedulers, num_images, seed, reference_steps)
    labels = labels_in_turn(pipeline.labels, range(num_images))

    def trajectories(solver: str) -> list[Trajectories]:
        """Return those of the search, and those on which results are measured."""
        starts = (seed, seed + num_images)
        return [Trajectories(pipeline, solver, range(i, i + num_images), batch_size, labels) for i in starts]

    reference = _sample_reference(pipeline, trajectories(REFERENCE_SOLVER), reference_steps)
    of_solver = {solver: trajectories(solver) for solver in dict.fromkeys(schedulers)}
    unipc = trajectories("unipc")[1]
    for n in dict.fromkeys(num_steps):
        unipc_images = unipc.images(unsearched_timesteps(pipeline, "unipc", n))
        for solver, (searched, unseen) in of_solver.items():
            best = _search(searched, reference.searched, n)
            images = unseen.images(best)
            uniform = unipc_images
            if solver != "unipc":
                uniform = unseen.images(unsearched_timesteps(pipeline, solver, n))
            yield SearchedTimesteps(
                scheduler=solver,
                timesteps=best,
                distance=distance(images, reference.unseen),
                uniform_distance=distance(uniform, reference.unseen),
                num_images=num_images,
                seed=seed,
                reference_steps=reference_steps,
                unipc_distance=distance(unipc_images, reference.unseen),
                network=None if reference.network is None else reference.network.name,
                kernel_distance=reference.kernel_distance(images),
                uniform_kernel_distance=reference.kernel_distance(uniform),
                unipc_kernel_distance=reference.kernel_distance(unipc_images),
            )


def _sample_reference(pipeline: DDPMPipeline, trajectories: Sequence[Trajectories], num_steps: int) -> _Reference:
    """Load a feature network if one is at hand, and sample the reference."""
    is_comparable = len(trajectories[1].x_T) > 1 and pipeline.unet.config.in_channels in (1, 3)
    network = network_at_hand(pipeline.device) if is_comparable else None
    timesteps = unsearched_timesteps(pipeline, REFERENCE_SOLVER, num_steps)
    with tqdm(total=len(trajectories) * num_steps, desc=f"Images of {num_steps} steps", unit="step") as progress:
        searched, unseen = (each.images(timesteps, on_step=progress.update) for each in trajectories)
    if not (searched.isfinite().all() and unseen.isfinite().all()):
        raise ValueError("images must be finite, got NaN: the weights are damaged or overflow")
    features = None if network is None else network(_to_uint8(unseen))
    return _Reference(searched, unseen, network, features)


def _search(trajectories: Trajectories, target: Tensor, n: int) -> tuple[int, ...]:
    """Find the n timesteps whose images are nearest to `target`, and show how near they are."""
    nearest = math.inf
    with tqdm(desc=f"{trajectories.scheduler}, {n} steps", unit="list") as progress:

        def value(timesteps: tuple[int, ...]) -> float:
            nonlocal nearest
            images_distance = distance(trajectories.images(timesteps), target)
            nearest = min(nearest, images_distance)
            progress.set_postfix(distance=f"{nearest:.4f}", refresh=False)
            progress.update()
            return images_distance

        num_train = trajectories.config["num_train_timesteps"]
        return descend(
            starting_timesteps(num_train, n), value, lambda timesteps: trajectories.images(timesteps, remember=True)
        )


def _to_uint8(images: Tensor) -> Tensor:
    """Return images of [-1, 1] as a feature network takes them; what is not finite is black."""
    return ((images / 2 + 0.5).nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)


def _check(
    pipeline: DDPMPipeline,
    num_steps: Sequence[int],
    schedulers: Sequence[str],
    num_images: int,
    seed: int,
    reference_steps: int,
) -> None:
    check_search(num_steps, schedulers, reference_steps)
    if is_tuned(pipeline.scheduler.config):
        raise UsageError(
            "timesteps are searched for models that were not tuned for few steps, got one that was: it knows no "
            "timesteps but those that it was tuned for; search those of the model that it began as"
        )
    for solver in schedulers:
        named_scheduler(solver, pipeline.scheduler.config)
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    check_seeds(seed, 2 * num_images)
    require_known_labels(pipeline)


def unsearched_timesteps(pipeline: DDPMPipeline, scheduler: str, n: int) -> list[int]:
    """Return the n timesteps that a solver takes for the model where none were searched."""
    solver = named_scheduler(scheduler, pipeline.scheduler.config, n)
    timesteps = pipeline.default_timesteps(solver, n)
    if timesteps is None:
        solver.set_timesteps(n)
        timesteps = [int(t) for t in solver.timesteps]
    return timesteps


def distance(images: Tensor, target: Tensor) -> float:
    """Return the root of the mean squared difference; infinity for images that are not finite."""
    value = float((images - target).square().mean().sqrt())
    return value if math.isfinite(value) else math.inf


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
