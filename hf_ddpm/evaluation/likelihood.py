"""The bits per dimension by the variational bound (Ho et al. 2020, Eq. 5; Nichol & Dhariwal 2021, Sec. 3).

    bound   L_T + sum_t L_t  >=  -log2 p(x_0) / (C H W), x_0 an image of 8-bit values
    L_T     KL(q(x_T | x_0) || N(0, I))
    L_t     KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t in [1, T); for t = 0 the discretized decoder of Eq. 13
    K       network evaluations per image, at most T

p is the model as all T steps sample it: x_0_hat is clipped where the scheduler's config says so, and the variance is
that of `DDPMScheduler.reverse_distribution`. Samples show all of p but the decoder, because they are its rounded mean.
As in the papers' code, the decoder gives each value a probability of at least 1e-12: no value counts more than 39.9
bits.

With K < T each image has its own K of the T steps, t = 0 among them, drawn with the probabilities pi_t. The sum of
L_t / pi_t over them has the whole sum as its expectation (Horvitz & Thompson 1952). Images are drawn independently.
The spread of their sums therefore gives the error of the mean, with the parts of images, noise and steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.bound import variational_bound
from hf_ddpm.data.batches import as_tensor, to_x_0
from hf_ddpm.plots import Curve, draw_curves
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.seeds import hashed
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.value_range import Scale, ValueRange

# Streams of `hashed` that training does not use.
_NOISE, _CHOICE = 2**32, 2**32 + 1


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The variational bound of a model on N images, in bits per dimension.

    Attributes:
        bits_per_dimension: The mean of the bound over images.
        standard_error: The standard error of that mean, the images being a sample.
        prior: The mean of L_T.
        decoder: The mean of L_0.
        terms: L_t, (T,) float64: its mean over the images for which t was drawn, NaN if there are none.
        term_standard_errors: (T,) float64, NaN for fewer than two images.
        term_counts: The number of images for which t was drawn, (T,) int64. The sum is N K, the number of network
            evaluations.
        num_images: N.
        non_finite_timesteps: Each t whose L_t was infinite or NaN for an image; the bound then is so, too.
    """

    bits_per_dimension: float
    standard_error: float
    prior: float
    decoder: float
    terms: Tensor
    term_standard_errors: Tensor
    term_counts: Tensor
    num_images: int
    non_finite_timesteps: list[int]


def bits_per_dimension(sums: Tensor) -> Likelihood:
    """Compute the bound from its sums over images.

    Args:
        sums: (T + 2, 3), as `sum_bound_terms` returns them; those of different images may be added.

    Raises:
        UsageError: When the sums are those of fewer than two images.
    """
    count, total, squares = sums.double().cpu().unbind(dim=1)
    if count[-1] < 2:
        raise UsageError(f"images must be at least 2, got {int(count[-1])}: one tells no standard error")
    mean = total / count
    variance = ((squares - total * mean) / (count - 1)).clamp(min=0)
    error = torch.where(count > 1, (variance / count).sqrt(), math.nan)
    return Likelihood(
        bits_per_dimension=float(mean[-1]),
        standard_error=float(error[-1]),
        prior=float(mean[-2]),
        decoder=float(mean[0]),
        terms=mean[:-2],
        term_standard_errors=error[:-2],
        term_counts=count[:-2].long(),
        num_images=int(count[-1]),
        non_finite_timesteps=(~total[:-2].isfinite()).nonzero().flatten().tolist(),
    )


@torch.no_grad()
def sum_bound_terms(
    unet: Callable[..., Any],
    scheduler: DDPMScheduler,
    images: Sequence[Any] | np.ndarray | Tensor,
    indices: Sequence[int] | None = None,
    *,
    seed: int,
    batch_size: int,
    timesteps_per_image: int | None = None,
    class_labels: Sequence[int] | np.ndarray | Tensor | None = None,
    scale: Scale = 255,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sum the terms of the bound over some of the images; `bits_per_dimension` takes the sums of all of them, added.

    The steps of image i are a function of (seed, i), and the noise at t is one of (seed, i, t). What images are
    measured together changes nothing but the rounding of the network and of float64 sums.

    Args:
        unet: A network in eval mode that is called as `unet(x_t, t)`, with `class_labels=` if they are given, and
            returns an object with `sample`.
        scheduler: The model's scheduler; its list of sampling steps does not matter.
        images: N images, `images[i]` being (C, H, W) uint8: an array, a tensor, or what is indexed like one.
        indices: The numbers of the images to sum over. None: all N.
        seed: A number of at least 0.
        batch_size: Images per network evaluation.
        timesteps_per_image: K in [2, T]. None: T, which is each term of each image.
        class_labels: The labels as the network takes them: (N,) integers or float32, or several columns of these.
        scale: What -1 and 1 stand for: 255, or the range of arrays of integers, whose values are the decoder's then.
        device: The network's device. Noise is drawn on the CPU and is the same for every device.

    Returns:
        (T + 2, 3) float64 on the CPU. The columns are the number of images, and the sum and the sum of squares of bits
        per dimension. The rows are L_t for t in [0, T), L_T and the bound.

    Raises:
        UsageError: When an argument cannot work, or images are not 8-bit.
    """
    if not isinstance(scheduler, DDPMScheduler):
        kind = type(scheduler).__name__
        raise UsageError(f"scheduler must be hf_ddpm's DDPMScheduler, got {kind}: load with hf_ddpm.DDPMPipeline")
    if getattr(unet, "training", False):
        raise UsageError("unet must be in eval mode, got training mode, which may drop values: call unet.eval()")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if class_labels is not None and len(class_labels) != len(images):
        raise UsageError(f"class_labels must hold one for each of {len(images)} images, got {len(class_labels)}")
    probability = inclusion_probabilities(scheduler, timesteps_per_image)
    num_steps = len(probability)
    max_value = scale.num_steps if isinstance(scale, ValueRange) else scale
    if max_value is None:
        raise UsageError(f"images must be integers, got {scale}: floats have no bits per dimension")
    # MPS has no float64.
    precise = torch.float32 if torch.device(device).type == "mps" else torch.float64
    sums = torch.zeros(num_steps + 2, 3, dtype=torch.float64)

    def add(row: int | Tensor, values: Tensor) -> None:
        rows = torch.as_tensor(row).expand(len(values))
        sums.index_add_(0, rows, torch.stack([torch.ones_like(values), values, values.square()], dim=1))

    chosen = np.arange(len(images)) if indices is None else np.array(indices, dtype=np.int64)
    for first in range(0, len(chosen), batch_size):
        batch = chosen[first : first + batch_size]
        x_0 = to_x_0(_pixels(images, batch, scale), scale).to(device)
        conditions = {}
        if class_labels is not None:
            conditions["class_labels"] = torch.from_numpy(np.asarray(class_labels)[batch]).to(device)
        bound = prior_term(scheduler, x_0)
        add(num_steps, bound)
        for t in draw_timesteps(probability, seed, batch).unbind(dim=1):
            seeds = hashed(seed, _NOISE, batch * num_steps + t.numpy()).tolist()
            noise = [torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
            device_t = t.to(device)
            x_t = scheduler.add_noise(x_0, torch.stack(noise).to(device), device_t)
            output = unet(x_t.to(getattr(unet, "dtype", x_t.dtype)), device_t, **conditions).sample
            exact = output.to(precise), x_0.to(precise), x_t.to(precise)
            term = variational_bound(scheduler, *exact, device_t, max_value)
            term = term.cpu().double()
            add(t, term)
            bound = bound + term / probability[t]
        add(num_steps + 1, bound)
    return sums


def prior_term(scheduler: DDPMScheduler, x_0: Tensor) -> Tensor:
    """Compute L_T of Ho et al. 2020, Eq. 5, in which there is no network.

    With alpha_bar that of t = T - 1, in nats,

    KL(N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I) || N(0, I)) = (alpha_bar (x_0^2 - 1) - log(1 - alpha_bar)) / 2

    Args:
        x_0: (B, C, H, W) in [-1, 1].

    Returns:
        The mean over dimensions in bits, (B,) float64 on the CPU.
    """
    alpha_bar = scheduler.alpha_bar[-1]
    mean_square = x_0.cpu().double().square().flatten(1).mean(dim=1)
    return (alpha_bar * (mean_square - 1) - torch.log1p(-alpha_bar)) / 2 / math.log(2)


def inclusion_probabilities(scheduler: DDPMScheduler, num_timesteps: int | None) -> Tensor:
    """Compute pi_t, the probability that t is one of an image's K steps; their sum is K, and all are 1 for K = T.

    pi_0 = 1,  pi_t = min(1, c (3 w_t / sum_s w_s + 1 / (T - 1))),  w_t = log((1 - alpha_bar_t)/(1 - alpha_bar_{t-1}))

    As T grows, w_t is twice the L_t of data ~ N(0, I), whose best x_0_hat is sqrt(alpha_bar_t) x_t. The even part is
    for networks whose terms are others: no weight 1 / pi_t is above 4 (T - 1) / (K - 1).

    Args:
        num_timesteps: K. None: T.

    Returns:
        (T,) float64.

    Raises:
        UsageError: When K is not in [2, T].
    """
    num_train = len(scheduler)
    if num_timesteps is None or num_timesteps == num_train:
        return torch.ones(num_train, dtype=torch.float64)
    if not 2 <= num_timesteps < num_train:
        raise UsageError(
            f"timesteps_per_image must be in [2, {num_train}], t = 0 and a share of the others, got {num_timesteps}: "
            "use None for all"
        )
    w = torch.log1p(-scheduler.alpha_bar).diff()
    density = 3 * w / w.sum() + 1 / len(w)
    is_below_1 = torch.ones_like(density, dtype=torch.bool)
    while True:
        # What the steps of probability 1 leave is divided among the others, which may raise some of them to 1.
        remaining = num_timesteps - 1 - int((~is_below_1).sum())
        pi = torch.where(is_below_1, density * remaining / density[is_below_1].sum(), 1.0)
        if pi.max() <= 1:
            return torch.cat([torch.ones(1, dtype=torch.float64), pi])
        is_below_1 &= pi < 1


def draw_timesteps(probability: Tensor, seed: int, images: np.ndarray) -> Tensor:
    """Draw K steps for each image by systematic sampling (Madow 1949).

    Step t has the interval of length pi_t in the running sum of pi. The K steps are those whose intervals hold
    u, u + 1, ..., u + K - 1, where u ~ U[0, 1) is a function of the seed and the image's number.

    Args:
        probability: pi_t, (T,), of sum K.
        images: The numbers of B images.

    Returns:
        (B, K) int64, rising for each image.
    """
    # u has 32 bits, so that u + k is exact and below k + 1.
    u = torch.from_numpy((hashed(seed, _CHOICE, images) >> np.uint64(32)).astype(np.float64) * 2.0**-32)
    points = u[:, None] + torch.arange(round(float(probability.sum())))
    return torch.searchsorted(probability.cumsum(0), points, right=True).clamp(max=len(probability) - 1)


def draw_bound(likelihood: Likelihood, path: str | Path) -> None:
    """Write L_t over t as a PNG file with a logarithmic axis; a value that is not finite leaves a gap."""
    is_measured = likelihood.term_counts > 0
    timesteps = is_measured.nonzero().flatten().tolist()
    terms = likelihood.terms[is_measured].tolist()
    errors = likelihood.term_standard_errors[is_measured].tolist()
    draw_curves(
        path,
        [Curve("mean over the images", timesteps, terms, errors)],
        title="Terms of the variational bound",
        x_label="timestep t",
        y_label="$L_t$ in bits per dimension\n(lower is better)",
        log_y=True,
    )


def _pixels(images: Any, batch: np.ndarray, scale: Scale) -> Tensor:
    """Return the images of these numbers, (B, C, H, W) uint8, or of arrays in their own type."""
    pixels = [np.array(images[int(i)]) for i in batch]
    kinds = sorted({(x.shape, str(x.dtype)) for x in pixels})
    dtype = scale.dtype if isinstance(scale, ValueRange) else "uint8"
    if len(kinds) > 1 or kinds[0][1] != dtype or len(kinds[0][0]) != 3:
        raise UsageError(
            f"images must be uint8 of one shape (C, H, W), got {kinds}: the decoder is one of 256 values. Crop to one "
            "size; load 16-bit images without preserve_input_precision"
        )
    return as_tensor(np.stack(pixels))
