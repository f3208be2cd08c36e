"""The objective that tunes a trained model to sample in few steps: consistency distillation.

    teacher   the model as it was before it was tuned; it may be guided
    path      the solution of the probability flow ODE of the teacher through x_t, which ends at an image x_{-1}
    f         the consistency function, x_0_hat(x_t, t) of the tuned network; f(x_{-1}, -1) = x_{-1}
    s         the neighbor of t: the next of the timesteps that sampling in few steps visits; -1 after the last
    x_s       the point of the path at s, to which a solver takes the teacher from x_t in a few substeps
    loss      the distance of f(x_t, t) from f(x_s, s), which has no gradient, in units of the network's output v

A model whose f is the image at the end of the path for every t makes that image in one step (Song et al. 2023, arXiv
2303.01469). In several steps each f is noised to the next timestep (ibid., Algorithm 1), as diffusers' `LCMScheduler`
does, at timesteps that are even in t. Sampling in the numbers of steps that a model is tuned for visits no other
timestep, and none is trained: consistency has a few neighbors to go from image to noise, where it has hundreds with
all timesteps.

`LCMScheduler` adds c_skip x_t to c_out f, with c_skip = 0.25 / (100 t^2 + 0.25) and c_out^2 = 1 - c_skip. That is left
out here: c_skip is 4e-8 at t = 249, the lowest timestep of four steps with T = 1000. It is 1 at t = 0 alone, which
sampling in T steps ends at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.conditional import Conditioned
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.scheduler import LEARNED_VARIANCES, SOLVABLE_SCHEDULES, as_our_scheduler
from hf_ddpm.solvers import tuned_scheduler

# The substeps of the teacher from a timestep to its neighbor.
NUM_SUBSTEPS = 4
# The timesteps of sampling in so many steps are always among those that are trained.
LADDER_STEPS = 4
# c of the pseudo-Huber distance sqrt(d^2 + c^2) - c of a root mean square d.
HUBER = 0.03

Teacher = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class ConsistencyObjective(Objective):
    """The loss of consistency distillation, called as `Objective` is; see the top of this file.

    Args:
        teacher: A function of x_t, t, labels and conditions that returns the teacher's prediction, (B, C, H, W), of
            the scheduler's prediction type.
        visited: The timesteps that are trained, rising, see `visited_timesteps`; the neighbor of each is the one
            before it.

    Raises:
        UsageError: When the scheduler's models cannot be tuned.
    """

    teacher: Teacher | None = None
    visited: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.scheduler.config
        check_tunable(config.prediction_type, config.variance_type, config.beta_schedule)

    def __call__(
        self,
        unet: Callable[..., Any],
        x_0: Tensor,
        class_labels: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        extra_images: Tensor | None = None,
        extra_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each image.

        ::

            loss = sqrt(d^2 + c^2) - c
            d^2 = mean((f(x_t, t) - f(x_s, s))^2) / (1 - alpha_bar_t)

        Both evaluations of the network have the same dropout.

        Args:
            unet: The network, as of `Objective`.
            x_0: Clean images, (B, C, H, W) in [-1, 1].
            class_labels: The label of each image, as of `Objective`.
            timesteps: t, (B,) int64, each in `visited`.
            noise: eps, (B, C, H, W) float32, N(0, I).
            extra_images: None: the target is that of the teacher.
            extra_labels: None.

        Returns:
            The loss of each image, (B,) float32.
        """
        if extra_images is not None:
            raise ValueError("extra_images must be None: the target is the teacher's")
        x_0, t, eps = self.drawn(x_0, timesteps, noise)
        x_t = self.scheduler.add_noise(x_0, eps, t)
        s = self.neighbor(t)
        is_last, first = (s < 0).view(-1, 1, 1, 1), s.clamp(min=0)
        with torch.no_grad():
            condition = unet.condition if isinstance(unet, Conditioned) else None
            x_s = self.point_of_path(x_t, t, s, class_labels, condition)
            with torch.random.fork_rng(**generators_of(x_0.device)):
                target = torch.where(is_last, x_s, self._clipped(self._image_of(unet, x_s, first, class_labels)))
        # The generator is where it was: dropout draws the same once more.
        error = self._image_of(unet, x_t, t, class_labels) - target
        squares = error.square().flatten(1).mean(dim=1) * (1 + self.scheduler.snr(t)).float()
        return (squares + HUBER**2).sqrt() - HUBER

    def timesteps_from_uniform(
        self, uniform: Tensor, *, first_index: int = 0, global_batch_size: int | None = None
    ) -> Tensor:
        """Turn uniform numbers into timesteps of `visited`, each as often, by strata as `Objective` does.

        Args:
            uniform: u ~ U[0, 1) of B consecutive images of the global batch, (B,) floating point.
            first_index: k of the first of them, in [0, G).
            global_batch_size: G; None: B.

        Returns:
            t, (B,) int64, each in `visited`.
        """
        count = len(uniform) if global_batch_size is None else global_batch_size
        k = torch.arange(first_index, first_index + len(uniform), device=uniform.device) % count
        index = ((k + uniform) / count * len(self.visited)).long().clamp(max=len(self.visited) - 1)
        return self._visited.to(uniform.device, non_blocking=True)[index]

    def neighbor(self, t: Tensor) -> Tensor:
        """Return s, the timestep of `visited` before each t, -1 before the first, (B,) int64."""
        before = torch.cat([torch.tensor([-1]), self._visited[:-1]]).to(t.device, non_blocking=True)
        return before[torch.searchsorted(self._visited.to(t.device, non_blocking=True), t)]

    def point_of_path(
        self, x_t: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Return x_s, to which the teacher goes from x_t in NUM_SUBSTEPS of DPM-Solver++ of second order.

        They are those of Lu et al. 2022, arXiv 2211.01095, Algorithm 2. The first one, and one that ends at an image,
        are of first order, as DDIM is. All are even in the root of the angle arccos(sqrt(alpha_bar)), and so smaller
        towards the image, where the details come.

        Args:
            x_t: (B, C, H, W).
            t: (B,) int64 in [0, T).
            s: (B,) int64 in [-1, t).
            class_labels: As of a call.
            condition: What images are made from, (B, C', H, W); None: from noise alone.

        Returns:
            x_s, (B, C, H, W); the image at the end of the path where s is -1.
        """
        assert self.teacher is not None
        angles = self._angles.to(t.device, non_blocking=True)
        first, last = angles[t].sqrt(), torch.where(s < 0, 0.0, angles[s.clamp(min=0)].sqrt())
        x, current, earlier = x_t, t, None
        for k in range(1, NUM_SUBSTEPS + 1):
            angle = torch.lerp(first, last, k / NUM_SUBSTEPS).square()
            following = torch.minimum(torch.searchsorted(angles, angle), current) if k < NUM_SUBSTEPS else s
            prediction = self.teacher(x, current, class_labels, condition)
            image = x_0_hat = self._clipped(self.scheduler.predict_original(prediction, x, current))
            if earlier is not None:
                share = self._extrapolation(earlier[0], current, following).view(-1, 1, 1, 1)
                image = self._clipped(x_0_hat + share * (x_0_hat - earlier[1]))
            eps_hat = self._scheduler_of_x_0.predict_noise(image, x, current)
            noisy = self.scheduler.add_noise(image, eps_hat, following.clamp(min=0))
            earlier, current = (current, x_0_hat), following
            x = torch.where((following < 0).view(-1, 1, 1, 1), image, noisy)
        return x

    def _extrapolation(self, earlier: Tensor, current: Tensor, following: Tensor) -> Tensor:
        """Return 1 / (2 r) of Lu et al. 2022, Algorithm 2, (B,): by how much x_0_hat goes on as it did before.

        It is 0 where the step ends at an image or the one before did not move, as there are few timesteps, and at
        most 1.
        """
        before, now, after = (self.scheduler.snr(t.clamp(min=0)).log() for t in (earlier, current, following))
        share = ((after - now) / (2 * (now - before)).clamp(min=1e-6)).clamp(max=1)
        return torch.where((following < 0) | (current == earlier), 0.0, share).float()

    @cached_property
    def _visited(self) -> Tensor:
        """The timesteps that are trained, (number of them,) int64."""
        return torch.tensor(self.visited)

    @cached_property
    def _angles(self) -> Tensor:
        """The angle of each t, (T,) float32, rising."""
        return self.scheduler.alpha_bar.sqrt().arccos().float()

    def _image_of(self, unet: Callable[..., Any], x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """Return f(x_t, t), (B, C, H, W) float32, not clipped, since what is clipped has no gradient."""
        return self.scheduler.predict_original(self.output_of(unet, x_t, t, class_labels), x_t, t)

    def _clipped(self, x_0_hat: Tensor) -> Tensor:
        """Return x_0_hat as sampling clips it, where the scheduler says so."""
        config = self.scheduler.config
        return x_0_hat.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x_0_hat

    @cached_property
    def _scheduler_of_x_0(self) -> Any:
        """The scheduler, for a prediction of x_0."""
        return as_our_scheduler({**self.scheduler.config, "prediction_type": "sample"})


def generators_of(device: torch.device) -> dict[str, Any]:
    """Return the arguments by which `fork_rng` keeps the generators of the CPU and of a device, if it knows those."""
    if device.type not in ("cuda", "xpu"):
        return {"devices": []}
    return {"devices": [device.index or 0], "device_type": device.type}


def check_tunable(prediction_type: str, variance_type: str, beta_schedule: str) -> None:
    """Check that models with such a scheduler can be tuned.

    Raises:
        UsageError: When the prediction leaves x_0_hat open where there is noise alone, or `LCMScheduler` does not know
            the variance or the noise schedule.
    """
    if prediction_type not in ("v_prediction", "sample"):
        raise UsageError(
            f"prediction_type must be v_prediction or sample to tune a model for few steps, got {prediction_type}, by "
            "which one step from noise makes no image: train a model that predicts v"
        )
    if variance_type in LEARNED_VARIANCES:
        raise UsageError(
            f"variance_type must be fixed to tune a model for few steps, got {variance_type}, which LCMScheduler does "
            "not know: train a model with fixed_small"
        )
    if beta_schedule not in SOLVABLE_SCHEDULES:
        raise UsageError(
            f"ddpm_beta_schedule must be one of {', '.join(SOLVABLE_SCHEDULES)} to tune a model for few steps, got "
            f"{beta_schedule}, which LCMScheduler does not know: train a model with another"
        )


def visited_timesteps(scheduler: Any, num_steps: Sequence[int]) -> tuple[int, ...]:
    """Return the timesteps that sampling in each of these numbers of steps visits, and in LADDER_STEPS, rising.

    Args:
        scheduler: The scheduler of the model, before or after it was tuned.
        num_steps: Numbers of steps, each in [1, T].
    """
    sampler, visited = tuned_scheduler(scheduler.config), set()
    for n in {*num_steps, min(LADDER_STEPS, scheduler.config.num_train_timesteps)}:
        sampler.set_timesteps(n)
        visited.update(sampler.timesteps.tolist())
    return tuple(sorted(visited))
