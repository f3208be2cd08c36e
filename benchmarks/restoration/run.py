"""Restore digits from small, blurred, and noisy images with holes, and compare with what needs no model.

    python -m benchmarks.restoration.run --machine NAME

A model learns all digits but 64, and 32 of these are measured: averaged over 2 x 2 pixels, blurred by a Gaussian of
one pixel, or seen through a mask with half of the pixels, each with noise. PSNR is 10 log10(1 / MSE) of pixels in
[0, 1], with the MSE over all images: of one sample of p(image | y), as `restore` gives it, and of the mean of 4 of
them. A true image and samples of the true distribution are alike. So the variance V of the samples says what MSE their
mean must have, (1 + 1 / 4) V: the PSNR by spread. Beside them stand, without a model::

    enlarged        bicubic, for the small images; the measurement itself for the others
    linear          the best linear estimate, with mean and covariance of the digits of training

Appends rows to `rows.jsonl`, and writes `table.md` and `grid.png`: digit, measurement, linear estimate, two samples,
and the mean of 4, one under the other for each of three measurements.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.data.tables import open_dataset
from hf_ddpm.figures import grid, to_pil
from hf_ddpm.measurements import Operator, blur, downsample, mask
from hf_ddpm.restoration import restore
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import seeded_generators

FOLDER = Path(__file__).parent
NUM_HELD_OUT, NUM_MEASURED, NUM_SAMPLES, NUM_SHOWN = 64, 32, 4, 8
HOLES = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
TASKS: dict[str, tuple[Operator, float]] = {
    "2x smaller": (downsample(2), 0.02),
    "blurred": (blur(1.0), 0.02),
    "half of the pixels": (mask(HOLES), 0.1),
}
# Scheduler, steps, gradients of each step.
SETTINGS = [
    ("unipc", 20, 1),
    ("unipc", 20, 2),
    ("unipc", 20, 3),
    ("unipc", 20, 5),
    ("ddpm", 20, 3),
]
SHOWN = ("unipc", 20, 3)


def main() -> None:
    """Train, restore, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A model of the digits that remain, instead of one that is trained.")
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    options = parser.parse_args()
    config = DataConfig(dataset_name="digits")
    digits, cache = open_dataset(config, "train"), load_images(config)
    order = np.random.default_rng(0).permutation(len(digits))
    images = torch.stack([torch.tensor(cache.image(int(i))) for i in order]) / 255
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or train(digits.select(order[NUM_HELD_OUT:]), folder)
        pipeline, _ = load_for_sampling(model, uniform=True)
        steps = read_run(Path(model))["training"]["steps"]
    about = {"trained_steps": steps, "machine": options.machine, "date": time.strftime("%Y-%m-%d")}
    measured, training = images[:NUM_MEASURED], images[NUM_HELD_OUT:]
    pictures = [rows_of(pipeline, measured, training, name, about) for name in TASKS]
    grid(to_pil(torch.cat(pictures)), columns=NUM_SHOWN).save(FOLDER / "grid.png")


def train(digits: datasets.Dataset, folder: str) -> str:
    """Train a model of some digits by the default settings, and return its folder."""
    data, model = (str(Path(folder) / name) for name in ("data", "model"))
    parts: Any = {"train": digits}
    datasets.DatasetDict(parts).save_to_disk(data)
    command = [sys.executable, "-m", "hf_ddpm", "train", "--recipe", "digits", "--dataset_name", data]
    command += ["--output_dir", model, "--cache_dir", folder, "--no_save_figures"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return model


def rows_of(pipeline: Any, images: Tensor, training: Tensor, name: str, about: dict[str, Any]) -> Tensor:
    """Measure the images and append a row for each way to restore them; return six rows of images for the picture."""
    operator, noise_std = TASKS[name]
    about = {**about, "measurement": name, "noise_std": noise_std, "num_images": len(images)}
    y = operator(images)
    y = y + noise_std * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    if name == "half of the pixels":
        y = mask(HOLES)(y)
    enlarged = F.interpolate(y, size=images.shape[2:], mode="bicubic").clamp(0, 1)
    linear = linear_estimate(y, operator, noise_std, training).clamp(0, 1)
    append({**about, "method": "enlarged", "psnr_of_mean": psnr(enlarged, images)})
    append({**about, "method": "linear", "psnr_of_mean": psnr(linear, images)})
    shown = torch.empty(0)
    for scheduler, steps, num_gradients in SETTINGS:
        samples = restore(
            pipeline.use(scheduler, steps),
            y.repeat_interleave(NUM_SAMPLES, dim=0),
            operator,
            noise_std,
            generator=seeded_generators(range(len(images) * NUM_SAMPLES), pipeline.device),
            output_type="pt",
            num_gradients=num_gradients,
        )
        samples = samples.cpu().view(len(images), NUM_SAMPLES, *images.shape[1:])
        mean = samples.mean(dim=1)
        spread = float(samples.var(dim=1).mean()) * (1 + 1 / NUM_SAMPLES)
        row = {"method": "restore", "scheduler": scheduler, "steps": steps, "num_gradients": num_gradients}
        row |= {"psnr_of_sample": psnr(samples[:, 0], images), "psnr_of_mean": psnr(mean, images)}
        row |= {"psnr_by_spread": -10 * float(np.log10(spread))}
        row |= {"misfit": float((operator(samples.flatten(0, 1)) - y.repeat_interleave(NUM_SAMPLES, dim=0)).std())}
        append({**about, **row})
        if (scheduler, steps, num_gradients) == SHOWN:
            measured = F.interpolate(y, size=images.shape[2:], mode="nearest")
            shown = torch.cat([x[:NUM_SHOWN] for x in (images, measured, linear, samples[:, 0], samples[:, 1], mean)])
    return shown.clamp(0, 1)


def linear_estimate(y: Tensor, operator: Operator, noise_std: float, training: Tensor) -> Tensor:
    """Return the mean of a normal distribution with mean and covariance of the training images, given y."""
    rows = training.flatten(1).double()
    mean, covariance = rows.mean(dim=0), torch.cov(rows.T)
    size = covariance.shape[0]
    matrix = operator(torch.eye(size, dtype=torch.float64).view(size, *training.shape[1:])).flatten(1).T
    noise = noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = torch.linalg.solve(matrix @ covariance @ matrix.T + noise, matrix @ covariance).T
    estimate = mean + (y.flatten(1).double() - matrix @ mean) @ gain.T
    return estimate.view(len(y), *training.shape[1:]).float()


def psnr(estimates: Tensor, images: Tensor) -> float:
    """Return the PSNR in decibels of images in [0, 1], with the MSE over all of them."""
    return -10 * float((estimates - images).square().mean().log10())


def append(row: dict[str, Any]) -> None:
    """Append a row to rows.jsonl and write table.md."""
    with (FOLDER / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    write_table([json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()])


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write table.md: a line for each row, in the order in which they were measured."""
    last = rows[-1]
    text = (
        f"{last['date']}, {last['machine']}, torch {version('torch')}, diffusers {version('diffusers')}. A model of "
        f"the digits without these {last['num_images']} and others, after {last['trained_steps']:,} steps. PSNR in "
        f"decibels of pixels in [0, 1]; higher is better. The mean is that of {NUM_SAMPLES} samples; without a model "
        "there is one estimate. The PSNR by spread is that which the mean would have if the samples were of the true "
        "distribution. "
        "The misfit is the standard deviation of A x - y. For true images it is the noise, and 0.07 for half of the "
        "pixels, of which the others count as 0.\n\n"
        "| measurement | noise | method | scheduler | steps | gradients per step | PSNR, mean | PSNR, one sample "
        f"| PSNR by spread | misfit |\n|{'---|' * 10}\n"
    )
    for row in rows:
        cells = [row["measurement"], f"{row['noise_std']:g}", row["method"]]
        cells += [str(row.get(name, "")) for name in ("scheduler", "steps", "num_gradients")]
        cells += [f"{row[n]:.1f}" if n in row else "" for n in ("psnr_of_mean", "psnr_of_sample", "psnr_by_spread")]
        cells.append(f"{row['misfit']:.3f}" if "misfit" in row else "")
        text += f"| {' | '.join(cells)} |\n"
    (FOLDER / "table.md").write_text(text)


if __name__ == "__main__":
    main()
