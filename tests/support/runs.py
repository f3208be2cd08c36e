"""Runs in processes of their own, to which things happen, and what two of them must have in common to be the same."""

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from diffusers import UNet2DModel
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.run_files import checkpoint_names
from hf_ddpm.runtime.signals import STOPPED, StoppedOnPurpose
from hf_ddpm.training import loader
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.forks import Process, write_output_to

# When and how often it was started is all that may differ, and where it lies.
OWN = ("run.json", "README.md", "config.yaml", "manifest.json", ".lock")


def trace(folder: Path | str) -> list[dict]:
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def differences(a: Path, b: Path) -> list[str]:
    """Names of files that differ: weights, averages, optimizer, previews, figures to the last bit; metrics in all but
    times. Of checkpoints the last counts; which others are kept depends on when the run was ended."""
    found = []
    last = checkpoint_names(a)[-1]
    names = {p.relative_to(folder) for folder in (a, b) for p in folder.rglob("*") if p.is_file()}
    for name in sorted(names):
        is_older = name.parts[0].startswith("checkpoint-") and name.parts[0] != last
        if name.name in OWN or is_older:
            continue
        if not ((a / name).is_file() and (b / name).is_file()):
            found.append(f"{name} is in one only")
        elif name.name == "metrics.jsonl":
            found += [] if trace(a) == trace(b) else [str(name)]
        elif name.name == "progress.json":
            mine, theirs = (json.loads((folder / name).read_text()) for folder in (a, b))
            own = ("seconds", "num_resumes")
            same = all(mine[key] == theirs[key] for key in mine.keys() | theirs.keys() if key not in own)
            found += [] if same else [str(name)]
        elif (a / name).read_bytes() != (b / name).read_bytes():
            found.append(str(name))
    return found


WORKER, TWICE, SUSPEND, UNREAD = 1001, 1002, 1003, 1004


def child(  # noqa: C901
    config: TrainingConfig, event: str | None, count: int, action: int, environment: dict[str, str]
) -> None:
    """Trains; at the `count`-th event, an optimizer's step or a flushed file, sends itself the signal `action`.

    Other actions: TWICE, SIGTERM and again; WORKER, kills a process that loads data; SUSPEND, suspends it; UNREAD,
    closes the only end at which its output is read. Event
    `forward`: from the `count`-th forward pass on, `action` of them give NaN.
    """
    os.environ.update(environment)
    if "FSDP_VERSION" in environment:
        # Accelerate knows FSDP on GPUs only, and does without it elsewhere; gloo can do it.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    write_output_to(log_of(config))
    multiprocessing.set_start_method("fork", force=True)  # for its loaders, as in a process of its own
    torch.set_num_threads(1)
    if action in (WORKER, SUSPEND):  # else we look for it every two seconds, and torch every five
        loader.LOOK_SECONDS = 0.1
        _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.1,)
    left = count

    def happened(*_) -> None:
        nonlocal left
        left -= 1
        if event == "forward":
            return
        if left == 0 and action == WORKER:
            multiprocessing.active_children()[0].kill()
        elif left == 0 and action == SUSPEND:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGSTOP)
        elif left == 0 and action == UNREAD:
            end, beginning = os.pipe()
            os.close(end)
            for stream in (1, 2):
                os.dup2(beginning, stream)
        elif left == 0 and action == TWICE:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        elif left == 0:
            os.kill(os.getpid(), action)

    if event == "step":
        register_optimizer_step_post_hook(happened)
    elif event == "flush":
        flush = os.fsync

        def flush_and_count(descriptor: int) -> None:
            flush(descriptor)
            happened()

        os.fsync = flush_and_count
    elif event == "forward":

        def spoil(module, _, output):
            if isinstance(module, UNet2DModel) and not output.sample.is_meta:
                happened()
                output.sample = output.sample * (math.nan if left <= 0 < left + action else 1)

        register_module_forward_hook(spoil)
    try:
        train(config)
    except StoppedOnPurpose as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except (UsageError, RunError) as error:
        sys.exit(f"error: {error}")


def log_of(config: TrainingConfig) -> Path:
    return Path(f"{config.output_dir}.log")


def said(config: TrainingConfig) -> str:
    """What the starts of a run have written to stdout and stderr."""
    return log_of(config).read_text()


def start(
    config: TrainingConfig,
    num_processes: int = 1,
    event: str | None = None,
    count: int = 0,
    action: int = signal.SIGKILL,
    last: TrainingConfig | None = None,
    **variables: str,
) -> list[int]:
    """Exit codes of the processes that train; the event happens to the last of them, or to the one that writes.

    Args:
        last: the settings of the last process, if it has others.
    """
    victim = 0 if event == "flush" else num_processes - 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_processes):
        environment = {"HF_HUB_OFFLINE": "1", **variables}
        if num_processes > 1:
            environment |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_processes}"}
            environment |= {"LOCAL_WORLD_SIZE": f"{num_processes}", "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}
        is_victim = rank == victim
        own = last if last is not None and rank == num_processes - 1 else config
        arguments = (replace(own, local_rank=rank) if num_processes > 1 else own, event if is_victim else None)
        children.append(Process(target=child, args=(*arguments, count, action, environment)))
        children[-1].start()
    if event is not None and action == signal.SIGKILL:
        children[victim].join()
        for other in children:
            other.kill()
    for other in children:
        other.join()
    return [c.exitcode for c in children]
