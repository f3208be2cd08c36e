"""Change one factor of training at a time, at equal work, and measure what it does to the samples.

    python -m benchmarks.recipe.run DATA NAME [--steps 950 ...]
    python -m benchmarks.recipe.run --table

Trains a network on the training images of DATA, a folder or Hub id, by a loop that has each factor as an option;
`hf_ddpm` holds only what has won here. Then measures the Fréchet and kernel distances of samples (20 steps of
DPM-Solver++, bfloat16, compiled) to the test images, by efficientnet-lite0. The distances depend on --images, so
compare rows of one number of images only. Appends a row to `rows.jsonl` and writes `table.md`. A row without options
has uniform t, 32 groups, cosine decay and timesteps that only shift.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from hf_ddpm import DDPMPipeline, DDPMScheduler, figures
from hf_ddpm.evaluation.distances import Moments, frechet_distance, kernel_distance
from hf_ddpm.evaluation.features import load_network
from hf_ddpm.network import compile_network, use_plain_attention
from hf_ddpm.network_config import sized_config
from hf_ddpm.objective import posterior_means
from hf_ddpm.sampling.loading import speed_up
from hf_ddpm.sampling.sampler import iter_samples
from hf_ddpm.solvers import named_scheduler
from hf_ddpm.training.averages import assign
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.optimizer import make_optimizer
from hf_ddpm.training.posthoc import power_decay

ROWS = Path(__file__).with_name("rows.jsonl")
T = 1000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=1000, help="samples that are measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stds", type=float, nargs="+", default=[0.08], help="lengths of the average")
    # The factors
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", default="cosine", choices=("cosine", "linear", "constant", "last half"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--density", type=float, nargs=2, help="mean and std of log(noise / signal); else uniform t")
    parser.add_argument("--min_snr", type=float, help="gamma of the weight; else 1")
    parser.add_argument("--nearest", type=int, default=1, help="noises of which the nearest to the image is taken")
    parser.add_argument("--others", type=int, default=0, help="images besides its own that a target is the mean of")
    parser.add_argument("--beta_schedule", default="squaredcos_cap_v2")
    parser.add_argument("--prediction_type", default="v_prediction")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--groups", type=int, default=32, help="of the group normalization")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--attends", type=int, default=16, help="levels of so many pixels and less do")
    parser.add_argument("--zero_branches", action="store_true", help="begin with residual branches that add 0")
    parser.add_argument("--scale_shift", action="store_true", help="the timestep scales, too")
    # What should change nothing
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--eager", action="store_true", help="do not compile the training")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not options.table:
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        ROWS.open("a").write(json.dumps(measure(options)) + "\n")
    write_table()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train, sample, compare, and return the row."""
    train, moments, features = load_data(options.data)
    scheduler = DDPMScheduler(
        T,
        beta_schedule=options.beta_schedule,
        prediction_type=options.prediction_type,
        timestep_spacing="trailing",
    )
    unet = make_unet(options, train.shape[1], train.shape[2])
    averages, seconds, losses = learn(options, unet, scheduler, train)
    row: dict[str, Any] = {
        "name": options.name,
        "options": sys.argv[3:],
        "data": Path(options.data).name,
        "steps": options.steps,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "cpu_seconds_per_step": seconds,
        "loss": losses,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "machine": f"{platform.machine()}, {options.threads} threads",
        "images": options.images,
        "distances": [],
    }
    pipeline = DDPMPipeline(unet.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = named_scheduler("dpmsolver++", scheduler.config, 20)
    speed_up(pipeline, "bf16", compile=True)
    network = load_network("efficientnet-lite0", None, "cpu")
    for std, average in averages.items():
        assign(list(unet.parameters()), average)
        samples = iter_samples(pipeline, range(options.images), batch_size=64, num_inference_steps=20)
        images = torch.cat([part for _, part in samples])
        own = torch.cat([network(part) for part in images.split(64)])
        fd = frechet_distance(Moments.of(own), moments)
        row["distances"].append({"std": std, "fd": fd, "kid": kernel_distance(own, features).distance})
        pictures = Path("recipe-samples")
        pictures.mkdir(exist_ok=True)
        figures.grid(figures.to_pil(images[:64])).save(pictures / f"{options.name}-{std}.png")
    return row


def load_data(name: str) -> tuple[Tensor, Moments, Tensor]:
    """Return the training images, (N, C, H, W) uint8; the moments and 4,000 features of the test images."""
    images = {}
    for split in ("train", "test"):
        loaded = datasets.load_dataset(name, split=split)
        column = next(c for c, kind in loaded.features.items() if isinstance(kind, datasets.Image))
        stacked = np.stack([np.asarray(image) for image in loaded[column]])
        images[split] = torch.from_numpy(stacked if stacked.ndim == 4 else stacked[..., None]).permute(0, 3, 1, 2)
    cache = Path("recipe-reference") / f"{Path(name).name}.pt"
    if not cache.exists():
        network = load_network("efficientnet-lite0", None, "cpu")
        cache.parent.mkdir(exist_ok=True)
        torch.save(torch.cat([network(part) for part in images["test"].split(64)]), cache)
    features = torch.load(cache)
    return images["train"].contiguous(), Moments.of(features), features[:4000]


def make_unet(options: argparse.Namespace, channels: int, side: int) -> UNet2DModel:
    settings = sized_config((side, side), channels, channels, dropout=options.dropout)
    settings["layers_per_block"] = options.layers
    settings["norm_num_groups"] = options.groups
    if options.widths:
        settings["block_out_channels"] = options.widths
    attends = [side >> level <= options.attends for level in range(len(settings["block_out_channels"]))]
    settings["down_block_types"] = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    settings["up_block_types"] = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    settings["resnet_time_scale_shift"] = "scale_shift" if options.scale_shift else "default"
    unet: Any = UNet2DModel.from_config(settings)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    if options.zero_branches:
        for name, parameter in unet.named_parameters():
            if ".conv2." in name or ".to_out." in name:
                torch.nn.init.zeros_(parameter)
    use_plain_attention(unet, torch.device("cpu"))
    return unet


def learn(
    options: argparse.Namespace, unet: UNet2DModel, scheduler: DDPMScheduler, images: Tensor
) -> tuple[dict[float, list[Tensor]], float, list[float]]:
    """Train the network; return the averages by length, the CPU seconds per step, the mean loss of each tenth."""
    parameters = list(unet.parameters())
    config = TrainingConfig(
        optimizer=options.optimizer, learning_rate=options.lr, mixed_precision=options.mixed_precision
    )
    optimizer = make_optimizer(unet, config)
    averages = {std: [p.detach().clone() for p in parameters] for std in options.stds}
    network = unet if options.eager else compile_network(unet, unet, torch.device("cpu"))
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed + 1))
    losses: list[float] = []
    started = time.process_time()
    for step in range(options.steps):
        if step == 20:  # compiled and warmed up
            started = time.process_time()
        x_0 = images[torch.randint(len(images), (options.batch,), generator=generator)].float() / 127.5 - 1
        t = draw_timesteps(options, scheduler, generator)
        eps = torch.randn((options.nearest, *x_0.shape), generator=generator)
        nearest = (eps - x_0).flatten(2).norm(dim=2).argmin(dim=0)
        eps = eps[nearest, torch.arange(len(x_0))]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            output = network(scheduler.add_noise(x_0, eps, t), t, return_dict=False)[0]
        snr = scheduler.snr(t).float()
        means = (x_0, eps)
        if options.others:
            next_ids = order[(step * options.batch + torch.arange(options.others)) % len(order)]
            means = posterior_means(snr, x_0, eps, images[next_ids].float() / 127.5 - 1)
        error = (output.float() - scheduler.training_target(*means, t)).square().flatten(1).mean(dim=1)
        loss = (error if options.min_snr is None else error * snr.clamp(max=options.min_snr) / (snr + 1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * factor(options.decay, step, options.steps)
        optimizer.step()
        optimizer.zero_grad()
        for std, average in averages.items():
            decay = power_decay(step * options.batch, options.batch, std)
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        losses.append(loss.item())
    seconds = (time.process_time() - started) / (options.steps - 20)
    return averages, seconds, [sum(part) / len(part) for part in np.array_split(losses, 10)]


def draw_timesteps(options: argparse.Namespace, scheduler: DDPMScheduler, generator: torch.Generator) -> Tensor:
    """Draw t, stratified over the batch; with a density, the t next above a normal draw of log(noise / signal)."""
    B = options.batch
    u = (torch.arange(B) + torch.rand(B, generator=generator)) / B
    if options.density is None:
        return (u * T).long().clamp(max=T - 1)
    mean, std = options.density
    log_ratio = -scheduler.snr(torch.arange(T)).log() / 2
    wanted = mean + std * math.sqrt(2) * torch.special.erfinv(2 * u.double() - 1)
    return torch.searchsorted(log_ratio.double(), wanted).clamp(max=T - 1)


def factor(decay: str, step: int, steps: int, warm_up: int = 100) -> float:
    """Return the factor of the learning rate: a shape over all steps, times the warm-up."""
    done = step / steps
    shape = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "constant": 1.0,
        "last half": min(1.0, 2 * (1 - done)),
    }[decay]
    return min(1.0, (step + 1) / warm_up) * shape


def write_table() -> None:
    """Write table.md from rows.jsonl."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    about = rows[-1]
    text = (
        f"torch {about['versions']['torch']}, diffusers {about['versions']['diffusers']}, {about['machine']}; each "
        "row of one training run; its seconds depend on what else ran. FD and KD: lower is better; distances of that "
        "many samples to the test images, by efficientnet-lite0. Of a flag that is given twice, the last value "
        "counts.\n\n"
        "| changed | data | options | steps | parameters | CPU s per step | std of the average | FD | KD | samples |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        for distances in row["distances"]:
            text += (
                f"| {row['name']} | {row['data']} | `{' '.join(row['options'])}` | {row['steps']:,} | "
                f"{row['parameters']:,} | {row['cpu_seconds_per_step']:.3f} | {distances['std']:g} | "
                f"{distances['fd']:.1f} | {distances['kid']:.3f} | {row['images']:,} |\n"
            )
    Path(__file__).with_name("table.md").write_text(text)


if __name__ == "__main__":
    main()
