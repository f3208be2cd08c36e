"""Kill runs again and again, and compare them to the last bit with the same runs left alone.

    python -m benchmarks.kill_test.run [--kills 8]

Each configuration is trained once without being disturbed. Then the same command with `--resume_from_checkpoint
latest` is started over and over. SIGKILL ends launcher, training processes and loaders together, at a random moment
or as soon as a checkpoint is being written. After that many kills the run is left to finish. Weights, averages,
optimizer, snapshots, previews, figures and the loss trace are compared. Writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from tests.support.networks import tiny_unet_config
from tests.support.runs import differences

ROOT = Path(__file__).parents[2]
STEPS = 160
ALL = {
    "prediction_type": "v_prediction",
    "variance_type": "learned_range",
    "loss_weighting": "min_snr",
    "gradient_accumulation_steps": 2,
    "train_batch_size": 8,
    "max_train_steps": STEPS,
    "checkpointing_steps": 9,
    "logging_steps": 5,
    "eval_batch_size": 4,
    "ddpm_num_steps": 20,
    "ema_halflife_images": [1000, 10000],
    "cpu_threads_per_process": 1,
    "random_flip": True,
}
CONFIGURATIONS = {
    "accumulation, 2 loaders, flips, dropout, min-SNR, learned variance": (1, {"dataloader_num_workers": 2}),
    "the same, 2 processes": (2, {"dataloader_num_workers": 1}),
    "the same, bf16": (1, {"mixed_precision": "bf16"}),
    "the same, bf16, compiled": (1, {"mixed_precision": "bf16", "compile": True}),
    "the same, streamed by 2 loaders": (1, {"streaming": True, "dataloader_num_workers": 2}),
    "the same, streamed by 2 processes": (2, {"streaming": True, "dataloader_num_workers": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8)
    num_kills, rng = parser.parse_args().kills, random.Random(0)
    lines = ["| run | kills | of them while a checkpoint was written | files that differ |", "|---|---|---|---|"]
    for name, (num_processes, changes) in CONFIGURATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            kills, in_writing, differing = kill_and_compare(Path(folder), num_processes, changes, num_kills, rng)
        lines.append(f"| {name} | {kills} | {in_writing} | {', '.join(differing) or 'none'} |")
        print(lines[-1], flush=True)
    lines += ["", f"{STEPS} steps each; torch {version('torch')}, accelerate {version('accelerate')}, CPU, gloo."]
    (Path(__file__).parent / "table.md").write_text("\n".join(lines) + "\n")


def kill_and_compare(
    folder: Path, num_processes: int, changes: dict, num_kills: int, rng: random.Random
) -> tuple[int, int, list[str]]:
    """Return the kills, those of them while a checkpoint was written, and the names of files that differ."""
    write_settings(folder, changes)
    started = time.monotonic()
    process = launch(folder, num_processes, folder / "whole")
    wait_for_training(process)
    until_training = time.monotonic()
    finish(process)
    seconds = time.monotonic() - until_training
    print(f"{seconds:.1f} s of training, {until_training - started:.1f} s until it starts", flush=True)
    in_writing = 0
    for number in range(num_kills):
        process = launch(folder, num_processes, folder / "killed")
        if wait_for_training(process):
            if number % 3 == 2:
                is_writing = wait_for_writing(folder / "killed", process)
            else:
                time.sleep(rng.uniform(0, 1.2 * seconds / num_kills))
                is_writing = any((folder / "killed").glob("partial-checkpoint-*"))
            kill(process)
            in_writing += is_writing
        if process.returncode == 0:
            raise SystemExit(f"the run had ended before kill {number + 1} of {num_kills}: give it more steps")
    finish(launch(folder, num_processes, folder / "killed"))
    return num_kills, in_writing, differences(folder / "killed", folder / "whole")


def write_settings(folder: Path, changes: dict) -> None:
    """Write the settings of the runs in a folder, and their network."""
    (folder / "unet.json").write_text(json.dumps(tiny_unet_config(1, out_channels=2, dropout=0.2)))
    settings = {**ALL, **changes, "dataset_name": "digits", "model_config_name_or_path": str(folder / "unet.json")}
    settings["cache_dir"] = str(folder / "cache")
    (folder / "settings.yaml").write_text(json.dumps(settings))  # which YAML is, too


def launch(folder: Path, num_processes: int, output_dir: Path, device: str = "cpu") -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch"]
    command += ["--cpu"] if device == "cpu" else []
    command += ["--num_processes", str(num_processes), str(ROOT / "train_accelerate.py")]
    command += ["--config", str(folder / "settings.yaml"), "--output_dir", str(output_dir)]
    command += ["--resume_from_checkpoint", "latest"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def wait_for_training(process: subprocess.Popen) -> bool:
    """Wait until the first step is done; return False if the process ended before."""
    seen = b""
    while block := os.read(process.stderr.fileno(), 4096):
        seen = seen[-100:] + block
        if b"it/s" in seen or b"s/it" in seen:
            return True
    process.wait()
    return False


def wait_for_writing(output_dir: Path, process: subprocess.Popen) -> bool:
    """Wait until a checkpoint is being written; return False if the process ended before."""
    os.set_blocking(process.stderr.fileno(), False)
    while process.poll() is None:
        process.stderr.read()  # or its pipe fills and it stops
        if any(output_dir.glob("partial-checkpoint-*")):
            return True
    return False


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
    process.wait()


def finish(process: subprocess.Popen) -> None:
    os.set_blocking(process.stderr.fileno(), True)
    output = process.stderr.read()
    if process.wait() != 0:
        raise SystemExit(output.decode())


if __name__ == "__main__":
    main()
