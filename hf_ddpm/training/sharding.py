"""What differs between the engines by which Accelerate distributes a run; the loop and its checkpoints know them only
through these functions.

              weights    gradients    optimizer    a step without finite gradients is skipped by
    one, DDP  whole      whole        whole        the optimizer, told by its attribute found_inf
    FSDP 2    sharded    sharded      sharded      the same
    ZeRO-1    whole      whole        sharded      DeepSpeed
    ZeRO-2    whole      sharded      sharded      DeepSpeed

With each of them weights are float32 and the network runs under autocast. DeepSpeed's own bf16, which is left out,
would have it see rounded weights, also where autocast does not round.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.averages import assign, local
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.optimizer import Muon

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# DeepSpeed's settings that are the run's own, and those that would be a second way to say what the run says.
OURS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
REFUSED = ("optimizer", "scheduler", "torch_autocast")
OLDEST_DEEPSPEED = (0, 19, 8)


def backend() -> str | None:
    """How processes talk to each other, if Accelerate has to be told: it knows DeepSpeed on accelerators only.

    Raises: UsageError for DeepSpeed without a launcher.
    """
    if not _is_asked_for("DEEPSPEED"):
        return None
    if "RANK" not in os.environ:
        raise UsageError("DeepSpeed was asked for, but this process has no RANK: start it by `accelerate launch`")
    return None if torch.accelerator.is_available() else "gloo"


def check(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Raises UsageError if the processes are not distributed as the launcher was told, or in a way that we cannot."""
    for name in ("FSDP", "DEEPSPEED"):
        if _is_asked_for(name) and accelerator.distributed_type != name:
            raise UsageError(
                f"{name} was asked for, but Accelerate does not use it on {accelerator.device.type}: leave it out"
            )
    if _is_asked_for("FSDP") and not accelerator.is_fsdp2:
        raise UsageError("fsdp_version must be 2, got 1: its flat parameters have no averages by name")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != accelerator.num_processes:
        raise UsageError(
            f"{world_size} processes were launched, but Accelerate sees {accelerator.num_processes}: use the "
            "configuration of `accelerate config` for this machine, on a CPU with ACCELERATE_USE_CPU=true"
        )
    if _is_deepspeed(accelerator):
        if config.optimizer != "adamw":
            raise UsageError(
                f"optimizer must be adamw with DeepSpeed, whose processes hold parts of matrices, got "
                f"{config.optimizer}: --optimizer adamw, or FSDP"
            )
        _check_deepspeed(accelerator)


def _check_deepspeed(accelerator: Accelerator) -> None:
    installed, settings = version("deepspeed"), _deepspeed_config(accelerator)
    if tuple(map(int, re.findall(r"\d+", installed)[:3])) < OLDEST_DEEPSPEED:
        oldest = ".".join(map(str, OLDEST_DEEPSPEED))
        raise UsageError(
            f"deepspeed must be at least {oldest}, got {installed}: earlier ones take steps that are not finite"
        )
    zero = settings["zero_optimization"]
    if zero.get("stage") not in (1, 2):
        raise UsageError(
            f"zero_stage must be 1 or 2, got {zero.get('stage')}: use FSDP to shard the weights too, and DDP to shard "
            "nothing"
        )
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device") or "none"
        if device != "none":
            raise UsageError(f"{name}_device must be none, got {device}: its optimizer has no state that others read")
    for name in REFUSED:
        if name in settings:
            raise UsageError(f"the DeepSpeed configuration must leave {name!r} out: the run's own settings say it")
    if accelerator.mixed_precision == "fp16":
        raise UsageError("mixed_precision must be bf16 or no with DeepSpeed, got fp16: or use DDP")


def prepare(
    accelerator: Accelerator,
    unet: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    say: Callable[[str], None],
) -> tuple[Any, Any]:
    """The network and the optimizer as Accelerate prepares them, for the batch, clipping and precision of `config`."""
    if _is_deepspeed(accelerator):
        settings = _deepspeed_config(accelerator)
        batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
        whole = batch_size * accumulation * accelerator.num_processes
        for name, value in zip(OURS, (batch_size, accumulation, whole, config.max_grad_norm), strict=True):
            if settings.get(name, "auto") not in ("auto", None, value):
                say(f"{name} is {value}, as the run says, not {settings[name]}, as the DeepSpeed configuration does")
            settings[name] = value
        accelerator.gradient_accumulation_steps = accumulation
        settings["bf16"] = {"enabled": False}
        if config.mixed_precision == "bf16":
            # The list is of modules whose gradients would be summed over the processes in bf16.
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            settings["torch_autocast"] = autocast
    return accelerator.prepare(unet, optimizer)


def autocast(device: torch.device, precision: str | None) -> torch.autocast:
    """What the network is sampled under: Accelerate's own does nothing with DeepSpeed."""
    dtype = AUTOCAST[precision or "no"]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def accumulating(accelerator: Accelerator, model: Any, is_last: bool) -> AbstractContextManager[None]:
    """For forward and backward of one micro-batch: processes exchange what they need not sooner than for the last."""
    if _is_deepspeed(accelerator):
        model.set_gradient_accumulation_boundary(is_last)
        return nullcontext()
    return nullcontext() if is_last else accelerator.no_sync(model)


def backward(accelerator: Accelerator, model: Any, loss: Tensor, num_micro_batches: int) -> None:
    """Adds the gradients of `loss / num_micro_batches`."""
    if _is_deepspeed(accelerator):
        model.backward(loss)  # divides by itself
    else:
        accelerator.backward(loss / num_micro_batches)


def step(
    accelerator: Accelerator, model: Any, optimizer: Any, lr: float, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Clips, steps with this learning rate unless a gradient is not finite, and forgets the gradients.

    Returns: their norm before it is clipped, float32 (), and whether the step was skipped, bool (), because that is
    not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if _is_deepspeed(accelerator):
        model.step()
        norm = math.inf if model.optimizer.overflow else float(model.get_global_grad_norm())
        whole = torch.tensor(norm, device=accelerator.device)
        return whole, ~whole.isfinite()
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    is_bad = ~norm.isfinite()
    if accelerator.scaler is None:
        # What GradScaler tells a fused optimizer, which then leaves all as it is; nothing waits for the device.
        optimizer.optimizer.found_inf = is_bad.float()
    optimizer.step()
    optimizer.zero_grad()
    return norm, is_bad


def reshard(unet: Any) -> None:
    """Frees what FSDP gathered for a forward pass without backward: the next one would not see changed weights."""
    for module in unet.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_sharded(parameters: Sequence[Tensor], optimizer: Any) -> bool:
    """Whether it takes all processes to gather the weights or the optimizer."""
    return _is_zero(optimizer) or any(hasattr(p, "full_tensor") for p in parameters)


def gathered(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors by name, whole and on the CPU; for all processes to call where they are sharded."""
    return {n: _whole(t).detach().cpu().contiguous() for n, t in zip(names, tensors, strict=True)}


def gathered_moments(parameters: Mapping[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
    """The optimizer's tensors, "parameter/kind", likewise; none before the first step."""
    if _is_zero(optimizer):
        from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

        kinds: dict[str, Tensor] = optimizer.state.get(optimizer.single_partition_of_fp32_groups[0], {})
        return {
            f"{name}/{kind}": value.cpu().clone() if value.ndim == 0 else safe_get_full_optimizer_state(p, kind).cpu()
            for name, p in parameters.items()
            for kind, value in kinds.items()
        }
    moments = {f"{name}/{kind}": v for name, p in parameters.items() for kind, v in optimizer.state.get(p, {}).items()}
    return gathered(list(moments), list(moments.values()))


def held_bytes(parameters: Sequence[Tensor], optimizer: Any) -> dict[str, int]:
    """Bytes in this process after the first step; gradients are left out for ZeRO, which keeps its own."""
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    held = {"weights": [*parameters], "gradients": [p for p in parameters if p.requires_grad], "moments": moments}
    if _is_zero(optimizer):
        del held["gradients"]
    return {name: sum(local(t).nbytes for t in tensors) for name, tensors in held.items()}


def scatter(values: Mapping[str, Tensor], onto: Mapping[str, Tensor]) -> None:
    """onto <- values, by name: whole tensors, of which sharded ones take their part."""
    assign(list(onto.values()), [_placed_as(values[name], tensor) for name, tensor in onto.items()])


def load(
    weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizer: Any
) -> None:
    """Sets the parameters and the optimizer, in place, to what `gathered` and `gathered_moments` have returned.

    Raises: KeyError for a name that is missing or unknown.
    """
    kept = "muon" if any(key.endswith("/momentum_buffer") for key in moments) else "adamw"
    asked = "muon" if isinstance(optimizer, Muon) else "adamw"
    if moments and kept != asked:
        raise UsageError(f"optimizer must be {kept}, whose moments the checkpoint holds, got {asked}")
    scatter(weights, parameters)
    if _is_zero(optimizer):
        _load_zero(moments, parameters, optimizer)
        return
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    place = {id(p): i for i, p in enumerate(in_groups)}
    number = {name: place[id(p)] for name, p in parameters.items()}
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        placed = value if value.ndim == 0 else _placed_as(value, parameters[name])
        states.setdefault(number[name], {})[kind] = placed
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _load_zero(moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizer: Any) -> None:
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        lazy_init_hp_params_optimizer_state,
        safe_set_full_optimizer_state,
    )

    # Each process steps on its part of a flat copy of the weights, and then shares it with the others.
    optimizer.refresh_fp32_params()
    if not moments:
        return
    first = next(iter(parameters))
    kinds = {key.rpartition("/")[2]: v for key, v in moments.items() if key.rpartition("/")[0] == first}
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        # The optimizer would make its state in its first step, and DeepSpeed find the parameters in it after that.
        optimizer.state[flat] = {
            kind: v.to(flat.device, copy=True) if v.ndim == 0 else torch.zeros_like(flat) for kind, v in kinds.items()
        }
        lazy_init_hp_params_optimizer_state(group, flat, optimizer.state)
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        if value.ndim:
            safe_set_full_optimizer_state(parameters[name], value, kind)


def _is_asked_for(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def _is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == "DEEPSPEED"


def _is_zero(optimizer: Any) -> bool:
    return hasattr(optimizer, "single_partition_of_fp32_groups")


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _placed_as(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, and sharded as it is."""
    if not hasattr(like, "full_tensor"):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(value.to(like.device), sharded.device_mesh, sharded.placements)
