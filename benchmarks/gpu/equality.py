"""The parts that compare bits: the tests that need CUDA, runs that are repeated or killed, stock's images."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks.gpu.case import Case, Measured
from benchmarks.kill_test.run import finish, kill, launch, wait_for_training, write_settings
from hf_ddpm import DDPMPipeline
from hf_ddpm.network_config import sized_config
from hf_ddpm.runtime.run_files import checkpoint_names
from tests.support.networks import tiny_unet_config
from tests.support.runs import differences


def tests(_: Case) -> Iterator[Measured]:
    """Run the package's tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    yield Measured("pytest -m cuda", "failed" if done.returncode else "passed", note=last)


def resumes(case: Case) -> Iterator[Measured]:
    """Train a run three times at once, undisturbed, again, and killed after its first checkpoint and resumed."""
    ways: dict[str, dict[str, Any]] = {precision: {"mixed_precision": precision} for precision in case.precisions}
    if not case.is_small:
        ways["bf16, compiled"] = {"mixed_precision": "bf16", "compile": True}
    with ThreadPoolExecutor(len(ways) if case.device == "cuda" else 1) as threads:
        for each in threads.map(lambda way: list(_repeated_and_killed(way, ways[way], case)), ways):
            yield from each


def _repeated_and_killed(way: str, changes: dict[str, Any], case: Case) -> Iterator[Measured]:
    name = "float32" if way == "no" else way
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        write_settings(folder, {**changes, "max_train_steps": 40, "ema_snapshots": 4, "save_figures": False})
        whole, again, killed = (launch(folder, 1, folder / name, case.device) for name in ("whole", "again", "killed"))
        wait_for_training(killed)
        while killed.poll() is None and not checkpoint_names(folder / "killed"):
            time.sleep(0.01)
        is_over = killed.poll() is not None
        kill(killed)
        step = max((int(each.rpartition("-")[2]) for each in checkpoint_names(folder / "killed")), default=0)
        finish(launch(folder, 1, folder / "killed", case.device))
        finish(whole)
        finish(again)
        found = {"repeated": differences(folder / "again", folder / "whole")}
        found["killed and resumed"] = differences(folder / "killed", folder / "whole")
    if is_over:
        yield Measured(f"{name}, killed and resumed", "failed", note="the run had ended before the kill")
        return
    for what, files in found.items():
        note = ", ".join(files)[:300] or f"killed after step {step} of 40"
        yield Measured(f"{name}, {what}", "differs" if files else "equal", note=note)


def stock_images(case: Case) -> Iterator[Measured]:
    """Sample by stock's pipeline and by ours from the same generator."""
    torch.manual_seed(0)
    settings = tiny_unet_config(3, case.side) if case.is_small else sized_config((case.side, case.side), 3, 3)
    unet: Any = diffusers.UNet2DModel.from_config(settings)
    unet = unet.eval().to(case.device)
    count, num_steps = (2, 5) if case.is_small else (64, 50)
    for kind in ("epsilon", "v_prediction"):
        images = []
        for pipeline_type in (diffusers.DDPMPipeline, DDPMPipeline):
            pipeline = pipeline_type(unet, diffusers.DDPMScheduler(prediction_type=kind))
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator(case.device).manual_seed(0)
            images.append(pipeline(count, generator=generator, num_inference_steps=num_steps, output_type="np").images)
        is_equal = np.array_equal(*images)
        yield Measured(kind, "equal" if is_equal else "differs", note=f"{count} images in {num_steps} steps")
