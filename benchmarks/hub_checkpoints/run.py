"""Kill a run again and again while it uploads a checkpoint, and go on from the Hub in an empty folder each time.

    python -m benchmarks.hub_checkpoints.run --machine NAME [--kills 20]

The Hub is the server of the tests, with the real client. A run is trained once without being disturbed. Then the same
run is started with `--hub_strategy checkpoint`, and SIGKILL ends it at a random moment after an upload has begun. What
the Hub then holds is read: each file that checkpoint.json names must have its size and sha256, and there must be a
checkpoint of an upload that has ended. Each next start has a new, empty folder and `--resume_from_checkpoint hub`.
After that many kills the run is left to finish, and is compared with the undisturbed one to the last bit. Writes
`table.md`.
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
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from benchmarks.kill_test.run import ROOT, kill
from hf_ddpm.runtime.run_files import checkpoint_names
from tests.support.hub_buckets import BucketServer
from tests.support.hub_checkpoints import PLACE, stored
from tests.support.hub_runs import NAME, TOKEN
from tests.support.hub_server import HubServer, client_environment
from tests.support.networks import smallest_unet_config
from tests.support.runs import differences

STEPS = 500
LONGEST_UPLOAD_SECONDS = 1.0
SETTINGS = {
    "dataset_name": "digits",
    "train_batch_size": 4,
    "max_train_steps": STEPS,
    "checkpointing_steps": 2,
    "logging_steps": 5,
    "eval_batch_size": 4,
    "ddpm_num_steps": 20,
    "ddpm_num_inference_steps": 4,
    "cpu_threads_per_process": 1,
    "ema_snapshots": 4,
    "save_figures": False,
}
PUSH = {"push_to_hub": True, "hub_model_id": NAME, "hub_strategy": "checkpoint"}
SERVERS = {"repository": HubServer, "bucket": BucketServer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="the name of this machine for the table")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    heads = ["place", "kills", "of them while an upload was on its way", "whole on the Hub"]
    heads += ["resumed in an empty folder", "files that differ at the end"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "unet.json").write_text(json.dumps(smallest_unet_config(channels=1)))
        finish(launch(folder, folder / "whole", None))
        for place in SERVERS:
            on_their_way, differing = kill_and_compare(folder, place, options.kills, random.Random(0))
            counts = f"{options.kills} | {on_their_way} | {options.kills} | {options.kills}"
            lines.append(f"| {place} | {counts} | {', '.join(differing) or 'none'} |")
            print(lines[-1], flush=True)
    versions = [f"{name} {version(name)}" for name in ("huggingface_hub", "hf-xet", "torch")]
    lines += ["", f"{STEPS} steps, a checkpoint after each 2; {', '.join(versions)}; {options.machine}."]
    (Path(__file__).parent / "table.md").write_text("\n".join(lines) + "\n")


def kill_and_compare(folder: Path, place: str, num_kills: int, rng: random.Random) -> tuple[int, list[str]]:
    """Return the kills while an upload was on its way, and the names of files that differ at the end."""
    on_their_way = step_before = 0
    with SERVERS[place](tokens={TOKEN: "alice"}) as server:
        for number in range(num_kills):
            output_dir = folder / f"{place}-{number}"
            process = launch(folder, output_dir, server, resumes=number > 0)
            wait_for_upload(server, process)
            time.sleep(rng.uniform(0, LONGEST_UPLOAD_SECONDS))
            kill(process)
            if process.returncode == 0:
                raise SystemExit(f"the run had ended before kill {number + 1} of {num_kills}: give it more steps")
            step, newest = whole_step(server), int(checkpoint_names(output_dir)[-1].rpartition("-")[2])
            if step is None or step <= step_before:
                raise SystemExit(f"kill {number + 1}: the Hub holds step {step} after step {step_before}")
            on_their_way, step_before = on_their_way + (newest > step), step
            print(f"kill {number + 1}: checkpoint-{newest} here, checkpoint-{step} on the Hub", flush=True)
        last = folder / f"{place}-last"
        finish(launch(folder, last, server, resumes=True))
        if whole_step(server) != STEPS:
            raise SystemExit(f"the Hub holds step {whole_step(server)} at the end, not {STEPS}")
    return on_their_way, differences(last, folder / "whole")


def launch(folder: Path, output_dir: Path, server: HubServer | None, resumes: bool = False) -> subprocess.Popen:
    settings = {**SETTINGS, "model_config_name_or_path": folder / "unet.json", "cache_dir": folder / "cache"}
    settings |= {"output_dir": output_dir, **(PUSH if server is not None else {})}
    settings |= {"resume_from_checkpoint": "hub"} if resumes else {}
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_accelerate.py")]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if server is not None:
        environment = {**client_environment(server, folder / "hf", TOKEN), "OMP_NUM_THREADS": "1"}
    if isinstance(server, BucketServer):
        del environment["HF_HUB_DISABLE_XET"]
    log = open(f"{output_dir}.log", "wb")  # noqa: SIM115
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def wait_for_upload(server: HubServer, process: subprocess.Popen) -> None:
    """Wait until an upload begins after one of this start that has ended."""
    first = len(server.requests)
    while process.poll() is None:
        requests = [request.path for request in server.requests[first:] if PLACE in request.path]
        ends = [
            i for i, path in enumerate(requests) if path.endswith((f"{PLACE}/super-squash/main", f"{PLACE}/batch"))
        ]
        if len(ends) >= 4 and ends[-1] < len(requests) - 1:
            return
        time.sleep(0.02)
    raise SystemExit(f"a run ended with code {process.returncode}: {process.args}")


def whole_step(server: HubServer) -> int | None:
    """Return the step of the checkpoint on the Hub, None without one; end if a file that it names is not whole."""
    try:
        files = stored(server)
    except KeyError:
        return None
    if "checkpoint.json" not in files:
        return None
    record = json.loads(files["checkpoint.json"])
    for name, expected in record["files"].items():
        content = files.get(f"{record['folder']}/{name}", b"")
        if (len(content), sha256(content).hexdigest()) != (expected["size"], expected["sha256"]):
            raise SystemExit(f"{name} of step {record['step']} is not whole on the Hub")
    return record["step"]


def finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise SystemExit(f"a run ended with code {process.returncode}: {process.args}")


if __name__ == "__main__":
    main()
