"""Muon for the matrices of the network's blocks, AdamW for all else.

A convolution's weight of shape (O, I, h, w) is the matrix (O, I h w). Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/) replaces the momentum M of a matrix by the nearest one whose singular
values are equal; so does `torch.optim.Muon`, but of parameters that are matrices, one after the other.

    M <- mu M + (1 - mu) G
    W <- W - lr (0.2 sqrt(max(rows, columns)) orthogonal(mu M + (1 - mu) G) + weight_decay W)

The factor gives the update the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, Eq. 4), so that both take rates of
one scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hf_ddpm.training.config import TrainingConfig

# Their matrices are Muon's; those that read images, timesteps and classes, and the one that writes images, are not.
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
MOMENTUM = 0.95
# Of the quintic a x + b x^3 + c x^5, which five times over brings singular values in (0, 1] near 1 (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def make_optimizer(unet: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of a run: fused AdamW, of all or of what is not Muon's."""
    adam: dict[str, Any] = {
        "lr": config.peak_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(unet.parameters(), **adam, fused=True)
    matrices, others = [], []
    for name, parameter in unet.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.startswith(BLOCKS) and "time_emb_proj" not in name
        (matrices if is_matrix else others).append(parameter)
    # Float32 where bfloat16 is not what the run was asked to compute in.
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return Muon(matrices, others, dtype=dtype, **adam)


class Muon(torch.optim.Optimizer):
    """Muon with AdamW beside it; both leave weights and state as they are when `found_inf`, a tensor, is 1.

    Args:
        matrices: of 2 dimensions or more.
        others: for AdamW, fused.
        lr, weight_decay: of both.
        betas, eps: of AdamW.
        dtype: of the products that make a matrix orthogonal.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
    ):
        self.dtype = dtype
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        # By this word torch puts the step numbers of a state that it loads where their parameters are.
        super().__init__([{"params": matrices}, {"params": others, "fused": True}], settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient."""
        matrices, others = self.param_groups
        self._step_of_matrices(matrices)
        self._step_of_others(others)

    def _step_of_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            momentum: Tensor = self.state[p]["momentum_buffer"]
            mixed = torch.lerp(momentum, p.grad, 1 - MOMENTUM)
            if self.found_inf is not None:
                mixed = torch.where(self.found_inf.bool(), momentum, mixed)
            momentum.copy_(mixed)
            nesterov = torch.lerp(p.grad, momentum, MOMENTUM)
            whole = nesterov.full_tensor() if hasattr(nesterov, "full_tensor") else nesterov  # pyright: ignore[reportAttributeAccessIssue]
            matrix = whole.reshape(len(whole), -1)
            alike.setdefault((matrix.shape[0], matrix.shape[1]), []).append((p, matrix))
        for (rows, columns), found in alike.items():
            directions = orthogonal(torch.stack([matrix for _, matrix in found]), self.dtype)
            for (p, _), direction in zip(found, directions, strict=True):
                whole = (0.2 * max(rows, columns) ** 0.5 * direction).view(p.shape).to(p.dtype)
                update = _sharded_as(whole, p).add(p, alpha=group["weight_decay"])
                if self.found_inf is not None:
                    update = torch.where(self.found_inf.bool(), 0.0, update)
                p.add_(update, alpha=-group["lr"])

    def _step_of_others(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        held = {kind: [self.state[p][kind] for p in parameters] for kind in ("step", "exp_avg", "exp_avg_sq")}
        adamw(
            parameters,
            [p.grad for p in parameters],
            held["exp_avg"],
            held["exp_avg_sq"],
            [],
            held["step"],
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
    """U V^T of each matrix U S V^T, roughly, by five Newton-Schulz iterations: singular values are between 0.6 and
    1.2 but for those that were near 0.

    Args:
        matrices: (N, rows, columns).
        dtype: of the products.

    Returns: (N, rows, columns) of `dtype`.
    """
    X = matrices.to(dtype)
    is_tall = X.shape[1] > X.shape[2]
    X = X.mT if is_tall else X
    # The Frobenius norm is no less than the largest singular value.
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X


def _sharded_as(whole: Tensor, like: Tensor) -> Tensor:
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements)
