"""Run `launch_configs/slurm.sbatch` on two nodes of SLURM, preempt it, kill its nodes, and compare what it trained.

    sudo python -m benchmarks.slurm.run

The nodes are namespaces of this machine. Each has a host name and processes of its own, which die together. It needs
Linux, root, iproute2, and SLURM with munge (on Debian `apt-get install slurm-wlm munge`). The script edits the three
marked lines of the job. The job runs once alone. Then it runs once more, while jobs of a partition of higher priority
take its nodes, and while nodes die by SIGKILL and boot again. By its default SLURM waits two minutes before it starts
a requeued job again; `cred_expire` makes that 15 seconds here. All processes are in namespaces that end with the
script. Writes `table.md`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from tests.support.networks import tiny_unet_config
from tests.support.runs import differences

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[2]
INSIDE = "HF_DDPM_SLURM_FOLDER"  # set where the namespaces of the script are made already
ADDRESSES = {"controller": "10.213.78.1", "n1": "10.213.78.2", "n2": "10.213.78.3"}
PROCESSES = ("--pid", "--fork", "--kill-child", "--mount-proc")  # a namespace that ends with its first process
DEADLINE = time.monotonic() + 30 * 60
NODES: dict[str, subprocess.Popen] = {}
STEPS = 240
SETTINGS = {
    "dataset_name": "digits",
    "prediction_type": "v_prediction",
    "train_batch_size": 8,
    "max_train_steps": STEPS,
    "checkpointing_steps": 10,
    "checkpoints_total_limit": 3,
    "logging_steps": 1,
    "eval_batch_size": 4,
    "eval_steps": 120,
    "eval_fraction": 0.1,
    "eval_num_images": 24,
    "cpu_threads_per_process": 1,
    "ddpm_num_steps": 20,
    "ema_halflife_images": [1000, 10000],
    "random_flip": True,
}
PREEMPTED, START, STEP, CHECKPOINT = "preempted", "before its first step", "at a step", "while it writes a checkpoint"
# What happens in turn, each at a random moment. The script of the job runs on n1, and process 0 of the run, too.
EVENTS = (
    (PREEMPTED, STEP),
    ("n2", STEP),
    (PREEMPTED, START),
    (PREEMPTED, STEP),
    ("n1", CHECKPOINT),
    (PREEMPTED, STEP),
    (PREEMPTED, STEP),
)
# Debian's own files of SLURM and munge stay as they are. A requeued job waits for as long as credentials live.
SLURM_CONF = """ClusterName=two
SlurmctldHost=controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=15,socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=n1 Port=17001 CPUs=1
NodeName=n2 Port=17002 CPUs=1
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""
HEAD = """# A job of SLURM that is preempted, and whose nodes die

`launch_configs/slurm.sbatch` on two nodes, which are namespaces of one machine, by `python -m benchmarks.slurm.run`
(SLURM {slurm}, torch {torch}, gloo, on the CPU). A run of {steps} steps with a checkpoint each {every} steps.
SLURM started the job {starts} times. Files are compared with those of the same job that was left alone: metrics but
for their times, weights, averages, optimizer, previews, figures.

| what | when | how tasks ended | what the controller wrote | step reached | resumed from | steps lost |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Start again inside namespaces, where nothing outlives the script; there, do everything and write the table."""
    if INSIDE in os.environ:
        measure(Path(os.environ[INSIDE]))
        return
    missing = [name for name in ("unshare", "ip", "munged", "slurmctld", "slurmd") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        sys.exit(f"this script must be started as root, with {', '.join(missing) or 'all that it needs'} installed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the namespaces, too
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # or munged refuses it
        inside = ["unshare", "--mount", "--uts", "--net", *PROCESSES, sys.executable, "-m", "benchmarks.slurm.run"]
        sys.exit(subprocess.run(inside, env={**os.environ, INSIDE: folder}, check=False).returncode)


def measure(folder: Path) -> None:
    """Train alone, train while things happen, and write the table."""
    start_slurm(folder)
    alone = submit(folder, "alone")
    until(lambda: state(alone) == "RUNNING", alone)
    started = time.monotonic()
    until(lambda: num_steps(alone) > 0, alone)
    start_seconds = time.monotonic() - started
    until(lambda: state(alone) == "COMPLETED", alone)
    print(f"alone: {start_seconds:.0f} s until its first step, {time.monotonic() - started:.0f} s in all", flush=True)
    if shown(alone, "Restarts") != "0":
        sys.exit("the job that was to be left alone was started again")
    job, rng, marks, rows = submit(folder, "disturbed"), random.Random(0), [0], []
    for what, when in EVENTS:
        rows.append(happen(folder, job, what, when, start_seconds, marks[-1], rng))
        marks.append(job.log.stat().st_size)
        print(*rows[-1], sep=", ", flush=True)
    until(lambda: state(job) == "COMPLETED", job)
    different = differences(job.output_dir, alone.output_dir)
    text = HEAD.format(
        slurm=said("slurmctld", "-V").split()[-1],
        torch=version("torch"),
        steps=STEPS,
        every=SETTINGS["checkpointing_steps"],
        starts=int(shown(job, "Restarts")) + 1,
    )
    for (*row, reached), mark in zip(rows, marks[1:], strict=True):
        first = first_step(job, mark)
        reached = first if START in row else reached  # what was lost before counts once
        text += f"| {' | '.join(row)} | {reached} | {first} | {reached - first} |\n"
    text += f"\nFiles that differ: {', '.join(different) or 'none'}.\n"
    (FOLDER / "table.md").write_text(text)
    print(text)


# What happens


def happen(
    folder: Path, job: Job, what: str, when: str, start_seconds: float, mark: int, rng: random.Random
) -> tuple[str, str, str, str, int]:
    """Preempt the job, or let a node die and boot, and wait until SLURM has requeued the job.

    Args:
        mark: The length of the job's output when it was last requeued.

    Returns:
        What happened and when, how tasks ended, what the controller wrote, and the step that the run had reached.
    """
    until(lambda: state(job) == "RUNNING", job)
    starts = int(shown(job, "Restarts"))
    if when == START:
        time.sleep(rng.uniform(0, start_seconds / 2))
    else:
        until(lambda: first_step(job, mark) >= 0, job)
        step = first_step(job, mark) + rng.randint(1, STEPS // len(EVENTS))
        until(lambda: num_steps(job) >= step, job)
    if when == CHECKPOINT:
        until(lambda: is_writing(job), job, seconds=0)
    num_lines = len((folder / "slurmctld.log").read_text().splitlines())
    if what == PREEMPTED:
        said("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    else:
        kill_node(what)
        if when == CHECKPOINT and not is_writing(job):
            when = "just after it wrote a checkpoint"
        time.sleep(rng.uniform(0, 20))
        boot_node(what, folder)
    until(lambda: int(shown(job, "Restarts")) > starts and state(job) != "COMPLETING", job)
    if when == START and num_steps(job) > first_step(job, mark) >= 0:
        when = STEP
    if what != PREEMPTED:  # SLURM takes no node back that has booted unasked
        said("scontrol", "update", f"NodeName={what}", "State=RESUME")
        what = f"{what} dies"
    lines = "\n".join((folder / "slurmctld.log").read_text().splitlines()[num_lines:])
    failure = re.search(rf"requeue (?:job )?JobId={job.number} (due to .*)", lines)
    requeued = re.search(rf"Requeuing JobId={job.number}\b", lines)
    ends = re.findall(rb"task \d+: (.*)", job.log.read_bytes()[mark:])
    return (
        what,
        when,
        ", ".join(dict.fromkeys(end.decode() for end in ends)) or "unseen",
        f"requeue {failure[1]}" if failure else requeued[0] if requeued else "nothing",
        num_steps(job),
    )


def is_writing(job: Job) -> bool:
    """Return whether a checkpoint is being written, or was when the process that wrote it died."""
    return any(job.output_dir.glob("partial-checkpoint-*"))


# SLURM


def start_slurm(folder: Path) -> None:
    """Start munge, the controller and both nodes, in a network and with host names of their own."""
    said("ip", "link", "set", "lo", "up")
    lines = ["127.0.0.1 localhost"]
    for name, address in ADDRESSES.items():
        said("ip", "addr", "add", f"{address}/24", "dev", "lo")
        lines.append(f"{address} {name}")
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    said("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
    socket.sethostname("controller")
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    start(folder, "munged", "munged", "--foreground", f"--socket={folder}/munge.socket", *files)
    until(lambda: (folder / "munge.socket").exists())
    start(folder, "slurmctld", "slurmctld", "-D")
    for node in ("n1", "n2"):
        boot_node(node, folder)
    until(lambda: said("sinfo", "--noheader", "--format=%D", "--partition=low", "--states=idle").strip() == "2")


def start(folder: Path, log: str, *command: str) -> subprocess.Popen:
    """Start a daemon in the foreground, so that it is a child of this script."""
    with (folder / f"{log}.log").open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)


def boot_node(node: str, folder: Path) -> None:
    """Start a node, and tell the controller that it has booted."""
    # The shell is the first process of the node: when it dies, the kernel ends all others.
    shell = f"hostname {node}; slurmd -D -b; exit"
    NODES[node] = start(folder, node, "unshare", "--uts", *PROCESSES, "bash", "-c", shell)


def kill_node(node: str) -> None:
    """Kill all processes of a node; wait until there is none."""
    psutil.Process(NODES[node].pid).children()[0].kill()
    NODES[node].wait()


def said(*command: str) -> str:
    """Run a command; return what it wrote."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# The job


@dataclass(frozen=True)
class Job:
    """A job of SLURM, the folder of its run, and the file of its output."""

    number: str
    output_dir: Path
    log: Path


def submit(folder: Path, name: str) -> Job:
    """Submit `launch_configs/slurm.sbatch`, with its three marked lines edited."""
    output_dir = folder / name
    (folder / "unet.json").write_text(json.dumps(tiny_unet_config(1)))
    settings = {**SETTINGS, "model_config_name_or_path": str(folder / "unet.json"), "cache_dir": str(folder / "cache")}
    (folder / "settings.yaml").write_text(json.dumps(settings))  # which YAML is, too
    run = f"--config {folder}/settings.yaml --output_dir {output_dir} --resume_from_checkpoint latest"
    text = (ROOT / "launch_configs" / "slurm.sbatch").read_text()
    for line, edited in [
        (r"#SBATCH --nodes=.*", "#SBATCH --nodes=2 --ntasks-per-node=1"),
        (r"#SBATCH --time=.*", "#SBATCH --time=30:00"),
        (r"(srun .*hf-ddpm train) .*", rf"\1 {run}"),
    ]:
        text, count = re.subn(rf"^{line}$", edited, text, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"launch_configs/slurm.sbatch must hold one line {line}, got {count}")
    script = folder / f"{name}.sbatch"
    script.write_text(text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ.update(PATH=path, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    number = said("sbatch", "--parsable", f"--chdir={folder}", str(script)).strip()
    return Job(number, output_dir, folder / f"hf-ddpm-{number}.log")


def shown(job: Job, name: str) -> str:
    """Return a value that `scontrol show job` shows."""
    found = re.search(rf"\b{name}=(\S+)", said("scontrol", "show", "job", job.number))
    return found[1] if found else ""


def state(job: Job) -> str:
    return shown(job, "JobState")


def num_steps(job: Job) -> int:
    """Return the step of the last line of metrics."""
    file = job.output_dir / "metrics.jsonl"
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []  # without half a line
    return json.loads(lines[-1])["step"] if lines else 0


def first_step(job: Job, mark: int) -> int:
    """Return the step at which the run began after so many bytes of output; -1 while it has not."""
    text = job.log.read_bytes()[mark:] if job.log.is_file() else b""
    found = re.search(rb"the run (?:resumes from checkpoint-|begins at step )(\d+)", text)
    return int(found[1]) if found else -1


def until(is_true: Callable[[], bool], job: Job | None = None, seconds: float = 0.1) -> None:
    """Wait until something is so; end the script if the job ends otherwise, or the time is up."""
    while not is_true():
        ended = job is not None and state(job) in ("COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
        if (ended and not is_true()) or time.monotonic() > DEADLINE:
            output = job.log.read_text(errors="replace")[-3000:] if job is not None and job.log.is_file() else ""
            sys.exit(f"{output}\n{'the job has ended' if ended else 'the time is up'}")
        time.sleep(seconds)


if __name__ == "__main__":
    main()
