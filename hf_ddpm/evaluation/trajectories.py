"""The images of one set of noises, by one list of timesteps after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.network import timestep_for
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.prediction import labels_to_tensor
from hf_ddpm.sampling.sampler import seeded_generators
from hf_ddpm.solvers import named_scheduler
from hf_ddpm.timesteps import set_timesteps


class Trajectories:
    """The images of one set of noises by a solver, for one list of timesteps after another.

    Unlike the pipeline, it remembers the network's outputs for lists that begin with the same timesteps.

    Attributes:
        network_evaluations: The number of images that the network has been evaluated on.

    Args:
        pipeline: A pipeline of the model; its scheduler's config says which timesteps there are.
        scheduler: One of SOLVERS.
        seeds: The seeds of the noises.
        batch_size: Images per forward pass.
        class_labels: One for each seed, if the model has labels.
    """

    def __init__(
        self,
        pipeline: DDPMPipeline,
        scheduler: str,
        seeds: Sequence[int],
        batch_size: int,
        class_labels: Sequence[Any] | None = None,
    ):
        unet = pipeline.unet
        shape = pipeline._image_shape()
        generators = seeded_generators(seeds, pipeline.device)
        noises = [torch.randn(shape, generator=g, device=g.device) for g in generators]
        self.x_T = torch.stack(noises).to(pipeline.device)
        self.labels = labels_to_tensor(pipeline.labels, class_labels, pipeline.device)
        self.unet, self.config, self.scheduler = unet, pipeline.scheduler.config, scheduler
        self.batch_size = batch_size
        self.network_evaluations = 0
        # The timesteps up to a step -> the network's output for all noises at that step.
        self._outputs: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def images(
        self,
        timesteps: Sequence[int],
        remember: bool = False,
        on_step: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Sample by these timesteps.

        Args:
            timesteps: Falling, in [0, T).
            remember: Whether to remember the network's outputs, for lists that begin with the same timesteps, instead
                of the outputs that are remembered now.
            on_step: A function that is called after each step.

        Returns:
            x_0 in [-1, 1], (len(seeds), C, H, W).
        """
        solver = named_scheduler(self.scheduler, self.config, len(timesteps))
        set_timesteps(solver, timesteps)
        x_t = self.x_T * solver.init_noise_sigma
        outputs: dict[tuple[int, ...], Tensor] = {}
        for i, t in enumerate(solver.timesteps):
            visited = tuple(timesteps[: i + 1])
            outputs[visited] = self._outputs[visited] if visited in self._outputs else self._output(x_t, t)
            x_t = solver.step(outputs[visited], t, x_t).prev_sample
            on_step()
        if remember:
            self._outputs = outputs
        return x_t.clamp(-1, 1)

    def _output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Evaluate the network; a learned variance is dropped."""
        parts = []
        for first in range(0, len(x_t), self.batch_size):
            batch = slice(first, first + self.batch_size)
            conditions = {} if self.labels is None else {"class_labels": self.labels[batch]}
            timestep = timestep_for(self.unet, t, x_t[batch])
            parts.append(self.unet(x_t[batch], timestep, **conditions).sample[:, : x_t.shape[1]].float())
        self.network_evaluations += len(x_t)
        return torch.cat(parts)
