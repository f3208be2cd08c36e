"""The training objective: density of t, target, weight -> loss per image.

    alpha_bar_t    the share of the image's power that is left at t (scheduler.py)
    x_t            sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,  t ~ density,  eps ~ N(0, I)
    snr            alpha_bar_t / (1 - alpha_bar_t)
    target         what the network should put out: eps, x_0, v or the posterior mean, by `prediction_type`
    stable target  the mean of the target over the images that x_t may have come from (Xu et al. 2023)
    loss           weight(t) mean((prediction(x_t, t) - target)^2)    [+ 0.001 T L_t with a learned variance]

With the density `uniform`, the weight `constant` and the target eps this is Algorithm 1 of Ho et al. 2020. T L_t is an
unbiased estimate of the variational bound for uniform t; another density weights its terms differently. Everything but
the network runs in float32. L_t is the term of p as it samples, with x_0_hat clipped where the scheduler clips it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_ddpm.bound import variational_bound
from hf_ddpm.scheduler import LEARNED_VARIANCES, DDPMScheduler

Density = Literal["uniform", "stratified", "lognormal"]
Weighting = Literal["constant", "min_snr"]

# lambda of Nichol & Dhariwal 2021, Eq. 16.
VARIATIONAL_BOUND_WEIGHT = 1e-3
# So much of the density `lognormal` is uniform: no t goes untrained.
UNIFORM_FRACTION = 0.1
# So much may float32 err in the logarithm of a ratio of probabilities.
MAX_LOGIT_ERROR = 1e-2


@dataclass(frozen=True)
class Objective:
    """The training loss of a network under a scheduler.

    Args:
        scheduler: The scheduler of training; its prediction type and variance type decide target and loss.
        weighting: The weight of the squared error: `constant` is 1 on the network's own output, `min_snr` is
            min(SNR, gamma) on x_0 (Hang et al. 2023).
        min_snr_gamma: gamma, above 0.
        density: The distribution of t over a batch of G images. `uniform` draws each t independently. `stratified`
            draws one from each of G equal parts of [0, T), which has the same expectation and less variance.
            `lognormal` draws one from each of G parts of equal probability under a log-normal distribution of
            sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) (Karras et al. 2022, Table 1), of which UNIFORM_FRACTION
            is replaced by the uniform distribution of t.
        noise_level_mean: The mean of log sigma_t, for `lognormal`.
        noise_level_std: The standard deviation of log sigma_t, above 0, for `lognormal`.
        autocast_dtype: The type that the network runs in; None: the type of its weights.
        max_value: The largest value of a pixel, 255 or 65535, which decides the bins of the bound's decoder.
        unconditional_class: The class that stands for every class, or that of each of several columns; the images of
            all classes count for its stable target. None: there is none.

    Raises:
        ValueError: When a setting is not one of these or not in its range.
    """

    scheduler: DDPMScheduler
    weighting: Weighting = "constant"
    min_snr_gamma: float = 5.0
    density: Density = "uniform"
    noise_level_mean: float = -0.4
    noise_level_std: float = 1.2
    autocast_dtype: torch.dtype | None = None
    max_value: int = 255
    unconditional_class: int | tuple[float, ...] | None = None

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
        class_labels: Tensor | None = None,
        *,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        extra_images: Tensor | None = None,
        extra_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each image, Ho et al. 2020, Algorithm 1, line 5.

        Timesteps and noise that are not given are drawn from torch's global generator, timesteps first.

        Args:
            unet: The network, called as `unet(x_t, t)`, with `class_labels=` if they are given. It returns an object
                whose `sample` is the prediction.
            x_0: Clean images, (B, C, H, W) in [-1, 1].
            class_labels: The label of each image: (B,) int64 for classes, float32 for numbers; for several columns
                (B, number of columns) float32.
            timesteps: t, (B,) int64 in [0, T). Draws of the objective's density are `timesteps_from_uniform`.
            noise: eps, (B, C, H, W) float32, N(0, I).
            extra_images: Further images of the data, (N, C, H, W) in [-1, 1]. The target is then the stable one of
                `posterior_means`, over each image and those of these that have its label, or all of these for the
                label `unconditional_class`. Without them it is the
                target of the image alone.
            extra_labels: The label of each extra image, as `class_labels`; given with both.

        Returns:
            The loss of each image, (B,) float32, unreduced. The loss against a stable target is lower by the variance
            of the target.
        """
        x_0, t, eps = self.drawn(x_0, timesteps, noise)
        x_0_target, eps_target = self.targets(x_0, eps, t, class_labels, extra_images, extra_labels)
        x_t = self.scheduler.add_noise(x_0, eps, t)
        prediction, variance_output = self.scheduler.split_output(self.output_of(unet, x_t, t, class_labels), x_0)
        target = self.scheduler.training_target(x_0_target, eps_target, t)
        loss = self.weight(t) * (prediction - target).square().flatten(1).mean(dim=1)

        if self.scheduler.config.variance_type in LEARNED_VARIANCES:
            # The bound trains the variance alone; the mean is left to the weighted loss. It is the bound of p as it
            # samples, with x_0_hat clipped if the scheduler clips it, where the code of improved-diffusion takes the
            # unclipped one. With that, digits had 0.020 to 0.030 more bits per dimension, for two seeds and two
            # prediction types each (benchmarks/hybrid_loss/table.md).
            with_fixed_mean = torch.cat([prediction.detach(), variance_output], dim=1)
            bound = variational_bound(self.scheduler, with_fixed_mean, x_0, x_t, t, self.max_value)
            loss = loss + VARIATIONAL_BOUND_WEIGHT * len(self.scheduler) * bound
        return loss

    def drawn(self, x_0: Tensor, timesteps: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0 in float32, t and eps; what is not given is drawn from torch's global generator."""
        x_0 = x_0.float()
        t = timesteps
        if t is None:
            t = self.timesteps_from_uniform(torch.rand(len(x_0), device=x_0.device))
        return x_0, t, torch.randn(x_0.shape, device=x_0.device) if noise is None else noise

    def output_of(self, unet: Callable[..., Any], x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """Return the output of the network, which alone runs in `autocast_dtype`, in float32."""
        conditions = {} if class_labels is None else {"class_labels": class_labels}
        with torch.autocast(x_t.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            model_output = unet(x_t, t, **conditions).sample
        return model_output.float()

    def targets(
        self,
        x_0: Tensor,
        eps: Tensor,
        t: Tensor,
        class_labels: Tensor | None,
        extra_images: Tensor | None,
        extra_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the network should say of x_0 and eps: themselves, or with extra images `posterior_means`."""
        if (extra_labels is None) != (extra_images is None or class_labels is None):
            raise ValueError("extra_labels must be given if extra_images and class_labels are, and only then")
        if extra_images is None:
            return x_0, eps
        same_class = None if class_labels is None else self._same_class(class_labels, extra_labels)
        return posterior_means(self.scheduler.snr(t), x_0, eps, extra_images.float(), same_class)

    def _same_class(self, class_labels: Tensor, extra_labels: Tensor | None) -> Tensor:
        """Return which extra images count for the stable target of each image, (B, N) bool."""
        if class_labels.ndim > 1:
            return self._same_classes(class_labels, extra_labels)
        same_class = class_labels[:, None] == extra_labels
        if self.unconditional_class is None:
            return same_class
        return same_class | (class_labels[:, None] == self.unconditional_class)

    def _same_classes(self, class_labels: Tensor, extra_labels: Any) -> Tensor:
        """Return the same for several columns of classes: all of them must agree, and a hidden one agrees with all."""
        agrees = class_labels[:, None] == extra_labels
        if self.unconditional_class is not None:
            hidden = torch.tensor(self.unconditional_class, device=class_labels.device)
            agrees = agrees | (class_labels[:, None] == hidden)
        return agrees.all(dim=2)

    def timesteps_from_uniform(
        self, uniform: Tensor, *, first_index: int = 0, global_batch_size: int | None = None
    ) -> Tensor:
        """Turn uniform numbers into timesteps of the objective's density.

        With T timesteps, t of image k of a batch of G images, given its number u, is::

            uniform      floor(T u)
            stratified   floor(T (k + u) / G)
            lognormal    the first t whose cumulative probability is above (k + u) / G

        A large batch is evaluated in parts, over several calls and processes. The strata are those of the whole.

        Args:
            uniform: u ~ U[0, 1) of B consecutive images of the global batch, (B,) floating point.
            first_index: k of the first of them, in [0, G); after G - 1 comes 0.
            global_batch_size: G, the number of images of the whole batch; None if these B images are the whole.

        Returns:
            t, (B,) int64 in [0, T), on the device of `uniform`.
        """
        u = uniform
        if self.density != "uniform":
            count = len(uniform) if global_batch_size is None else global_batch_size
            k = torch.arange(first_index, first_index + len(uniform), device=uniform.device) % count
            u = (k + uniform) / count
        num_timesteps = len(self.scheduler)
        if self.density == "lognormal":
            t = torch.searchsorted(self._cumulative.to(u.device, non_blocking=True), u, right=True)
        else:
            t = (u * num_timesteps).long()
        # (k + u) / G can round up to 1.
        return t.clamp(max=num_timesteps - 1)

    @cached_property
    def _cumulative(self) -> Tensor:
        """The probability of all timesteps up to t, (T,) float32, of the density `lognormal`.

        Noise levels below that of t = 0 count as t = 0, those above that of t = T - 1 as t = T - 1.
        """
        log_sigma = -self.scheduler.snr(torch.arange(len(self.scheduler))).log() / 2
        lognormal = torch.special.ndtr((log_sigma - self.noise_level_mean) / self.noise_level_std)
        uniform = torch.arange(1, len(self.scheduler) + 1) / len(self.scheduler)
        return torch.lerp(lognormal, uniform.to(lognormal), UNIFORM_FRACTION).float()

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight of the squared error of the network's output.

        The weighting `min_snr` gives min(SNR, gamma) to the squared error of x_0_hat (Hang et al. 2023). An error of
        x_0_hat appears in the network's output multiplied by a factor, so the weight is min(SNR, gamma) over its
        square. Factor and weight, by prediction type::

            epsilon           sqrt(SNR)                                min(SNR, gamma) / SNR
            sample            1                                        min(SNR, gamma)
            v_prediction      sqrt(SNR + 1)                            min(SNR, gamma) / (SNR + 1)
            previous_sample   a, x_0's coefficient in Ho et al. Eq. 7   min(SNR, gamma) / a^2

        The weight is 1 where the SNR is 0, at T - 1 with zero terminal SNR, as in Hang et al.'s published code. Of 0
        the network would learn nothing there, where sampling begins.

        Args:
            t: Timesteps, (B,) int64 in [0, T).

        Returns:
            The weight of each image, (B,) float32; 1 for the weighting `constant`.
        """
        if self.weighting == "constant":
            return torch.ones(t.shape, device=t.device)
        snr = self.scheduler.snr(t)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                squared_factor = snr
            case "sample":
                squared_factor = torch.ones_like(snr)
            case "v_prediction":
                squared_factor = snr + 1
            case "previous_sample":
                one, zero = torch.ones_like(snr), torch.zeros_like(snr)
                squared_factor = self.scheduler.posterior(one, zero, t)[0].square()
            case other:
                raise ValueError(f"no weight is defined for the prediction_type {other!r}")
        match self.weighting:
            case "min_snr":
                weight_of_x_0 = snr.clamp(max=self.min_snr_gamma)
            case other:
                raise ValueError(f"no weight is defined for the weighting {other!r}")
        return torch.where(snr == 0, 1.0, weight_of_x_0 / squared_factor).float()


def posterior_means(
    snr: Tensor, x_0: Tensor, eps: Tensor, extra_images: Tensor, same_class: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return E[x_0 | x_t] and E[eps | x_t] for data that consist of each image and the extra ones.

    These are the targets of Xu et al. 2023, Sec. 3. All images x_i of the data are equally probable:

        p(x_i | x_t) ~ exp(-|x_t - sqrt(alpha_bar) x_i|^2 / (2 (1 - alpha_bar)))
                     ~ exp(y x_i - snr |x_i|^2 / 2),  y = snr x_0 + sqrt(snr) eps
        E[eps | x_t] = eps + sqrt(snr) (x_0 - E[x_0 | x_t])

    Both means belong to the x_t of x_0 and eps. If the extra images are independent draws from the data, as the image
    is, then x_t may as well have come from any of them. The expectation of these means, given x_t, is then that of
    x_0 and eps for any number of extra images, so the best network is the same. With more images the means vary less.

    Args:
        snr: alpha_bar / (1 - alpha_bar) of each image, (B,). Where it is 0, all images have the same probability.
        x_0: The images, (B, C, H, W) float32.
        eps: Their noise, (B, C, H, W) float32.
        extra_images: The extra images, (N, C, H, W) float32.
        same_class: Which extra images count for each image, (B, N) bool; None: all of them.

    Returns:
        Both means, each (B, C, H, W). They equal x_0 and eps to the last bit where no extra image comes near.
    """
    own, extra = x_0.flatten(1), extra_images.flatten(1)
    logits = _log_odds(snr[:, None], own, eps.flatten(1), extra)
    snr = snr[:, None].float()
    if same_class is not None:
        logits = logits.masked_fill(~same_class, -math.inf)
    weights = torch.cat([torch.zeros_like(snr), logits], dim=1).softmax(dim=1)
    mean = weights[:, :1] * own + weights[:, 1:] @ extra
    eps_shift = snr.sqrt() * (own - mean)
    return mean.view_as(x_0), eps + eps_shift.view_as(eps)


def _log_odds(snr: Tensor, own: Tensor, eps: Tensor, extra: Tensor) -> Tensor:
    """Return log p(x_i | x_t) - log p(x_0 | x_t) of `posterior_means`, (B, N) float32.

    These are differences of numbers of the size snr |x|^2. At the smallest t, where snr is 1e4, float32 loses more of
    them than the difference of two images that are alike but for a pixel. float64 computes what decides. On a CPU
    these are the few pairs that float32 finds near, or cannot tell from near ones. A GPU, which would have to wait to
    look for them, computes all pairs so.

    Args:
        snr: (B, 1).
        own: x_0, (B, D) float32.
        eps: Its noise, (B, D) float32.
        extra: The extra images, (N, D) float32.
    """
    if own.device.type == "mps":  # it has no float64
        return _log_odds(snr.cpu(), own.cpu(), eps.cpu(), extra.cpu()).to(own.device)
    if own.device.type != "cpu":
        return _log_odds_of_type(snr, own, eps, extra, torch.float64)
    logits = _log_odds_of_type(snr, own, eps, extra, torch.float32)
    dimensions = own.shape[1]
    # |x|^2 is at most D, and a sum of D products errs by some sqrt(D) roundings.
    error = snr.double() * dimensions**1.5 * torch.finfo(torch.float32).eps / 4
    # Below -104 the probability is 0 in float32.
    is_unsure = (error > MAX_LOGIT_ERROR) & (logits > -104 - error)
    for pairs in is_unsure.nonzero().split(max(1, 2**22 // dimensions)):
        i, j = pairs.unbind(dim=1)
        d = extra[j].double() - own[i].double()
        pair_snr = snr[i, 0].double()
        pair_logits = pair_snr.sqrt() * (d * eps[i]).sum(dim=1) - pair_snr * d.square().sum(dim=1) / 2
        logits[i, j] = pair_logits.float()
    return logits


def _log_odds_of_type(snr: Tensor, own: Tensor, eps: Tensor, extra: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `_log_odds`, computed in `dtype` by one matrix product."""
    snr, own, eps, extra = (x.to(dtype) for x in (snr, own, eps, extra))
    y = snr * own + snr.sqrt() * eps
    extra_logits = y @ extra.T - snr * extra.square().sum(dim=1) / 2
    own_logits = (y * own).sum(dim=1, keepdim=True) - snr * own.square().sum(dim=1, keepdim=True) / 2
    return (extra_logits - own_logits).float()
