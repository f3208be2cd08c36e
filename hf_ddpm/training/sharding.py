"""The distribution of a run: the loop and its checkpoints know DDP and FSDP 2 only through these functions.

                     weights    gradients    moments of the optimizer
    one process      full       full         full
    DDP              full       full         full
    FSDP 2           sharded    sharded      sharded

With each of them the weights are float32 and the network runs under autocast, and the optimizer skips a step
whose gradients are not finite: its attribute `found_inf` tells it to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.averages import assign, full, local, sharded_like
from hf_ddpm.training.optimizer import Muon

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def check(accelerator: Accelerator) -> None:
    """Check that the processes are distributed as the launcher was told, and in a way that is supported.

    Raises:
        UsageError: When they are not.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if accelerator.distributed_type != "FSDP":
            raise UsageError(
                f"FSDP must run on an accelerator, got {accelerator.device.type}, where Accelerate does not use it: "
                "leave it out"
            )
        if not accelerator.is_fsdp2:
            raise UsageError("fsdp_version must be 2, got 1: averages are kept by the names of parameters")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != accelerator.num_processes:
        raise UsageError(
            f"{world_size} processes were launched, but Accelerate sees {accelerator.num_processes}: use the "
            "configuration of `accelerate config` for this machine, on a CPU with ACCELERATE_USE_CPU=true"
        )


def keep_inputs(accelerator: Accelerator) -> None:
    """Let FSDP give the network its inputs in their own type: in bfloat16 a label would become another one.

    Under autocast each operation of the network chooses its type by itself.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)


def autocast(device: torch.device, precision: str | None) -> torch.autocast:
    """Return the autocast that the network runs under, also outside of the model that Accelerate prepared."""
    dtype = AUTOCAST[precision or "no"]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def under_autocast(model: Any, device: torch.device, precision: str | None) -> Callable[..., Any]:
    """Return a function that calls the model under the autocast of `precision`."""

    def network(*arguments: Any, **options: Any) -> Any:
        with autocast(device, precision):
            return model(*arguments, **options)

    return network


def gradient_sync(accelerator: Accelerator, model: Any, is_last: bool) -> AbstractContextManager[None]:
    """Return the context for forward and backward of one micro-batch, in which only the last exchanges gradients."""
    return nullcontext() if is_last else accelerator.no_sync(model)


def step(
    accelerator: Accelerator, parameters: Sequence[Tensor], optimizer: Any, lr: float, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip the gradients, step with learning rate `lr` unless a gradient is not finite, and clear the gradients.

    Returns:
        The norm of the gradients before clipping, float32 (), and whether the step was skipped because that norm is
        not finite, bool (). Both stay on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm: Any = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    norm = full(norm)
    is_bad = ~norm.isfinite()
    if accelerator.scaler is None:
        # GradScaler, too, tells a fused optimizer in this way to leave everything as it is: nothing waits for the
        # device.
        optimizer.optimizer.found_inf = is_bad.float()
    optimizer.step()
    optimizer.zero_grad()
    return norm, is_bad


def reshard(unet: Any) -> None:
    """Free what FSDP gathered for a forward pass without backward, as the next one would not see changed weights."""
    for module in unet.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Return whether all processes are needed to gather the tensors."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors)


def full_tensors(names: Sequence[str], tensors: Sequence[Tensor], is_kept: bool = True) -> dict[str, Tensor]:
    """Return the tensors by name, full and on the CPU; all processes must call it where they are sharded.

    Args:
        names: Their names.
        tensors: The tensors.
        is_kept: False on a process that only helps to gather them: it holds one at a time, and returns none.
    """
    whole = {}
    for name, tensor in zip(names, tensors, strict=True):
        value = full(tensor)
        if is_kept:
            whole[name] = value.detach().cpu().contiguous()
    return whole


def full_moments(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, is_kept: bool = True
) -> dict[str, Tensor]:
    """Return the tensors of the optimizer's state as `full_tensors` does.

    Returns:
        Tensors by "parameter/kind", as in "conv_in.weight/exp_avg"; none before the first step.
    """
    moments = {
        f"{name}/{kind}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    return full_tensors(list(moments), list(moments.values()), is_kept)


def bytes_held(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes that this process holds after the first step, by what they hold."""
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    held = {
        "weights": list(parameters),
        "gradients": [p for p in parameters if p.requires_grad],
        "moments": moments,
    }
    return {name: sum(local(tensor).nbytes for tensor in tensors) for name, tensors in held.items()}


def load_into(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy full tensors into `targets` by name; a sharded target takes its shard.

    Raises:
        KeyError: When a name of `targets` is missing in `values`.
    """
    assign(list(targets.values()), [sharded_like(target, values[name]) for name, target in targets.items()])


def load_moments(
    moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Set the state of the optimizer to what `full_moments` returned.

    Raises:
        KeyError: When `moments` names a parameter that does not exist.
        UsageError: When the moments are those of the other optimizer.
    """
    saved = "muon" if any(key.endswith("/momentum_buffer") for key in moments) else "adamw"
    requested = "muon" if isinstance(optimizer, Muon) else "adamw"
    if moments and saved != requested:
        raise UsageError(f"optimizer must be {saved}, whose moments the checkpoint holds, got {requested}")
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {id(p): index for index, p in enumerate(in_groups)}
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        is_scalar = value.ndim == 0  # The number of steps: neither sharded nor on the device.
        states.setdefault(index_of[id(parameter)], {})[kind] = value if is_scalar else sharded_like(parameter, value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
