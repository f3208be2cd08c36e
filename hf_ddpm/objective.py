"""What the network learns: density of t, target, weight -> loss per image.

    t ~ density,  eps ~ N(0, I),  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    loss = weight(t) mean((prediction(x_t, t) - target)^2)    [+ 0.001 T L_t with learned variance]
    stable target: its mean over the images that x_t may have come from (Xu et al. 2023)

Of t that are drawn uniformly, T L_t is the bound's expectation; with another density its terms have other weights.

Algorithm 1 of Ho et al. 2020 is density uniform, target eps, weight 1. All but the network runs in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.bound import variational_bound
from hf_ddpm.scheduler import LEARNED_VARIANCES, DDPMScheduler

Density = Literal["uniform", "stratified", "lognormal"]
Weighting = Literal["constant", "min_snr"]

# lambda of Nichol & Dhariwal 2021, Eq. 16.
VARIATIONAL_BOUND_WEIGHT = 1e-3
UNIFORM_SHARE = 0.1


@dataclass(frozen=True)
class Objective:
    """The training loss of a network under a scheduler.

    Args:
        scheduler: of training; its prediction and variance type decide target and loss.
        weighting: `constant`, 1 on the network's own output, or `min_snr`, min(SNR, gamma) on x_0 (Hang et al. 2023).
        min_snr_gamma: gamma > 0.
        density: of t. `uniform`, independent draws; `stratified`, one from each of B equal parts of [0, T), which has
            the same expectation and less variance; `lognormal`, sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) being
            so distributed (Karras et al. 2022, Table 1) but for UNIFORM_SHARE of the draws, so that no t goes
            untrained, one from each of B parts of equal probability.
        noise_level_mean, noise_level_std: of log sigma_t, for `lognormal`; above 0 the latter.
        autocast_dtype: the type the network runs in; None: that of its weights.
    """

    scheduler: DDPMScheduler
    weighting: Weighting = "constant"
    min_snr_gamma: float = 5.0
    density: Density = "uniform"
    noise_level_mean: float = -0.4
    noise_level_std: float = 1.2
    autocast_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, got {self.weighting!r}")
        if self.density not in get_args(Density):
            raise ValueError(f"density must be one of {', '.join(get_args(Density))}, got {self.density!r}")
        if not self.noise_level_std > 0:
            raise ValueError(f"noise_level_std must be above 0, got {self.noise_level_std}")
        if not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be above 0, got {self.min_snr_gamma}")

    def __call__(
        self,
        unet: Callable[..., Any],
        x_0: Tensor,
        generator: torch.Generator | list[torch.Generator],
        class_labels: Tensor | None = None,
        stratum: tuple[int, int] | None = None,
        others: Tensor | None = None,
        other_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation of the loss, unreduced.

        Args:
            unet: called as `unet(x_t, t)` (with `class_labels=` if given), returns an object with `sample`.
            x_0: clean images, (B, C, H, W) in [-1, 1].
            generator: t and eps are drawn from it; a list holds one for each image, whose draws then do not depend on
                the batch that the image is in.
            class_labels: (B,) int64.
            stratum: (first, count) if these are the images first, ..., first + B - 1 of a batch of `count` that is
                spread over several calls; stratification is over that batch. (0, B) if not given.
            others: other images of the data, (N, C, H, W) in [-1, 1]: the target is the stable one over each image
                and these, of `posterior_means`, or those of its label. None: the target of the image alone.
            other_labels: (N,) int64, if there are `others` and `class_labels`.

        Returns: the loss, (B,) float32, and t, (B,) int64. That of a stable target lacks the variance of the target.
        """
        if (other_labels is None) != (others is None or class_labels is None):
            raise ValueError("other_labels must be given if others and class_labels are, and only then")
        if isinstance(generator, list) and len(generator) != len(x_0):
            raise ValueError(f"a list of generators must hold one for each of {len(x_0)} images, got {len(generator)}")
        t = self.draw_timesteps(x_0.shape[0], generator, x_0.device, stratum)
        eps = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=torch.float32)
        x_0 = x_0.float()
        x_t = self.scheduler.add_noise(x_0, eps, t)
        means = (x_0, eps)
        if others is not None:
            same = None if class_labels is None else class_labels[:, None] == other_labels
            means = posterior_means(self.scheduler.snr(t), x_0, eps, others.float(), same)
        conditions = {} if class_labels is None else {"class_labels": class_labels}
        with torch.autocast(x_0.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            model_output = unet(x_t, t, **conditions).sample
        model_output = model_output.float()
        prediction, variance_output = self.scheduler.split_output(model_output, x_0)
        target = self.scheduler.training_target(*means, t)
        loss = self.weight(t) * (prediction - target).square().flatten(1).mean(dim=1)
        if self.scheduler.config.variance_type in LEARNED_VARIANCES:
            # The bound trains the variance alone; the mean is left to the weighted loss.
            mean_held = torch.cat([prediction.detach(), variance_output], dim=1)
            bound = variational_bound(self.scheduler, mean_held, x_0, x_t, t)
            loss = loss + VARIATIONAL_BOUND_WEIGHT * len(self.scheduler) * bound
        return loss, t

    def draw_timesteps(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator],
        device: torch.device,
        stratum: tuple[int, int] | None = None,
    ) -> Tensor:
        """t = floor(T u): u ~ U[0, 1), or with strata u = (k + U[0, 1)) / count for image k; (B,) int64.

        Of `lognormal`, t is the first whose cumulative probability is above u.
        """
        if isinstance(generator, list):
            u = torch.cat([torch.rand(1, generator=g, device=g.device) for g in generator]).to(device)
        else:
            u = torch.rand(batch_size, generator=generator, device=generator.device).to(device)
        if self.density != "uniform":
            first, count = stratum or (0, batch_size)
            u = (torch.arange(first, first + batch_size, device=device) + u) / count
        if self.density == "lognormal":
            t = torch.searchsorted(self._cumulative.to(device, non_blocking=True), u, right=True)
            return t.clamp(max=len(self.scheduler) - 1)
        # (k + u) / count can round up to 1.
        return (u * len(self.scheduler)).long().clamp(max=len(self.scheduler) - 1)

    @cached_property
    def _cumulative(self) -> Tensor:
        """The probability of timesteps up to t, (T,) float32; the ends take what is beyond them."""
        log_sigma = -self.scheduler.snr(torch.arange(len(self.scheduler))).log() / 2
        lognormal = torch.special.ndtr((log_sigma - self.noise_level_mean) / self.noise_level_std)
        uniform = torch.arange(1, len(self.scheduler) + 1) / len(self.scheduler)
        return torch.lerp(lognormal, uniform.to(lognormal), UNIFORM_SHARE).float()

    def weight(self, t: Tensor) -> Tensor:
        """The weight of the squared error of the network's output, (B,) float32.

        min_snr is min(SNR, gamma) |x_0_hat - x_0|^2. An error of x_0 is multiplied in the output by

        epsilon: sqrt(SNR). sample: 1. v_prediction: sqrt(SNR + 1).
        previous_sample: x_0's coefficient in the posterior mean, Ho et al. Eq. 7.

        so the weight is min(SNR, gamma) over that factor's square. Two of them cancel: for epsilon
        min(SNR, gamma) / SNR, for v_prediction min(SNR, gamma) / (SNR + 1).
        """
        if self.weighting == "constant":
            return torch.ones(t.shape, device=t.device)
        snr = self.scheduler.snr(t)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                gain = snr
            case "sample":
                gain = torch.ones_like(snr)
            case "v_prediction":
                gain = snr + 1
            case _:
                one, zero = torch.ones_like(snr), torch.zeros_like(snr)
                gain = self.scheduler.posterior(one, zero, t)[0].square()
        return (snr.clamp(max=self.min_snr_gamma) / gain).float()


def posterior_means(
    snr: Tensor, x_0: Tensor, eps: Tensor, others: Tensor, may_be: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and E[eps | x_t] where data are each image and the others, alike (Xu et al. 2023, sec. 3).

        p(x_i | x_t) ~ exp(-|x_t - sqrt(alpha_bar) x_i|^2 / (2 (1 - alpha_bar)))
                     ~ exp(y x_i - snr |x_i|^2 / 2),  y = snr x_0 + sqrt(snr) eps
        E[eps | x_t] = eps + sqrt(snr) (x_0 - E[x_0 | x_t])

    Both belong to the x_t of x_0 and eps. If the others are as independent draws from the data as the image is, x_t is
    as likely to have come from any of them, and the expectation of these means, given x_t, is that of x_0 and eps
    whatever their number: the best network is the same. The more, the less they vary around it.

    Args:
        snr: alpha_bar / (1 - alpha_bar) of each image, (B,); 0 makes all alike.
        x_0, eps: (B, C, H, W) float32.
        others: (N, C, H, W) float32.
        may_be: whether x_t may have come from an other, of its label for one, (B, N); default: from all.

    Returns: both means, (B, C, H, W); x_0 and eps to the last bit where no other comes near. At the smallest t, images
    that differ from x_0 by a gray level in a few pixels are not told from it in float32.
    """
    own, x = x_0.flatten(1), others.flatten(1)
    snr = snr[:, None]
    y = (snr * own + snr.sqrt() * eps.flatten(1)).float()
    snr = snr.float()
    logits = y @ x.T - snr * torch.linalg.vector_norm(x, dim=1).square() / 2
    logits -= (y * own).sum(dim=1, keepdim=True) - snr * own.square().sum(dim=1, keepdim=True) / 2
    if may_be is not None:
        logits = logits.masked_fill(~may_be, -math.inf)
    weights = torch.cat([torch.zeros_like(snr), logits], dim=1).softmax(dim=1)
    mean = weights[:, :1] * own + weights[:, 1:] @ x
    moved = snr.sqrt() * (own - mean)
    return mean.view_as(x_0), eps + moved.view_as(eps)
