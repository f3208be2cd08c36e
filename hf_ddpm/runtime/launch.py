"""Processes: started where a launcher would start them, and ended together.

`accelerate launch` and torchrun start the processes of a run, and so does `hf-ddpm train` on a machine with several
GPUs or with a file of `accelerate config`. SLURM's `srun` starts them, too, but tells them their place in its own
words. Three gaps of launchers are closed here:

    `accelerate launch --cpu --num_processes N` starts one process and says nothing (accelerate #2741).
    torchrun exits with 1, whatever code its workers exit with.
    A launcher that is killed does not tell its workers, which continue unseen.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_ddpm.runtime import slurm
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage
from hf_ddpm.runtime.loading import without_garbage_collection
from hf_ddpm.runtime.signals import LAUNCHER_ENDED, LAUNCHER_VARIABLES, STOPPED, noted_signals

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What launchers tell a process about its place among several.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MPI_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# How threads of OpenMP wait: of the standard, of GNU's library and of Intel's.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = 5000  # before a thread sleeps: about 50 microseconds
TOKEN_FLAG = "__hub_token"  # with hyphens as underscores
# The file to which workers write their exit codes.
OUTCOME_VARIABLE = "HF_DDPM_OUTCOME_FILE"
NO_DEEPSPEED = (
    "distributed_type must not be DEEPSPEED, which hf_ddpm does not support: use FSDP 2 for a model that is too large "
    "for one GPU (launch_configs/fsdp.yaml), and else DDP (launch_configs/ddp.yaml)"
)
# torchrun kills a worker that has not ended so long after a signal. It may have to finish a step and a checkpoint.
SHUTDOWN_SECONDS = 3600


def is_launched() -> bool:
    """Return whether a launcher started this process, as the only one or as one of several."""
    return any(name in os.environ for name in (*RANK_VARIABLES, *MPI_VARIABLES, *LAUNCHER_VARIABLES))


def settle_place() -> None:
    """Take the place among processes that SLURM gives this one, and check what else the environment says of it.

    Accelerate and torch act on it later.

    Raises:
        UsageError: When a place among processes is no number or not whole, or DeepSpeed is asked for.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UsageError(NO_DEEPSPEED)
    _take_place_in_step()
    for name in (*RANK_VARIABLES, "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        environment_number(name, 0)


def _take_place_in_step() -> None:
    """Tell this process what torchrun would, if SLURM's `srun` started it as one of several; what is set counts.

    Raises:
        UsageError: When a part of its place is set.
    """
    # A launcher that is a task of a step itself hands the variables of the step on.
    if any(name in os.environ for name in (*LAUNCHER_VARIABLES, "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")):
        return
    given = [name for name in RANK_VARIABLES if name in os.environ]
    if len(given) == len(RANK_VARIABLES):
        return
    num_tasks = slurm.num_tasks_of_step()
    if num_tasks == 1 or environment_number("PMI_SIZE", num_tasks) != num_tasks:
        return
    if given:
        raise UsageError(
            f"{', '.join(RANK_VARIABLES)} must all be set in a job step of SLURM, or none of them, got "
            f"{' and '.join(given)}: unset what is set, and they are those of SLURM"
        )
    for name, value in slurm.place_in_step().items():
        os.environ.setdefault(name, value)


def environment_number(name: str, default: int) -> int:
    """Return a number that a launcher left in the environment.

    Raises:
        UsageError: When it is none.
    """
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment must be a whole number, got {text!r}: unset it, or correct it")
    return int(text)


def launcher_precision() -> str:
    """Return the precision that a launcher left in the environment; `no` is also what it says unasked."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def is_on_several_machines() -> bool:
    """Return whether a launcher started processes of one run on more machines than this one."""
    return environment_number("WORLD_SIZE", 1) > environment_number("LOCAL_WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Return whether this is the process that speaks for all of a run."""
    return os.environ.get("RANK", "0") == "0"


def let_threads_sleep() -> None:
    """Let threads of OpenMP that have nothing to do sleep soon rather than spin, unless the user says how they wait.

    OpenMP reads this when torch is loaded. Beside other work, threads that spin take the processors from those that
    they wait for. Where they sleep at once, waking them takes as long as a small network: benchmarks/waiting.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        # GNU's library, which torch brings for Linux, takes the number of spins; the others the policy.
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPINS)}


def exit_with_launcher() -> None:
    """Ask Linux to send LAUNCHER_ENDED to this process when the launcher that started it has ended."""
    if any(name in os.environ for name in LAUNCHER_VARIABLES) and LAUNCHER_ENDED is not None:
        _signal_at_parent_end(LAUNCHER_ENDED)


def take_token_from_argv() -> list[str]:
    """Return the words of the command line, and leave them without a token in `sys.argv`.

    Launchers hand `sys.argv` on to the processes that they start, and print it; trackers record it.
    """
    words = sys.argv[1:]
    rest, is_value = [], False
    for word in words:
        flag, has_value, _ = word.partition("=")
        is_token = flag.replace("-", "_") == TOKEN_FLAG
        if not (is_token or is_value):
            rest.append(word)
        is_value = is_token and not has_value
    sys.argv = [*sys.argv[:1], *rest]
    return words


def start_processes(token: str | None = None) -> int | None:
    """Start the processes that `accelerate launch` would start on this machine, and wait for them.

    A process that a launcher started ends with it from now on, as `exit_with_launcher` asks.

    A file of `accelerate config` decides how many; without one there is a process for each GPU.

    Args:
        token: A token of the Hub that the command line named. The processes find it in HF_TOKEN.

    Returns:
        The exit code of the run; None if this process is to do the work, alone or as one of those that were started.

    Raises:
        UsageError: When several processes were asked for, but not how many of them belong here; or DeepSpeed.
    """
    exit_with_launcher()  # before the environment says what a launcher would
    code = start_missing_processes(token)
    if code is not None or is_launched():
        return code
    with without_garbage_collection():
        import torch
        from accelerate.commands.config import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        num_gpus = torch.cuda.device_count()
        if num_gpus < 2:
            return None
        options = ["--multi_gpu", "--num_processes", str(num_gpus), "--num_machines", "1"]
        return _accelerate_launch([*options, "--mixed_precision", "no", "--dynamo_backend", "no"], token)

    with naming_damage(f"{default_config_file} cannot be read", "write it anew by `accelerate config`"):
        config: Any = load_config_from_file(default_config_file)
    if str(config.distributed_type).endswith("DEEPSPEED"):
        raise UsageError(NO_DEEPSPEED)
    if config.num_processes == 1:
        os.environ.update(_environment_of(config))
        return None
    if config.use_cpu and config.num_machines == 1:
        return _torchrun(config.num_processes, _environment_of(config), token)
    return _accelerate_launch([], token)


def start_missing_processes(token: str | None = None) -> int | None:
    """Start the processes that `accelerate launch --cpu --num_processes N` left out, and wait for them.

    Args:
        token: As of `start_processes`.

    Returns:
        The exit code of the run; None if no process is missing.

    Raises:
        UsageError: When it cannot be found out how many processes were asked for, or they are on several machines.
    """
    settle_place()
    # For more than one process Accelerate names their meeting point, even though it starts one; a launcher that starts
    # them all also gives each its rank.
    is_alone = not any(name in os.environ for name in ("RANK", "WORLD_SIZE", *MPI_VARIABLES))
    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not (is_alone and is_on_cpu and "MASTER_ADDR" in os.environ):
        return None
    import psutil

    parent = psutil.Process().parent()
    command = " ".join(parent.cmdline()) if parent is not None else ""
    num_processes = re.search(r"--num[_-]processes[= ](\d+)", command)
    if num_processes is None or re.search(r"--num[_-]machines[= ](?!1\b)", command):
        raise UsageError(
            "accelerate launch starts one process on the CPU whatever num_processes says: for several, "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node N {sys.argv[0]}"
        )
    _signal_at_parent_end(signal.SIGTERM)  # torchrun passes it on to all workers
    return _torchrun(int(num_processes[1]), {}, token)


def report_outcome(code: int) -> int:
    """Tell the process that started this one how the run ended.

    Returns:
        The code to exit with. It is 0 instead of STOPPED for a worker whose outcome is read from a file: torchrun
        takes any other code for a failure, and ends the workers that are still finishing.
    """
    path = os.environ.get(OUTCOME_VARIABLE)
    if path is None:
        return code
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{code}\n")
    return 0 if code == STOPPED else code


def _environment_of(config: Any) -> dict[str, str]:
    """Return what `accelerate launch` would tell a process, of the settings that also matter without several."""
    environment = {
        "ACCELERATE_MIXED_PRECISION": str(config.mixed_precision or "no"),
        "ACCELERATE_USE_CPU": str(bool(config.use_cpu)).lower(),
    }
    if config.gpu_ids not in (None, "all"):
        environment["CUDA_VISIBLE_DEVICES"] = str(config.gpu_ids)
    return environment


def _torchrun(num_processes: int, environment: dict[str, str], token: str | None) -> int:
    from torch.distributed.run import main

    options = ["--standalone", "--nproc_per_node", str(num_processes)]
    # With the store that restarts share in torch 2.13, most restarts over gloo fail.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **environment}
    return _wait_for_workers(lambda: main([*options, *_own_command()]), variables, token)


def _accelerate_launch(options: list[str], token: str | None) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser

    # Of Accelerate's default port, 29500, there is one for all runs of a machine; with 0 it takes a free one.
    port = ["--main_process_port", "0"] if options else []
    arguments = launch_command_parser().parse_args([*options, *port, *_own_command()])
    return _wait_for_workers(lambda: launch_command(arguments), {}, token)


def _own_command() -> list[str]:
    """Return what this process runs, as a launcher takes it: a script or `-m` and a module, and the arguments."""
    module = sys.modules["__main__"].__spec__
    if module is not None:
        return ["-m", module.name, *sys.argv[1:]]
    # The command `hf-ddpm` is a script on some systems and a program on others.
    script = [sys.argv[0]] if sys.argv[0].endswith(".py") else ["-m", "hf_ddpm"]
    return [*script, *sys.argv[1:]]


def _wait_for_workers(start: Callable[[], Any], environment: dict[str, str], token: str | None) -> int:
    """Start workers and return the exit code of all of them together.

    Args:
        start: Start them, wait, and raise if one has failed.
        environment: What they are told beyond the environment of this process.
        token: What they find in HF_TOKEN, if it is not None.
    """
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        variables = {
            "PET_SIGNALS_TO_HANDLE": ",".join(["SIGQUIT", *(number.name for number in noted_signals())]),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
            OUTCOME_VARIABLE: str(path),
            **({} if token is None else {"HF_TOKEN": token}),
            **environment,
        }
        has_failed = False
        with patch_environment(**variables):
            try:
                start()
            except (ChildFailedError, SignalException, subprocess.CalledProcessError):
                has_failed = True  # the worker that failed has said why
        codes = path.read_text(encoding="utf-8").split() if path.is_file() else []
    worst = next((code for code in (2, 1, STOPPED) if str(code) in codes), None)
    return int(has_failed) if worst is None else worst


def _signal_at_parent_end(number: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
