"""What SLURM tells a process: its place among the tasks of a job step, and when its job ends.

`srun` starts a job step. One of several tasks is a run of as many processes, as if torchrun had started them. The
script of a job and the shell of `salloc` know the number of tasks of the job, too, but are no step: each works alone.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time

from hf_ddpm.runtime.errors import UsageError, in_one_line

_NODES = r"(?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"  # n1, or n[2-4,7], or rack[01-02]n[1-2]
_TASKS = r"(\d+)(?:\(x(\d+)\))?"  # 4, or 4(x2): on each of two nodes
# Linux takes the ports of outgoing connections from 32768 on, and most services have one below 12000.
PORTS = range(12000, 32000)
# Steps of neighboring jobs, which may share a node, are far apart.
_PORTS_OF_STEP = 1009
# SLURM gives a job without a limit an end in a year.
_NO_LIMIT_SECONDS = 300 * 86400
_SQUEUE_SECONDS = 60
_REMEDY = "start the command by srun"


def job() -> str | None:
    """Return the number of the job that this process belongs to; None outside one."""
    return os.environ.get("SLURM_JOB_ID")


def num_tasks_of_step() -> int:
    """Return the number of tasks of the job step of this process; 1 outside a step.

    Raises:
        UsageError: When it is missing, or none.
    """
    is_in_step = "SLURM_STEP_ID" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    return _number("SLURM_STEP_NUM_TASKS") if is_in_step else 1


def place_in_step() -> dict[str, str]:
    """Return what torchrun would tell this task of a job step.

    Raises:
        UsageError: When a variable of SLURM is missing or contradicts another, or the first node has no address.
    """
    num_tasks = num_tasks_of_step()
    counts = _tasks_per_node(num_tasks)
    node = _number("SLURM_NODEID", len(counts))
    port = PORTS[(_number("SLURM_JOB_ID") + _PORTS_OF_STEP * _number("SLURM_STEP_ID")) % len(PORTS)]
    return {
        "RANK": str(_number("SLURM_PROCID", num_tasks)),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": str(_number("SLURM_LOCALID", counts[node])),
        "LOCAL_WORLD_SIZE": str(counts[node]),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_node(),
        "MASTER_PORT": str(port),
        # The cores that a task shares with no other. torchrun says 1, too, if it is not told.
        "OMP_NUM_THREADS": str(_number("SLURM_CPUS_PER_TASK")) if "SLURM_CPUS_PER_TASK" in os.environ else "1",
    }


def gives_no_gpu() -> bool:
    """Return whether this process is a task of a job step to which SLURM gave no GPU, so that it works on the CPU."""
    return "SLURM_STEP_ID" in os.environ and not any(re.match("SLURM_.*GPUS", name) for name in os.environ)


def job_seconds_left() -> float | None:
    """Return the seconds until SLURM ends the job of this process; None if it has no limit.

    Raises:
        OSError: When that cannot be found out.
    """
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdecimal():
        seconds = int(end) - time.time()
        return seconds if seconds < _NO_LIMIT_SECONDS else None
    # For the last one of an array of jobs, squeue lists all of them.
    command = ["squeue", "--noheader", "--jobs", str(job()), "--format", "%A %L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SQUEUE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise OSError(in_one_line(error)) from error
    text = next((words[1] for words in map(str.split, done.stdout.splitlines()) if words[:1] == [job()]), "")
    if text == "UNLIMITED":
        return None
    if not re.fullmatch(r"(\d+-)?(\d+:)?\d+:\d+", text):
        raise OSError(f"squeue says {' '.join((text or done.stderr or 'nothing').split())!r}")
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return 86400 * int(days or 0) + seconds


def _variable(name: str) -> str:
    text = os.environ.get(name, "").strip()
    if not text:
        raise UsageError(
            f"{name} must be set in a job step of SLURM, as SLURM_STEP_ID or SLURM_STEP_NUM_TASKS is: {_REMEDY}, or "
            "unset both to work alone"
        )
    return text


def _number(name: str, end: int | None = None) -> int:
    text = _variable(name)
    if not text.isdecimal() or (end is not None and int(text) >= end):
        below = "" if end is None else f" below {end}"
        raise UsageError(f"{name} in the environment must be a whole number{below}, got {text!r}: {_REMEDY}")
    return int(text)


def _tasks_per_node(num_tasks: int) -> list[int]:
    """Return the number of tasks of each node of the step."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = _variable(name)
    counts: list[int] = []
    if re.fullmatch(f"{_TASKS}(?:,{_TASKS})*", text):
        counts = [int(count) for count, times in re.findall(_TASKS, text) for _ in range(int(times or 1))]
    if sum(counts) != num_tasks:
        raise UsageError(
            f"{name} in the environment must be the {num_tasks} tasks of SLURM_STEP_NUM_TASKS, as in 4(x2),3, got "
            f"{text!r}: {_REMEDY}"
        )
    return counts


def _first_node() -> str:
    """Return the name of the first node of the step, on which the task of rank 0 is."""
    name = "SLURM_STEP_NODELIST"
    text = _variable(name)
    if not re.fullmatch(f"{_NODES}(?:,{_NODES})*", text):
        raise UsageError(f"{name} in the environment must be names of nodes, as n[1-4], got {text!r}: set MASTER_ADDR")
    first = re.match(_NODES, text)
    node = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else "")
    try:
        socket.getaddrinfo(node, None)
    except OSError as error:
        raise UsageError(
            f"{node}, the first node of {name}, must have an address: {error}; set MASTER_ADDR to one"
        ) from error
    return node
