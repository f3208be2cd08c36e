"""The cost of many processes: the parts of a step, collectives, checkpoints, and memory where weights are sharded."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from diffusers import UNet2DModel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.scaling.apart import peak_of_memory, processor_seconds
from hf_ddpm.data.shard_batches import BlockStart
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training import ending, loop, saving, setup
from hf_ddpm.training.averages import EMA, local
from hf_ddpm.training.checkpoint import Progress, TrainingState, save_checkpoint
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loader import advance_stream
from hf_ddpm.training.metrics import Meter
from tests.support.networks import smallest_unet_config

# The network's own time, which other work on the machine does not disturb.
STEP_SECONDS = 0.1
FIRST, STEPS, STEPS_BETWEEN_LINES, STEPS_BETWEEN_CHECKPOINTS = 5, 45, 10, 20
NETWORK, CHECKPOINT, MODELS = "network and gradients", "checkpoint", "models, snapshots and previews"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D",
}
# A module or class -> the part that each of its functions is.
PARTS: dict[Any, dict[str, str]] = {
    loop: {
        "next_batches": "images",
        "draw": "t, eps and other draws",
        "hide_labels": "t, eps and other draws",
        "seed_step": "t, eps and other draws",
        "log": "metrics",
        "count_skipped_steps": "metrics",
        "checkpoint": CHECKPOINT,
        **dict.fromkeys(("save_model", "save_guide", "save_snapshot", "save_preview"), MODELS),
    },
    loop.sharding: {"step": "optimizer"},
    Objective: {"__call__": "noise and loss"},
    EMA: {"update": "averages"},
    Meter: {"add": "metrics"},
    Processes: {"any": "votes"},
}


class SleepingNetwork(UNet2DModel):
    """The smallest network, as slow as one of a step of STEP_SECONDS."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Sleep, and predict."""
        time.sleep(STEP_SECONDS)
        return super().forward(*arguments, **named)


class Clock:
    """The seconds of the processor of each part, of which one is at work at any time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.part, self.last = "the rest of the loop", time.process_time()

    def enter(self, part: str) -> str:
        """Count the time until now to the part that was at work, and return it."""
        now = time.process_time()
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + now - self.last
        before, self.part, self.last = self.part, part, now
        return before

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the time of a function to a part."""
        function = getattr(owner, name)

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            before = self.enter(part)
            try:
                return function(*arguments, **named)
            finally:
                self.enter(before)

        setattr(owner, name, call)


class Collectives(TorchDispatchMode):
    """The exchanges among processes that Python starts: those of gradients in DDP are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation if it is one."""
        if any(kind is DTensor for kind in types):  # whose operations are those of its shards
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        is_exchange = func.namespace in ("c10d", "_c10d_functional")
        if is_exchange and not func.name().endswith(("wait_tensor", "wrap_tensor_autograd")):
            name = func.name().partition("::")[2].strip("_").partition(".")[0]
            tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
            if func.namespace == "_c10d_functional":  # others write into what they are given
                tensors.append(result)
            self.counts[name] += 1
            self.bytes[name] += sum(t.nbytes for t in tensors)
        return result


def config_of_run(folder: str, **settings: Any) -> TrainingConfig:
    """Return the settings of a short run on the digits, without what a run writes at its end."""
    plain: dict[str, Any] = {"max_train_steps": FIRST + STEPS, "train_batch_size": 8, "ddpm_num_inference_steps": 1}
    plain |= {"logging_steps": STEPS_BETWEEN_LINES, "checkpointing_steps": STEPS_BETWEEN_CHECKPOINTS}
    plain |= {"save_figures": False, "eval_batch_size": 4, "ema_snapshots": 2, "random_flip": True, "compile": False}
    plain |= {"dataset_name": "digits", "label_column": "label", "class_dropout": 0.1, "optimizer": "adamw"}
    plain |= {"output_dir": f"{folder}/run", "cache_dir": f"{folder}/cache", "cpu_threads_per_process": 1}
    return TrainingConfig(**{**plain, **settings})


def shard_on_the_cpu() -> None:
    """Let Accelerate shard on the CPU, too, which it does on GPUs only, and gloo can."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def measure_step(folder: str) -> dict[str, float]:
    """Return the seconds of the processor of each part of a step in this process, and of its last checkpoint."""
    clock, steps = Clock(), 0
    for owner, functions in PARTS.items():
        for name, part in functions.items():
            clock.wrap(owner, name, part)
    clock.wrap(SleepingNetwork, "forward", NETWORK)
    clock.wrap(torch.Tensor, "backward", NETWORK)
    measured: dict[str, float] = {}

    def advance(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal steps
            result = function(*arguments)
            steps += 1
            clock.enter(clock.part)
            if steps == FIRST:
                clock.seconds.clear()
            if steps == FIRST + STEPS - 1:
                measured.update({part: seconds / (STEPS - 1) for part, seconds in clock.seconds.items()})
            return result

        return call

    loop.do_what_is_due = advance(loop.do_what_is_due)
    network: Any = SleepingNetwork(**smallest_unet_config(channels=1, num_class_embeds=11))
    loop.train(config_of_run(folder), network=network)
    num_checkpoints = len([n for n in range(FIRST + 1, FIRST + STEPS) if n % STEPS_BETWEEN_CHECKPOINTS == 0])
    measured[CHECKPOINT] *= (STEPS - 1) / num_checkpoints
    measured[MODELS] *= STEPS - 1
    return measured


def measure_collectives(folder: str, is_sharded: bool, optimizer: str) -> dict[str, Any]:
    """Return the exchanges among processes in one step, which logs a line, and in a checkpoint; the bytes of each."""
    if is_sharded:
        shard_on_the_cpu()
    counted: dict[str, dict[str, tuple[int, int]]] = {}

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with Collectives() as mode:
                result = function(*arguments, **named)
            counted[name] = {kind: (number, mode.bytes[kind]) for kind, number in mode.counts.items()}
            return result

        setattr(owner, name, call)

    count(loop, "take_step")
    count(loop, "log")
    count(ending, "write_state")
    count(Processes, "any")
    settings = smallest_unet_config(channels=1, num_class_embeds=11)
    model = Path(folder, "unet.json")
    model.write_text(json.dumps(settings))
    config = config_of_run(folder, max_train_steps=2, logging_steps=1, optimizer=optimizer)
    loop.train(replace(config, model_config_name_or_path=str(model)))
    weights = sum(p.nbytes for p in UNet2DModel(**settings).parameters())  # pyright: ignore[reportAttributeAccessIssue]
    return {"weights": weights, **counted}


def measure_memory(folder: str, is_sharded: bool, model: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Return the bytes of this process after a step, and the most that a checkpoint, the model and a resume add."""
    if is_sharded:
        shard_on_the_cpu()
    measured: dict[str, Any] = {}

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with peak_of_memory() as peak:
                result = function(*arguments, **named)
            measured[name] = max(measured.get(name, 0), peak.added)
            if name == "save_checkpoint":
                measure_held(arguments[0])
            return result

        setattr(owner, name, call)

    def measure_held(state: TrainingState) -> None:
        measured["held"] = loop.sharding.bytes_held(list(state.unet.parameters()), state.optimizer)
        assert state.ema is not None
        averages = [local(tensor).nbytes for average in state.ema.averages.values() for tensor in average]
        measured["held"]["averages"] = sum(averages)

    watch(ending, "save_checkpoint")
    watch(saving, "save_model")
    watch(setup, "load_checkpoint")
    path = Path(folder, "unet.json")
    path.write_text(json.dumps(model))
    config = config_of_run(folder, train_batch_size=1, eval_batch_size=1, model_config_name_or_path=str(path))
    loop.train(replace(config, max_train_steps=num_steps, resume_from_checkpoint="latest"))
    return measured


def measure_checkpoint(folder: str, num_processes: int, num_workers: int) -> dict[str, Any]:
    """Return files, bytes and seconds of a checkpoint of a stream, and the seconds of a step that continues it."""
    unet: Any = UNet2DModel(**smallest_unet_config(channels=1))
    optimizer = torch.optim.AdamW(unet.parameters())
    num_substreams = num_processes * num_workers
    starts = [BlockStart(number, 123_456, 3, 7, 89_000)._asdict() for number in range(num_substreams)]
    stream = {"num_substreams": num_substreams, "chunk_size": 8, "block_starts": starts}
    losses = [[1234.5, 678.0]] * num_processes
    progress = Progress(1, 8, 1.0, 0, 8, 8, None, "", losses=losses, stream=stream)
    state = TrainingState(unet, optimizer, None)
    seconds = processor_seconds(lambda: save_checkpoint(state, progress, Path(folder), None, is_main_process=True))
    files = [path for path in Path(folder, "checkpoint-1").rglob("*") if path.is_file()]
    batch = {"block_starts": [BlockStart(0, 123_464, 3, 7, 90_000)], "num_bad": 0}
    advances = [processor_seconds(lambda: advance_stream(progress, {}, [batch])) for _ in range(20)]
    return {
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "progress": Path(folder, "checkpoint-1", "progress.json").stat().st_size,
        "seconds": seconds,
        "advance_seconds": statistics.median(advances),
    }
