"""Train, sample and evaluate on several machines, and do to them what happens to machines and networks.

    python -m benchmarks.machines.run

The machines are network namespaces of this one, each with a host name and an address of its own, joined by a switch
that is one, too. It needs Linux, root, and iproute2. Processes are started without a launcher, one on each machine,
with the variables that torchrun and `hf-ddpm train` under `srun` set. Weights, averages, optimizer, previews, figures
and metrics are compared with those of a run that was left alone. Writes `table.md`.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_ddpm.runtime.run_files import checkpoint_names
from tests.support.networks import tiny_unet_config
from tests.support.runs import differences, trace

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SWITCH, PREFIX, SUBNET = "hf-switch", "hf-machine", "10.213.77"
MOST_MACHINES, STEPS, GLOBAL_BATCH = 4, 120, 24
SETTINGS = {
    "dataset_name": "digits",
    "prediction_type": "v_prediction",
    "max_train_steps": STEPS,
    "checkpointing_steps": 7,
    "checkpoints_total_limit": 3,
    "logging_steps": 5,
    "eval_batch_size": 4,
    "eval_steps": 20,
    "eval_fraction": 0.1,
    "eval_num_images": 24,
    "ddpm_num_steps": 20,
    "ema_halflife_images": [1000],
    "cpu_threads_per_process": 1,
    "random_flip": True,
    "train_batch_size": GLOBAL_BATCH // 2,
}
HEAD = """# Several machines

Runs of {steps} steps on machines that are network namespaces of one, by `python -m benchmarks.machines.run` (torch
{torch}, gloo, on the CPU). Files are compared with those of two processes of one machine that were left alone; only
their times may differ.

| what | what came of it |
|---|---|
"""


def main() -> None:
    """Do everything in turn, and write the table."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("this script makes network namespaces: start it as root, where iproute2 is installed")
    text = HEAD.format(steps=STEPS, torch=version("torch"))
    with tempfile.TemporaryDirectory() as name, network():
        folder = Path(name)
        (folder / "unet.json").write_text(json.dumps(tiny_unet_config(1)))
        settings = {**SETTINGS, "model_config_name_or_path": str(folder / "unet.json")}
        (folder / "settings.yaml").write_text(json.dumps(settings))  # which YAML is, too
        finish(start(folder, "alone", [0, 0]))
        for case in CASES:
            line = f"| {case.__doc__} | {case(folder)} |\n"
            print(line, end="", flush=True)
            text += line
    (FOLDER / "table.md").write_text(text)


# What happens


def two_machines(folder: Path) -> str:
    """two machines, left alone, with a cache of their own each"""
    finish(start(folder, "two", [0, 1], has_own_caches=True))
    caches = sum(any((folder / f"cache-{machine}").iterdir()) for machine in (0, 1))
    return f"{caches} caches; {compared(folder, 'two')}"


def network_away(folder: Path) -> str:
    """the network is away for 20 s in the middle of a run"""
    run = start(folder, "away", [0, 1])
    wait_for_checkpoint(folder / "away")
    set_link(1, is_up=False)
    time.sleep(20)
    set_link(1, is_up=True)
    finish(run)
    return f"the run goes on; {compared(folder, 'away')}"


def network_cut(folder: Path) -> str:
    """the network is cut for good; it is mended, and the run started again"""
    run = start(folder, "cut", [0, 1])
    wait_for_checkpoint(folder / "cut")
    set_link(1, is_up=False)
    lines = failures(run)
    set_link(1, is_up=True)
    finish(start(folder, "cut", [0, 1]))
    return f"{lines}; {compared(folder, 'cut')}"


def machine_killed(folder: Path) -> str:
    """five times a machine dies at a random moment, and all are started again"""
    rng, ends = random.Random(0), []
    for number in range(5):
        num_before = num_lines(folder / "killed")
        run = start(folder, "killed", [0, 1])
        wait_for_line(folder / "killed", num_before, run[0])
        time.sleep(rng.uniform(0, 0.5))
        victim = number % 2
        run[victim].kill()
        run[victim].wait()
        ends.append(failures([run[1 - victim]]))
    finish(start(folder, "killed", [0, 1]))
    return f"{'; '.join(dict.fromkeys(ends))}; {compared(folder, 'killed')}"


def other_numbers(folder: Path) -> str:
    """four machines, then two, then three, then four, each stopped by a signal but the last"""
    stops: list[str] = []
    finish(start(folder, "four", [0, 1, 2, 3]))
    for machines in ([0, 1, 2, 3], [0, 1], [0, 1, 2]):
        num_before = num_lines(folder / "changing")
        run = start(folder, "changing", machines)
        wait_for_line(folder / "changing", num_before, run[0])
        for process in run:
            process.terminate()
        codes = {process.wait() for process in run}
        if codes != {75}:
            sys.exit(f"stopped runs must end with 75, got {codes}")
        stops.append(f"{len(machines)} to step {checkpoint_names(folder / 'changing' / 'run')[-1].rpartition('-')[2]}")
    finish(start(folder, "changing", [0, 1, 2, 3]))
    mine, theirs = (trace(folder / name / "run") for name in ("changing", "four"))
    if [line["images"] for line in mine] != [line["images"] for line in theirs]:
        sys.exit("a line of metrics is missing, or there twice")
    losses = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(mine, theirs, strict=True))
    mine, theirs = (weights(folder / name) for name in ("changing", "four"))
    apart = f"losses differ by {losses:.1e}, weights by {distance(mine, theirs):.1e}"
    return f"{', '.join(stops)}; no line is missing or there twice; {apart}"


def folder_not_shared(folder: Path) -> str:
    """machines that do not share `output_dir`"""
    return failures(start(folder, "unshared", [0, 1], before="mount -t tmpfs none {folder}"))


def machine_missing(folder: Path) -> str:
    """the second machine does not find the first one"""
    set_link(0, is_up=False)
    code = "import datetime; from hf_ddpm.runtime import meeting; "
    code += "meeting.meeting(datetime.timedelta(seconds=5)).__enter__()"
    environment = place(1, [0, 1])
    command = ["ip", "netns", "exec", f"{PREFIX}1", sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    set_link(0, is_up=True)
    return f"`{result.stderr.splitlines()[-1].partition(': ')[2]}`"


def samples_and_measurements(folder: Path) -> str:
    """`sample` and `evaluate` on two machines against one process"""
    for name, machines in (("one", [0]), ("both", [0, 1])):
        options = ["--num_images", "40", "--num_inference_steps", "5"]
        finish(start(folder, f"samples-{name}", machines, ["sample", str(folder / "alone" / "run"), *options]))
        options = ["--metrics", "values", "--num_images", "40", "--num_inference_steps", "5"]
        finish(start(folder, f"measured-{name}", machines, ["evaluate", str(folder / "alone" / "run"), *options]))
    images = [sorted((folder / f"samples-{name}").rglob("*.png")) for name in ("one", "both")]
    equal = sum(a.read_bytes() == b.read_bytes() for a, b in zip(*images, strict=True))
    files = [folder / f"measured-{name}" / "evaluation.json" for name in ("one", "both")]
    values = [[row["value"] for row in json.loads(file.read_text())["results"]] for file in files]
    ratio = max(abs(a / b - 1) for a, b in zip(*values, strict=True))
    return f"{equal} of {len(images[0])} pictures are equal, distances to {ratio:.1e} of them"


CASES: list[Callable[[Path], str]] = [
    two_machines,
    network_away,
    network_cut,
    machine_killed,
    other_numbers,
    folder_not_shared,
    machine_missing,
    samples_and_measurements,
]


# Machines


@contextmanager
def network() -> Iterator[None]:
    """Make the machines, and take them down after a `with` block."""
    names = [f"{PREFIX}{machine}" for machine in range(MOST_MACHINES)]
    take_down([SWITCH, *names])
    ip("netns", "add", SWITCH)
    try:
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for machine, name in enumerate(names):
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{machine}", "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", f"port{machine}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{address(machine)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        take_down([SWITCH, *names])


def take_down(names: list[str]) -> None:
    existing = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split()
    for name in names:
        if name in existing:
            ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def address(machine: int) -> str:
    return f"{SUBNET}.{machine + 1}"


def set_link(machine: int, is_up: bool) -> None:
    """Plug the cable of a machine in, or out, at the switch."""
    ip("-n", SWITCH, "link", "set", f"port{machine}", "up" if is_up else "down")


# Processes


def place(rank: int, machines: list[int]) -> dict[str, str]:
    """Return the environment of a process: its place among those of `machines`, one for each entry."""
    machine = machines[rank]
    own = {
        "RANK": rank,
        "WORLD_SIZE": len(machines),
        "LOCAL_RANK": machines[:rank].count(machine),
        "LOCAL_WORLD_SIZE": machines.count(machine),
        "MASTER_ADDR": address(machines[0]),
        "MASTER_PORT": 23456,
        "OMP_NUM_THREADS": 1,
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": 1,
        "PYTHONPATH": ROOT,
    }
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def start(
    folder: Path,
    name: str,
    machines: list[int],
    words: list[str] | None = None,
    before: str = "true",
    has_own_caches: bool = False,
) -> list[subprocess.Popen]:
    """Start a command of hf-ddpm in one process for each entry of `machines`.

    Args:
        folder: The folder of all runs.
        name: The folder of this one in it.
        machines: The machine of each process.
        words: The command without the folder; None: the run.
        before: What the last machine does before, with mounts of its own; {folder} is that of the runs.
        has_own_caches: Whether each machine has a cache of its own.
    """
    processes = []
    for rank, machine in enumerate(machines):
        if words is None:
            command = ["train", "--config", str(folder / "settings.yaml"), "--output_dir", str(folder / name / "run")]
            command += ["--train_batch_size", str(GLOBAL_BATCH // len(machines)), "--resume_from_checkpoint", "latest"]
            command += ["--cache_dir", str(folder / (f"cache-{machine}" if has_own_caches else "cache"))]
        else:
            command = [*words, "--out", str(folder / name)]
        line = shlex.join([sys.executable, "-W", "ignore", "-m", "hf_ddpm", *command])
        own = before.format(folder=shlex.quote(str(folder / name))) if rank == len(machines) - 1 else "true"
        shell = f"hostname {PREFIX}{machine}; mkdir -p {shlex.quote(str(folder / name))}; {own}; exec {line}"
        (folder / "logs").mkdir(exist_ok=True)
        log = folder / "logs" / f"{name}-{rank}.txt"
        inside = ["ip", "netns", "exec", f"{PREFIX}{machine}", "unshare", "--uts", "--mount", "sh", "-c", shell]
        with log.open("wb") as file:
            processes.append(subprocess.Popen(inside, env=place(rank, machines), stdout=file, stderr=file))
        processes[-1].log = log  # type: ignore[attr-defined]
    return processes


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for processes that are to end well."""
    for process in processes:
        if process.wait() != 0:
            sys.exit(said(process))


def failures(processes: list[subprocess.Popen]) -> str:
    """Return the lines with which processes ended that are to fail, and after how many seconds they did."""
    started = time.monotonic()
    lines = {}
    for process in processes:
        if process.wait() == 0:
            sys.exit(f"it must fail: {said(process)}")
        text = said(process)
        if "Traceback" in text:
            sys.exit(text)
        # What follows is the remedy.
        line = text.splitlines()[-1].removeprefix("error: ").partition(". The message of")[0]
        lines[re.sub(r" \[[\d.]+\]:\d+|/\S*/(?=\w+/run)", "", line)] = None  # without addresses and folders
    return f"after {time.monotonic() - started:.0f} s " + " and ".join(f"`{line}`" for line in lines)


def said(process: subprocess.Popen) -> str:
    return process.log.read_text().replace("\r", "\n")  # type: ignore[attr-defined]


def wait_for_checkpoint(folder: Path) -> None:
    while not any((folder / "run").glob("checkpoint-*")):
        time.sleep(0.1)


def num_lines(folder: Path) -> int:
    """Return how many lines of metrics a run has written."""
    path = folder / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_for_line(folder: Path, num_before: int, process: subprocess.Popen) -> None:
    """Wait until a run has written a line of metrics since it started, and so has taken steps."""
    while num_lines(folder) <= num_before:
        if process.poll() is not None:
            sys.exit(said(process))
        time.sleep(0.05)


# Comparisons


def compared(folder: Path, name: str) -> str:
    different = differences(folder / name / "run", folder / "alone" / "run")
    return "no file differs" if not different else f"different: {', '.join(different)}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "unet" / "diffusion_pytorch_model.safetensors")


def distance(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference relative to that of the weights."""
    squares = [((mine[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
    return math.sqrt(sum(float(a) for a, _ in squares) / sum(float(b) for _, b in squares))


if __name__ == "__main__":
    main()
