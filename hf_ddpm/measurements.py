"""Linear measurements of images, y = A x + noise, and what they tell of x_0; formulas without a network.

operator    A as a function: images (B, C, H, W) -> measurements (B, ...), each of its image alone. It is linear, and
            made of operations of torch, so that autograd gives its adjoint A^T
noise       N(0, sigma_y^2 I) in the measurement
C           Cov[x_0 | x_t], which is (1 - alpha_bar_t) / sqrt(alpha_bar_t) times the Jacobian of E[x_0 | x_t] = x_0_hat
            (Meng et al. 2021, arXiv 2111.04726)

Known pixels are the measurement whose A sets the others to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ddpm.image_inputs import images_to_tensor, masks_to_tensor

Operator = Callable[[Tensor], Tensor]

# The largest relative error of a linear function. That of convolutions in TensorFloat-32 is about 5e-4.
_TOLERANCE = 2e-3


def downsample(factor: int) -> Operator:
    """Return the operator that averages squares of pixels.

    Args:
        factor: The side of a square in pixels, which divides the height and the width of the images.

    Returns:
        A function (B, C, H, W) -> (B, C, H / factor, W / factor).

    Raises:
        ValueError: When the factor is no whole number of at least 1; the operator raises it when it does not divide
            the size.
    """
    _require_count("factor", factor)

    def operator(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"factor must divide the height and the width of the images, {height} and {width}, got {factor}"
            )
        return F.avg_pool2d(x, factor)

    return operator


def blur(kernel: float | Tensor) -> Operator:
    """Return the operator that replaces each pixel by a weighted sum of its neighbors.

    Args:
        kernel: The weights, (h, w) with odd h and w, the middle one that of the pixel itself; or a number, the
            standard deviation in pixels of a Gaussian, whose weights have the sum 1 and end after three of them.

    Returns:
        A function (B, C, H, W) -> (B, C, H, W). Pixels beyond the edge are as the nearest one on it.

    Raises:
        ValueError: When the kernel is no such number or tensor.
    """
    if isinstance(kernel, Tensor):
        if kernel.ndim != 2 or not all(size % 2 for size in kernel.shape) or not bool(kernel.isfinite().all()):
            raise ValueError(
                "kernel must be finite weights (h, w) with odd h and w, got the shape "
                f"{tuple(kernel.shape)}: pad it with zeros"
            )
        weights = kernel
    else:
        weights = _gaussian_kernel(kernel)
    height, width = weights.shape

    def operator(x: Tensor) -> Tensor:
        channels = x.shape[1]
        padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
        return F.conv2d(padded, weights.to(x).expand(channels, 1, -1, -1), groups=channels)

    return operator


def mask(mask_image: Any) -> Operator:
    """Return the operator that keeps the pixels under the black part of a mask, and sets the others to 0.

    Args:
        mask_image: One mask, as of `DDPMInpaintPipeline`: what is white is not measured.

    Returns:
        A function (B, C, H, W) -> (B, C, H, W), which raises a ValueError when the mask has another size.
    """

    @lru_cache(maxsize=1)
    def is_measured(height: int, width: int) -> Tensor:
        return ~masks_to_tensor(mask_image, 1, height, width)

    def operator(x: Tensor) -> Tensor:
        return torch.where(is_measured(*x.shape[2:]).to(x.device), x, 0)

    return operator


def posterior_mean(
    x_0_hat: Tensor,
    x_t: Tensor,
    measurement: Tensor,
    operator: Operator,
    noise_std: float,
    alpha_bar: float,
    num_gradients: int,
) -> Tensor:
    """Return E[x_0 | x_t, y], where p(x_0 | x_t) is taken for a normal distribution; Rozet et al. 2024, Sec. 4.

    Moment matching (arXiv 2405.13712) has, for y = A x_0 + sigma_y N(0, I)::

        x_0_hat + C A^T (sigma_y^2 I + A C A^T)^{-1} (y - A x_0_hat),    C = s J,    J = d x_0_hat / d x_t

    s = (1 - alpha_bar_t) / sqrt(alpha_bar_t). Computed is the same with J and sigma_y^2 / s in the place of C and
    sigma_y^2, which is finite for alpha_bar_t = 0, too. Conjugate gradients solve the system in as many iterations as
    there are gradients. An image whose C is not positive, as that of a network that is wrong at this x_t may be, keeps
    what it has.

    Args:
        x_0_hat: (B, C, H, W), computed from `x_t` with autograd's graph.
        x_t: (B, C, H, W), a leaf of that graph.
        measurement: y, (B, ...).
        operator: A.
        noise_std: sigma_y in the units of x_0, at least 0.
        alpha_bar: alpha_bar_t in [0, 1).
        num_gradients: The number of iterations, each with one gradient through the network.

    Returns:
        The mean, (B, C, H, W).
    """
    damping = noise_std**2 * math.sqrt(alpha_bar) / (1 - alpha_bar)
    with torch.enable_grad():
        predicted = operator(x_0_hat)
    mean, residual = x_0_hat.detach(), measurement - predicted.detach()
    direction, power = residual, _dot(residual, residual)
    for i in range(num_gradients):
        (moved,) = torch.autograd.grad(predicted, x_t, direction, retain_graph=i + 1 < num_gradients)
        seen = operator(moved)
        curvature = _dot(direction, seen)
        length = torch.where(curvature > 0, power / (curvature + damping * _dot(direction, direction)), 0)
        mean = mean + length.view(-1, 1, 1, 1) * moved
        residual = residual - length * (seen + damping * direction)
        previous_power, power = power, _dot(residual, residual)
        direction = residual + torch.where(previous_power > 0, power / previous_power, 0) * direction
    return mean


def project(x: Tensor, measurement: Tensor, operator: Operator) -> Tensor:
    """Return the nearest image whose measurement without noise is y, where one step leads to it.

    ::

        x + A^T (A A^T)^{-1} (y - A x)

    One step does where A A^T is a multiple of the identity on what is measured, as that of `mask` and `downsample`. An
    image for which it does not, as of `blur`, stays what it is: there the inverse would amplify the smallest error.

    Args:
        x: (B, C, H, W).
        measurement: y, (B, ...).
        operator: A.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        seen = operator(leaf)
    residual = measurement - seen.detach()
    (back,) = torch.autograd.grad(seen, leaf, residual)
    forward = operator(back)
    length = _dot(residual, forward) / _dot(forward, forward)
    rest = residual - length * forward
    leads_to_it = _dot(rest, rest) <= _TOLERANCE**2 * _dot(residual, residual)
    return torch.where(leads_to_it.view(-1, 1, 1, 1), x + length.view(-1, 1, 1, 1) * back, x)


def measurements_to_tensor(
    measurement: Any, operator: Operator, image_shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Return measurements as a tensor (B, ...) float32, after a look at the operator.

    Args:
        measurement: Measurements of B images: a floating-point tensor (B, ...), or (...) for one; or, where the
            operator gives images, images of their size in any of the usual forms.
        operator: A.
        image_shape: (C, H, W) of the images that A takes.
        device: Where A computes.

    Raises:
        ValueError: When the operator gives no tensor, has no gradient, is not linear or has no measurement of an image
            of this shape, or when the measurement has another shape or is not finite.
    """
    shape = _measured_shape(operator, image_shape, device)
    is_image = len(shape) == 3
    if isinstance(measurement, Tensor) and measurement.is_floating_point():
        y = measurement[None] if measurement.shape == shape else measurement
    elif is_image:
        y = images_to_tensor(measurement, *shape, name="measurement")
    else:
        raise ValueError(f"measurement must be a floating-point tensor, got {type(measurement).__name__}")
    if y.shape[1:] != shape or len(y) == 0:
        raise ValueError(
            f"measurement must have the shape that the operator gives for each image, {shape}, got "
            f"{tuple(measurement.shape)}: apply the operator to an image of the model's size to compare"
        )
    if not bool(y.isfinite().all()):
        raise ValueError("measurement must be finite, got NaN or infinity: a mask leaves pixels out")
    return y.to(device, torch.float32)


def _measured_shape(operator: Operator, image_shape: tuple[int, int, int], device: torch.device) -> tuple[int, ...]:
    """Return the shape of the measurement of one image, after a check that the operator is linear: of 0, u, v, u - 2v.

    With 0 and multiples alone the absolute value would pass.
    """
    u, v = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.enable_grad():
        images = torch.stack([0 * u, u, v, u - 2 * v]).requires_grad_()
        try:
            measured: Any = operator(images)
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"operator must take images (B, {', '.join(map(str, image_shape))}) and be made of operations of "
                f"torch that have gradients, got {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    if not isinstance(measured, Tensor):
        raise ValueError(f"operator must return a tensor, got {type(measured).__name__}")
    if measured.ndim < 2 or len(measured) != len(images) or not measured.is_floating_point():
        raise ValueError(
            f"operator must return real measurements (B, ...) of B images, each of its image alone, got "
            f"{measured.dtype} of the shape {tuple(measured.shape)} for {len(images)} images"
        )
    if not measured.requires_grad:
        raise ValueError("operator must be made of operations of torch that have gradients, got a result without one")
    zero, of_u, of_v, of_both = measured.detach()
    size = float((of_u.square() + 4 * of_v.square()).mean().sqrt())
    for name, got, expected in (
        ("A(0) = 0", zero, 0 * zero),
        ("A(u - 2 v) = A(u) - 2 A(v)", of_both, of_u - 2 * of_v),
    ):
        error = float((got - expected).square().mean().sqrt())
        if not error <= _TOLERANCE * size:  # NaN fails, too
            raise ValueError(
                f"operator must be linear, {name}, got a difference of {error:.2g}: subtract what it adds, and clip "
                "or round nothing"
            )
    (back,) = torch.autograd.grad(measured, images, measured.detach())
    # <A u, A u> = <u, A^T A u>
    power, adjoint_power = float(_dot(measured, measured).sum()), float((back * images).sum())
    if not abs(power - adjoint_power) <= _TOLERANCE * power:
        raise ValueError(
            f"operator must have the gradient of what it computes, got <A u, A u> = {power:.4g} and <u, A^T A u> = "
            f"{adjoint_power:.4g}: detach and round nothing"
        )
    return tuple(of_u.shape)


def _gaussian_kernel(std: Any) -> Tensor:
    """Return the weights of a Gaussian, (2r + 1, 2r + 1) with the sum 1."""
    if isinstance(std, bool) or not isinstance(std, int | float) or not (math.isfinite(std) and std > 0):
        raise ValueError(f"kernel must be weights (h, w), or a standard deviation above 0 in pixels, got {std!r}")
    radius = math.ceil(3 * std)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * std**2))
    weights = weights / weights.sum()
    return weights[:, None] * weights


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of `a` with that of `b`, (B, 1, ...)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)
