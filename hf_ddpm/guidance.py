"""Guidance: formulas that combine two predictions at one x_t; no network inside.

    prediction   of the model that is to sample: that of the class, or that of the better model
    weaker       of the model to be led away from: without a class, or of a smaller or less trained network
    scale        w, as in diffusers: 1 is no guidance, 0 the weaker prediction alone; above 1 guidance extrapolates
    sigma        sqrt((1 - alpha_bar) / alpha_bar), the ratio of noise to signal
    interval     (low, high]: the sigma at which guidance acts

`guide` is affine: eps, v and x_0_hat all lead to the same x_0_hat. The other formulas depend on norms and angles,
and so on which of the three they are given. The docstring of each says which one its paper means.

Predictions are (B, C, H, W). <a, b> and |a|^2 = <a, a> are sums over (C, H, W), so that each image of a batch is
guided as if it were alone. The computation is in float32 at least, and the result has the type of the input.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_ddpm.names import GUIDANCE_METHODS

GuidanceMethod = Literal["cfg", "cfg-zero*", "apg", "tcfg"]

# Sadat et al. 2024: the eta that the paper recommends, and the momentum of Stable Diffusion XL in its Table 10. There
# the threshold of the norm is another for each model, from 2.5 to 15 in latent space, and so it is a setting.
APG_ETA = 0.0
APG_MOMENTUM = -0.5

_IMAGE = (1, 2, 3)


@dataclass(frozen=True)
class Guidance:
    """The way in which a pipeline guides.

    Args:
        scale: w, finite and at least 0; 1 is no guidance.
        interval: (low, high) with 0 <= low < high: guidance acts where low < sigma <= high; `high` may be
            `math.inf`. None: everywhere.
        rescale: The factor of `rescale`, in [0, 1].
        method: `cfg` (`guide`), `cfg-zero*` (`zero_star`), `apg` (`adaptive_projected`) or `tcfg` (`tangential`). A
            pipeline gives x_0_hat to `apg`, and to the others what its network predicts: eps, v or x_0.
        norm_threshold: r of `apg`, above 0. The norm that it bounds grows with sqrt(C H W).
        autoguidance_scale: w' of `add_autoguidance`, finite and at least 0, of a model of classes: by it a weaker
            version guides at every sigma, while by all the above the model guides itself. 1: none does.

    Raises:
        ValueError: When a value is out of its range, or cannot take effect.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    method: GuidanceMethod = "cfg"
    norm_threshold: float = math.inf
    autoguidance_scale: float = 1.0

    def __post_init__(self):
        for name in ("scale", "rescale", "norm_threshold", "autoguidance_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{_label(name)} must be a number, got {value!r}")
        if self.interval is not None and not _is_pair(self.interval):
            raise ValueError(f"guidance interval must be two numbers, (low, high), got {self.interval!r}")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance scale must be finite and at least 0, got {self.scale}: 1 is no guidance")
        if not (math.isfinite(self.autoguidance_scale) and self.autoguidance_scale >= 0):
            got = self.autoguidance_scale
            raise ValueError(f"autoguidance_scale must be finite and at least 0, got {got}: 1 is no autoguidance")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"guidance interval must be (low, high) with 0 <= low < high, got {self.interval}: "
                "give two values of sigma, or None to guide everywhere"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale must be in [0, 1], got {self.rescale}: 0 leaves it out")
        if self.method not in GUIDANCE_METHODS:
            raise ValueError(f"guidance method must be one of {', '.join(GUIDANCE_METHODS)}, got {self.method!r}")
        if not self.norm_threshold > 0:
            raise ValueError(f"norm_threshold must be above 0, got {self.norm_threshold}: math.inf leaves it out")
        if self.method != "apg" and self.norm_threshold != math.inf:
            raise ValueError(
                f"norm_threshold takes effect only with method='apg', got norm_threshold={self.norm_threshold} with "
                f"method={self.method!r}: leave norm_threshold out"
            )
        if self.scale == 1:
            self._require_defaults()

    def _require_defaults(self) -> None:
        """Raise a ValueError when a setting is given beside a scale at which none can take effect."""
        for name in ("interval", "rescale", "method", "autoguidance_scale"):
            value = getattr(self, name)
            if value != getattr(Guidance, name):
                raise ValueError(
                    f"{_label(name)} takes effect only with guidance, got {name}={value!r} with scale=1: "
                    f"give guidance another scale, or leave {name} out"
                )


def _label(name: str) -> str:
    return name if name == "autoguidance_scale" else f"guidance {name}"


def _is_pair(interval: Any) -> bool:
    is_sequence = isinstance(interval, tuple | list) and len(interval) == 2
    return is_sequence and all(isinstance(end, int | float) and not isinstance(end, bool) for end in interval)


def changed(
    guidance: Guidance | None,
    scale: float | None = None,
    interval: tuple[float, float] | None = None,
    method: GuidanceMethod | None = None,
    autoguidance_scale: float | None = None,
) -> Guidance | None:
    """Return guidance with what is given instead of what it has; None for a scale of 1, which is none.

    Args:
        guidance: The guidance that a model keeps; None: it keeps none.
        scale: The scale. None: that of `guidance`.
        interval: The interval. None: that of `guidance`.
        method: The method. None: that of `guidance`.
        autoguidance_scale: The scale of autoguidance beside it. None: that of `guidance`.

    Raises:
        ValueError: When a value cannot work, or cannot take effect without a scale.
    """
    autoguidance = {} if autoguidance_scale is None else {"autoguidance_scale": autoguidance_scale}
    if scale == 1 or (guidance is None and scale is None):
        Guidance(1.0, interval, method=method or "cfg", **autoguidance)  # which refuses what has no effect
        return None
    settings = {} if guidance is None else asdict(guidance)
    given = {"scale": scale, "interval": interval, "method": method, **autoguidance}
    settings |= {name: value for name, value in given.items() if value is not None}
    if settings.get("method", "cfg") != "apg":
        settings.pop("norm_threshold", None)
    guidance = Guidance(**settings)
    return None if guidance.scale == 1 else guidance


def combine(
    guidance: Guidance, prediction: Tensor, weaker: Tensor, running: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the guided prediction, by the method, scale and rescaling of `guidance`.

    Whether guidance acts at this sigma is decided before, by `in_interval`: where it does not, the weaker network need
    not be evaluated.

    Args:
        guidance: How to guide.
        prediction: The prediction, (B, C, H, W); x_0_hat for the method `apg`.
        weaker: The weaker prediction, (B, C, H, W).
        running: What the previous step of sampling returned as `running`; None in the first.

    Returns:
        The guided prediction, (B, C, H, W), and `running` for the next step, which is None but for `apg`.
    """
    c, u = _in_float32(prediction, weaker)
    next_running = None
    match guidance.method:
        case "cfg":
            guided = guide(c, u, guidance.scale)
        case "cfg-zero*":
            guided = zero_star(c, u, guidance.scale)
        case "tcfg":
            guided = tangential(c, u, guidance.scale)
        case "apg":
            guided, next_running = adaptive_projected(
                c, u, guidance.scale, running, norm_threshold=guidance.norm_threshold
            )
    return rescale(guided, c, guidance.rescale).to(prediction.dtype), next_running


def guide(prediction: Tensor, weaker: Tensor, scale: float) -> Tensor:
    """Return the prediction, extrapolated away from the weaker one.

    ::

        guided = weaker + w (prediction - weaker) = prediction + (w - 1) (prediction - weaker)

    Two methods share this formula. They differ by who the weaker model is::

        classifier-free guidance   eps(x_t) + w (eps(x_t, c) - eps(x_t)), the same network without the class c:
                                   Ho & Salimans 2022 (arXiv 2207.12598), Eq. 6, whose w is ours less 1
        autoguidance               D_0(x_t, c) + w (D_1(x_t, c) - D_0(x_t, c)), a worse network D_0 with the same
                                   class: Karras et al. 2024 (arXiv 2406.02507)

    For exact predictions the result is that of a density proportional to p_weaker^(1-w) p^w at this noise level.
    The second form of the formula is computed. Its last term is 0 for w = 1, which returns `prediction` to the last
    bit.

    Args:
        prediction: eps, v or x_0_hat, (B, C, H, W).
        weaker: The same quantity of the weaker model, (B, C, H, W).
        scale: w.

    Returns:
        The guided prediction, (B, C, H, W).
    """
    c, u = _in_float32(prediction, weaker)
    return (c + (scale - 1) * (c - u)).to(prediction.dtype)


def add_autoguidance(guided: Tensor, prediction: Tensor, weaker: Tensor, scale: float) -> Tensor:
    """Return a prediction that is guided by the class, led away from a weaker network, too.

    The sum of classifier-free guidance and autoguidance, with D_1 the network, D_0 the weaker one and c the class::

        D_1(x_t, c) + (w - 1) (D_1(x_t, c) - D_1(x_t)) + (w' - 1) (D_1(x_t, c) - D_0(x_t, c))

    The first leads to the class, and away from the variety of the data; the second corrects what the network has not
    learned well: Karras et al. 2024 (arXiv 2406.02507).

    Args:
        guided: The prediction after guidance by the class, (B, C, H, W).
        prediction: The prediction before it, (B, C, H, W).
        weaker: The prediction of the weaker network with the same class, (B, C, H, W).
        scale: w'; 1 returns `guided` to the last bit.

    Returns:
        The guided prediction, (B, C, H, W).
    """
    c, u = _in_float32(prediction, weaker)
    return (guided + (scale - 1) * (c - u)).to(guided.dtype)


def rescale(guided: Tensor, prediction: Tensor, factor: float) -> Tensor:
    """Return the guided prediction with a standard deviation nearer to that of the prediction.

    Lin et al. 2024 (arXiv 2305.08891), Eq. 14 to 16, with std over the pixels of an image and phi the factor::

        phi guided std(prediction) / std(guided) + (1 - phi) guided

    The paper's quantity is the network's output, which is v there.

    Args:
        guided: The guided prediction, (B, C, H, W).
        prediction: The prediction before guidance, (B, C, H, W).
        factor: phi, in [0, 1]; 0 returns `guided` to the last bit. The paper uses 0.7.

    Returns:
        The rescaled prediction, (B, C, H, W). A constant guided image has no std to rescale and stays what it is.
    """
    g, c = _in_float32(guided, prediction)
    ratio = _quotient(_std(c), _std(g), at_zero=1.0)
    return (g * (1 + factor * (ratio - 1))).to(guided.dtype)


def zero_star(prediction: Tensor, weaker: Tensor, scale: float) -> Tensor:
    """Return the prediction guided by CFG-Zero*, which first fits the weaker prediction to the other.

    Fan et al. 2025 (arXiv 2503.18886), Sec. 4.1::

        s* = <prediction, weaker> / |weaker|^2, for which |prediction - s* weaker| is smallest
        guided = s* weaker + w (prediction - s* weaker)

    The paper's quantity is the velocity of flow matching. Its other part, a velocity of zero in the first steps, is
    for flow matching alone and is left out.

    Args:
        prediction: The prediction, (B, C, H, W).
        weaker: The weaker prediction, (B, C, H, W); s* is 0 where it is 0.
        scale: w; 1 returns `prediction` to the last bit.

    Returns:
        The guided prediction, (B, C, H, W).
    """
    c, u = _in_float32(prediction, weaker)
    fit = _quotient(_dot(c, u), _dot(u, u), at_zero=0.0)
    return guide(c, fit * u, scale).to(prediction.dtype)


def adaptive_projected(
    prediction: Tensor,
    weaker: Tensor,
    scale: float,
    running: Tensor | None = None,
    *,
    eta: float = APG_ETA,
    norm_threshold: float = math.inf,
    momentum: float = APG_MOMENTUM,
) -> tuple[Tensor, Tensor]:
    """Return the prediction guided by adaptive projected guidance (APG), and the running difference.

    Sadat et al. 2024 (arXiv 2410.02416), Algorithm 1; the paper's quantity is x_0_hat::

        running = prediction - weaker + momentum running
        difference = min(1, r / |running|) running
        parallel = <difference, prediction> / |prediction|^2 prediction
        guided = prediction + (w - 1) (difference - parallel + eta parallel)

    The parallel part saturates colors, and eta weighs it. With eta = 1, momentum 0 and no threshold this is `guide`.

    Args:
        prediction: x_0_hat, (B, C, H, W); where it is 0 there is no parallel part.
        weaker: x_0_hat of the weaker model, (B, C, H, W).
        scale: w; 1 returns `prediction` to the last bit.
        running: The running difference that the previous step returned, (B, C, H, W); None in the first step.
        eta: The weight of the parallel part; the paper recommends 0.
        norm_threshold: r, above 0, the largest norm of the difference over (C, H, W); `math.inf` bounds nothing. The
            paper has one for each model.
        momentum: The weight of the running difference; the paper's are negative.

    Returns:
        The guided x_0_hat, (B, C, H, W), and the running difference for the next step, (B, C, H, W) float32 at least.
    """
    c, u = _in_float32(prediction, weaker)
    new_running = c - u if running is None else c - u + momentum * running
    norm = _dot(new_running, new_running).sqrt()
    difference = new_running * (norm_threshold / norm).clamp(max=1)
    parallel = _quotient(_dot(difference, c), _dot(c, c), at_zero=0.0) * c
    guided = c + (scale - 1) * (difference + (eta - 1) * parallel)
    return guided.to(prediction.dtype), new_running


def tangential(prediction: Tensor, weaker: Tensor, scale: float) -> Tensor:
    """Return the prediction guided by tangential damping (TCFG), which first filters the weaker prediction.

    Kwon et al. 2025 (arXiv 2503.18137). The weaker prediction keeps only its part along the first right singular
    vector of the matrix with the rows `prediction` and `weaker`. A matrix of two rows has its singular value
    decomposition in closed form. With (cos a, sin a) its first left singular vector::

        tan 2a = 2 <prediction, weaker> / (|prediction|^2 - |weaker|^2)
        filtered = sin a (cos a prediction + sin a weaker)
        guided = filtered + w (prediction - filtered)

    The paper's quantity is the score, and so eps.

    Args:
        prediction: The prediction, (B, C, H, W).
        weaker: The weaker prediction, (B, C, H, W).
        scale: w; 1 returns `prediction` to the last bit.

    Returns:
        The guided prediction, (B, C, H, W).
    """
    c, u = _in_float32(prediction, weaker)
    angle = torch.atan2(2 * _dot(c, u), _dot(c, c) - _dot(u, u)) / 2
    filtered = angle.sin() * (angle.cos() * c + angle.sin() * u)
    return guide(c, filtered, scale).to(prediction.dtype)


def in_interval(sigma: float, low: float, high: float) -> bool:
    """Return whether guidance acts at a noise level, low < sigma <= high; Kynkäänniemi et al. 2024, arXiv 2404.07724.

    Args:
        sigma: sqrt((1 - alpha_bar) / alpha_bar), in [0, inf].
        low: The lower end, which does not belong to the interval.
        high: The upper end, which does; `math.inf` is above all.
    """
    return low < sigma <= high


def _in_float32(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one type, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> of each image, (B, 1, 1, 1)."""
    return (a * b).sum(dim=_IMAGE, keepdim=True)


def _std(x: Tensor) -> Tensor:
    """Return the standard deviation of each image, (B, 1, 1, 1)."""
    # The mean of equal values may be rounded. Without the first value they are 0, and so is their std.
    return (x - x[:, :1, :1, :1]).std(dim=_IMAGE, correction=0, keepdim=True)


def _quotient(a: Tensor, b: Tensor, at_zero: float) -> Tensor:
    """Return a / b, or `at_zero` where b = 0."""
    return torch.where(b == 0, at_zero, a / b)
