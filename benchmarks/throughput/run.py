"""Compare the speed of training: hf_ddpm against the loop of diffusers' own example, in one run.

    python -m benchmarks.throughput.run [--threads N] [--turns N]

    stock            the loop of diffusers' examples/unconditional_image_generation, float32, on a network of
                     32/64/64 channels with diffusers' 8 channels per head of attention and 32 groups per norm
    ours, same net   `train`, --mixed_precision bf16 --compile, of that network
    ours             the same, of the network that is made for the data
    ours, float32    --mixed_precision no --compile
    ours, eager      --mixed_precision bf16 alone
    128 channels     bf16 and compiled, at every level of the network

Each is a process of its own, which takes a few steps when its turn comes and waits otherwise, so that a change of the
machine's speed meets all alike; the ratio of each turn is kept. A product of two matrices of 2048 x 2048 takes a turn,
too: the peak. FLOPs are counted, forward and backward; a multiplication and an addition are two. Writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_ddpm.network_config import sized_config

SIDE, STEPS_PER_TURN, WARM_UP_STEPS = 28, 4, 4
WIDE = "128 channels"


def net_config(way: str) -> dict[str, Any]:
    settings = sized_config((SIDE, SIDE), 1, 1)
    if way in ("stock", "ours, same net"):
        settings |= {"attention_head_dim": 8, "norm_num_groups": 32}
    if way == WIDE:
        settings |= {"block_out_channels": [128] * len(settings["block_out_channels"]), "norm_num_groups": 32}
    return settings


WAYS: dict[str, dict[str, Any]] = {
    "stock": {},
    "ours, same net": {"mixed_precision": "bf16", "compile": True},
    "ours": {"mixed_precision": "bf16", "compile": True},
    "ours, float32": {"mixed_precision": "no", "compile": True},
    "ours, eager": {"mixed_precision": "bf16", "compile": False},
    WIDE: {"mixed_precision": "bf16", "compile": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way is not None:
        take_turns(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", 256)
        options.folder = folder
        children, first = {}, {}
        for way in WAYS:
            children[way] = start(way, options)
            first[way] = answer(children[way])
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        peaks: dict[str, list[float]] = {"bf16": [], "float32": []}
        for _ in range(options.turns):
            for way, child in children.items():
                child.stdin.write("\n")
                child.stdin.flush()
                taken[way].append(answer(child))
            peaks["bf16"].append(matrix_product(torch.bfloat16))
            peaks["float32"].append(matrix_product(torch.float32))
        for child in children.values():
            child.kill()
            child.wait()
    text = table(options, first, taken, peaks)
    Path(__file__).with_name("table.md").write_text(text)
    print(text)


def table(options: argparse.Namespace, first: dict, taken: dict, peaks: dict[str, list[float]]) -> str:
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}, {platform.machine()}, {options.threads} "
        f"threads; batches of {options.batch} gray images of {SIDE}x{SIDE}, {options.turns} turns of "
        f"{STEPS_PER_TURN} steps, medians. Peak, by a product of matrices: bf16 "
        f"{statistics.median(peaks['bf16']):.0f} GFLOP/s, float32 {statistics.median(peaks['float32']):.0f}. "
        "More images/s are better. `against stock` is the median of the ratios of each turn (smallest to largest in "
        "brackets), not the ratio of the medians beside it. `of the peak` is of the peak of the row's own precision, "
        "so compare it between rows of one precision only.\n\n"
        "| loop | parameters | MFLOP per image | ms per step | images/s | GFLOP/s | of the peak | against stock | "
        f"first {WARM_UP_STEPS} steps, s |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    for way, own in taken.items():
        parameters, flops = count(way)
        kind = "bf16" if WAYS[way].get("mixed_precision") == "bf16" else "float32"
        rates = [flops * options.batch / t / 1e9 for t in own]
        share = statistics.median(rate / peak for rate, peak in zip(rates, peaks[kind], strict=True))
        ratios = [a / b for a, b in zip(taken["stock"], own, strict=True)]
        spread = "" if way == "stock" else f" ({min(ratios):.2f} to {max(ratios):.2f})"
        against = "" if way == WIDE else f"{statistics.median(ratios):.2f}{spread}"
        text += (
            f"| {way} | {parameters:,} | {flops / 1e6:,.0f} | {1e3 * statistics.median(own):.0f} | "
            f"{options.batch / statistics.median(own):.1f} | {statistics.median(rates):.0f} | {share:.0%} | "
            f"{against} | {first[way] * WARM_UP_STEPS:.0f} |\n"
        )
    return text


def count(way: str) -> tuple[int, int]:
    """Return the number of parameters, and the FLOPs of a training step per image."""
    from diffusers import UNet2DModel

    from hf_ddpm.training.dry_run import count_flops

    unet = UNet2DModel.from_config(net_config(way))
    return sum(p.numel() for p in unet.parameters()), count_flops(unet)[1]


def matrix_product(dtype: torch.dtype, size: int = 2048, device: str = "cpu") -> float:
    """Return the GFLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(a, b)
    wait_for(device)
    started = time.perf_counter()
    for _ in range(4):
        torch.mm(a, b)
    wait_for(device)
    return 4 * 2 * size**3 / (time.perf_counter() - started) / 1e9


def wait_for(device: str) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def start(way: str, options: argparse.Namespace) -> subprocess.Popen:
    words = [sys.executable, __file__, "--way", way, "--folder", options.folder]
    words += ["--threads", str(options.threads), "--batch", str(options.batch)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(child: subprocess.Popen) -> float:
    """Return the seconds per step of a turn."""
    for line in child.stdout:
        if line.startswith("turn "):
            return float(line.split()[1])
    raise SystemExit("a process has ended")


def take_turns(options: argparse.Namespace) -> None:
    """Warm up, then take a turn for each line of standard input."""
    state = {"steps": 0, "of_turn": WARM_UP_STEPS, "since": time.perf_counter()}

    def after_step() -> None:
        state["steps"] += 1
        if state["steps"] < state["of_turn"]:
            return
        print("turn", (time.perf_counter() - state["since"]) / state["of_turn"], flush=True)
        sys.stdin.readline()
        state.update(steps=0, of_turn=STEPS_PER_TURN, since=time.perf_counter())

    if options.way == "stock":
        stock_loop(net_config("stock"), options.batch, after_step)
    else:
        our_loop(options, after_step)


def our_loop(options: argparse.Namespace, after_step: Callable[[], None]) -> None:
    from hf_ddpm.training.averages import EMA
    from hf_ddpm.training.config import TrainingConfig
    from hf_ddpm.training.loop import train

    name = options.way.replace(", ", "-").replace(" ", "-")
    network = Path(options.folder, f"{name}.json")
    network.write_text(json.dumps(net_config(options.way)))
    update = EMA.update

    def update_and_wait(self: EMA, *arguments: Any) -> None:
        update(self, *arguments)
        after_step()

    EMA.update = update_and_wait
    train(
        TrainingConfig(
            train_data_dir=f"{options.folder}/images",
            cache_dir=f"{options.folder}/cache-{name}",
            model_config_name_or_path=str(network),
            output_dir=f"{options.folder}/{name}",
            train_batch_size=options.batch,
            max_train_steps=10**6,
            checkpointing_steps=10**6,
            cpu_threads_per_process=options.threads,
            **WAYS[options.way],
        )
    )


def stock_loop(
    net: dict[str, Any], batch: int, after_step: Callable[[], None], device: str = "cpu", precision: str = "no"
) -> None:
    """Train as diffusers' `train_unconditional.py` does, with the images in memory, until `after_step` raises."""
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    unet: Any = UNet2DModel.from_config(net)
    unet.to(device)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    images = torch.randn(256, net["in_channels"], net["sample_size"], net["sample_size"])
    while True:
        clean = images[torch.randint(len(images), (batch,))].to(device)
        noise = torch.randn_like(clean)
        t: Any = torch.randint(0, 1000, (batch,), device=device).long()
        noisy = noise_scheduler.add_noise(clean, noise, t)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            prediction = unet(noisy, t).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()
        after_step()


if __name__ == "__main__":
    main()
