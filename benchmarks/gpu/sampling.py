"""The parts that count sampled images per second, beside stock's pipeline."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch

from benchmarks.gpu.case import Case, Measured
from benchmarks.sampling_throughput.run import ours, seconds, stock
from benchmarks.throughput.run import wait_for
from hf_ddpm.network_config import sized_config
from tests.support.networks import tiny_unet_config

TURNS = 3


def eager(case: Case) -> Iterator[Measured]:
    """Sample in float32 and in bf16."""
    yield from _sample(case, {"float32": {}, "bf16": {"dtype": "bf16"}})


def compiled(case: Case) -> Iterator[Measured]:
    """Sample in bf16, compiled."""
    yield from _sample(case, {"bf16, compiled": {"dtype": "bf16", "compile": True}})


def _sample(case: Case, ways: dict[str, dict[str, Any]]) -> Iterator[Measured]:
    """Let ours and stock's pipeline take turns, and yield their speeds."""
    options = argparse.Namespace(
        images=64 if case.is_small else 512, steps=3 if case.is_small else 20, device=case.device
    )
    torch.manual_seed(0)
    settings = tiny_unet_config(3, case.side) if case.is_small else sized_config((case.side, case.side), 3, 3)
    unet: Any = diffusers.UNet2DModel.from_config(settings)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    with tempfile.TemporaryDirectory() as folder:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
        samplers = {"stock, float32": stock(folder, options)}
        samplers |= {name: ours(folder, options, **settings) for name, settings in ways.items()}
    first = {name: _seconds(sample, case.device) for name, sample in samplers.items()}
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(TURNS):
        for name, sample in samplers.items():
            taken[name].append(_seconds(sample, case.device))
    base = taken["stock, float32"]
    for name, own in taken.items():
        ratio = statistics.median(a / b for a, b in zip(base, own, strict=True))
        note = f"{ratio:.2f} times stock; {options.steps} steps of DPM-Solver++; first call {first[name]:.1f} s"
        yield Measured(name, options.images / statistics.median(own), "images/s", note)


def _seconds(sample: Callable[[], None], device: str) -> float:
    def sample_and_wait() -> None:
        sample()
        wait_for(device)

    return seconds(sample_and_wait)
