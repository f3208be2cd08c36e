"""Gaps of launchers, closed.

`accelerate launch --cpu --num_processes N` starts one process without a word (accelerate #2741); torchrun starts N.
A launcher that is killed tells the processes that it started nothing, and they go on unseen.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

import psutil

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.signals import LAUNCHER_ENDED

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_launcher() -> None:
    """Asks Linux for the signal LAUNCHER_ENDED when `accelerate launch` or torchrun, which started this, has ended."""
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and sys.platform == "linux" and LAUNCHER_ENDED is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_ENDED)


def reject_deepspeed() -> None:
    """Reject a launch that asks for DeepSpeed, before Accelerate imports it.

    Raises:
        UsageError: When `accelerate launch` or the environment asks for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UsageError(
            "distributed_type must not be DEEPSPEED, which hf_ddpm does not support: use FSDP 2 for a model that is "
            "too large for one GPU (launch_configs/fsdp.yaml), and else DDP (launch_configs/ddp.yaml)"
        )


def start_missing_processes() -> None:
    """Replaces this process by torchrun if `accelerate launch --cpu` was asked for several and started one.

    Raises:
        UsageError: how many were asked for cannot be found out, or they are on several machines; DeepSpeed is
            asked for.
    """
    reject_deepspeed()
    # For more than one process Accelerate names their meeting point, even though it starts one; a launcher that starts
    # them all also gives each its rank.
    alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    under_mpi = any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if not (alone and on_cpu and "MASTER_ADDR" in os.environ) or under_mpi:
        return
    parent = psutil.Process().parent()
    line = " ".join(parent.cmdline()) if parent is not None else ""
    asked = re.search(r"--num[_-]processes[= ](\d+)", line)
    if asked is None or re.search(r"--num[_-]machines[= ](?!1\b)", line):
        raise UsageError(
            "accelerate launch starts one process on the CPU whatever num_processes says: for several, "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node N {sys.argv[0]}"
        )
    # With the store that restarts share in torch 2.13, most restarts over gloo fail.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if sys.platform == "linux":  # it passes SIGTERM on to all of them
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", asked[1]]
    module = sys.modules["__main__"].__spec__
    started = [sys.argv[0]] if module is None else ["-m", module.name]
    os.execv(sys.executable, [*torchrun, *started, *sys.argv[1:]])


def hide(secret: str | None) -> None:
    """Takes it out of the command line, which trackers record."""
    if secret:
        sys.argv = [argument.replace(secret, "...") for argument in sys.argv]
