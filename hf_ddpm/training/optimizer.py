"""Muon for the matrices of the network's blocks, AdamW for all else.

A convolution's weight of shape (O, I, h, w) is the matrix (O, I h w). Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/) replaces the momentum M of a matrix by the nearest one whose singular
values are equal.

    M <- mu M + (1 - mu) G
    W <- W - lr (0.2 sqrt(max(rows, columns)) orthogonal(mu M + (1 - mu) G) + weight_decay W)

The factor gives the update the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, Eq. 4), so that both take learning
rates of one scale.

Why not `torch.optim.Muon`: it refuses parameters that are not matrices, and so convolutions. It always computes in
bfloat16, and one matrix after the other. It knows no `found_inf`, so that a skipped step would wait for the device. It
does not gather sharded matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.averages import gathered, local, scattered
from hf_ddpm.training.config import TrainingConfig

# Muon takes the matrices of these. It does not take those that read images, timesteps and classes, nor the one that
# writes images.
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
MOMENTUM = 0.95
# The coefficients of a x + b x^3 + c x^5, which applied five times brings singular values in (0, 1] near 1 (Jordan et
# al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def make_optimizer(unet: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a run: fused AdamW for all parameters, or Muon with AdamW beside it.

    Raises:
        UsageError: When the network has no matrices for Muon, whose learning rate AdamW alone could not take.
    """
    adam: dict[str, Any] = {
        "lr": config.peak_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(unet.parameters(), **adam, fused=True)
    matrices, rest = [], []
    for name, parameter in unet.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.startswith(BLOCKS) and "time_emb_proj" not in name
        (matrices if is_matrix else rest).append(parameter)
    if not matrices:
        raise UsageError(
            f"optimizer must be adamw for a network without {', '.join(BLOCKS)}, got muon for a {type(unet).__name__}"
        )
    # bfloat16 only where the run computes in it.
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return Muon(matrices, rest, dtype=dtype, **adam)


class Muon(torch.optim.Optimizer):
    """The optimizer Muon, AdamW beside it; both keep weights and state as they are when `found_inf`, a tensor, is 1.

    Args:
        matrices: The parameters for Muon, of 2 dimensions or more.
        rest: The parameters for AdamW, fused.
        lr: The learning rate of both.
        betas: The betas of AdamW.
        weight_decay: The weight decay of both.
        eps: The epsilon of AdamW.
        dtype: The type of the products that make a matrix orthogonal.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
    ):
        self.dtype = dtype
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        # "fused" makes torch put the step numbers of a loaded state on the parameters' device.
        super().__init__([{"params": matrices}, {"params": rest, "fused": True}], settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step with all parameters that have a gradient."""
        matrices, rest = self.param_groups
        self._step_muon(matrices)
        self._step_adamw(rest)

    def _step_muon(self, group: dict[str, Any]) -> None:
        by_shape: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            by_shape.setdefault(p.shape, []).append(p)
        for parameters in by_shape.values():
            self._step_alike(parameters, group["lr"], group["weight_decay"])

    def _step_alike(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Take one step with parameters of one shape, all at once: each operation takes the host's time."""
        weights = [local(p) for p in parameters]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        momentum, gradient = torch.stack(momenta), torch.stack(gradients)
        is_skipped = None if self.found_inf is None else self.found_inf.bool()
        if is_skipped is not None:
            gradient = torch.where(is_skipped, momentum, gradient)  # then both lerps leave the momentum as it is
        momentum.lerp_(gradient, 1 - MOMENTUM)
        torch._foreach_copy_(momenta, momentum.unbind())
        whole = gathered(parameters, gradient.lerp_(momentum, MOMENTUM))
        matrices = whole.flatten(2)
        size = 0.2 * max(matrices.shape[1:]) ** 0.5
        directions = (size * orthogonal(matrices, self.dtype)).view(whole.shape).to(whole.dtype)
        update = scattered(parameters, directions)
        torch._foreach_add_(update.unbind(), weights, alpha=weight_decay)
        if is_skipped is not None:
            update.masked_fill_(is_skipped, 0.0)
        torch._foreach_add_(weights, update.unbind(), alpha=-lr)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        state = {kind: [self.state[p][kind] for p in parameters] for kind in ("step", "exp_avg", "exp_avg_sq")}
        adamw(
            parameters,
            [p.grad for p in parameters],
            state["exp_avg"],
            state["exp_avg_sq"],
            [],
            state["step"],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate U V^T of each matrix U S V^T by five Newton-Schulz iterations.

    The singular values of the result lie between 0.6 and 1.2, except those that were near 0.

    Args:
        matrices: (N, rows, columns).
        dtype: The type of the products.

    Returns:
        (N, rows, columns) of `dtype`.
    """
    X = matrices.to(dtype)
    is_tall = X.shape[1] > X.shape[2]
    X = X.mT if is_tall else X
    # The Frobenius norm is no less than the largest singular value.
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        A = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X
