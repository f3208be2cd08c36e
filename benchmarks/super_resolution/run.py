"""Train a model that enlarges images, and compare it with cubic interpolation on images that it has not seen.

    python -m benchmarks.super_resolution.run digits --machine NAME
    python -m benchmarks.super_resolution.run zalando-datasets/fashion_mnist --recipe fashion-mnist --factor 4 \
        --max_train_steps 3459 --machine NAME

A run learns the split `train` of DATA with `--super_resolution`. Compared are images of the split `test`, or every
fifth image, which is then not trained on. PSNR and SSIM are those of `hf-ddpm evaluate`. Appends a row to
`rows.jsonl`, and writes `table.md` and `triples.png`: the enlarged small image, the sample and the truth.
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

from hf_ddpm import ConditionalDDPMPipeline
from hf_ddpm.data.batches import center_pixels
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.sources import open_dataset
from hf_ddpm.data.splits import open_split
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.figures import png_bytes, strip, to_pil
from hf_ddpm.runtime.errors import MissingSplitError
from hf_ddpm.runtime.format import format_measurement
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.sampler import seeded_generators

FOLDER = Path(__file__).parent
ROWS = FOLDER / "rows.jsonl"
NUM_SHOWN, NUM_STEPS = 8, 20


def main() -> None:
    """Train, measure, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="A Hub id, a folder, or digits.")
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--num_images", type=int, default=1000, help="The most images that are compared.")
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        saved, model = (str(Path(folder) / name) for name in ("data", "model"))
        save_splits(options.data, saved, options.num_images)
        command = [sys.executable, "-m", "hf_ddpm", "train", "--recipe", options.recipe, "--dataset_name", saved]
        command += ["--super_resolution", str(options.factor), "--stable_target_images", "0", "--cache_dir", folder]
        command += ["--max_train_steps", str(options.max_train_steps), "--output_dir", model, "--no_save_figures"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        data = DataConfig(dataset_name=saved, cache_dir=folder)
        result = evaluate(model, metrics=["psnr", "ssim"], data=data, num_images=options.num_images)
        row = {
            "data": Path(options.data).name,
            "factor": options.factor,
            "steps": read_run(Path(model))["training"]["steps"],
            "seconds": read_run(Path(model))["training"]["seconds"],
            "images": result["results"][0]["num_compared"][0],
            "machine": options.machine,
            "date": time.strftime("%Y-%m-%d"),
        }
        for measured in result["results"]:
            for name, value in (("sample", measured), ("cubic", measured["input"])):
                row[f"{measured['metric']}_{name}"] = [value["value"], value["standard_error"]]
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        write_table([json.loads(line) for line in ROWS.read_text().splitlines()])
        with open_split(data, "test") as test:
            draw(model, torch.from_numpy(np.array(center_pixels(test)[:NUM_SHOWN])), options.factor)


def save_splits(name: str, path: str, num_images: int) -> None:
    """Save DATA in two splits; without a split `test`, every fifth image is one of it. Its images are shuffled."""
    config = DataConfig(dataset_name=name)
    train = open_dataset(config, "train")
    try:
        test = open_dataset(config, "test")
    except MissingSplitError:
        is_test = np.arange(len(train)) % 5 == 0
        train, test = (train.select(np.flatnonzero(each)) for each in (~is_test, is_test))
    order = np.random.default_rng(0).permutation(len(test))[:num_images]
    datasets.DatasetDict({"train": train, "test": test.select(order)}).save_to_disk(path)


def draw(model: str, truth: Tensor, factor: int) -> None:
    """Draw what the model makes of small images, in columns, beside the images themselves, (N, C, H, W) uint8."""
    pipeline = ConditionalDDPMPipeline.from_pretrained(model).use(num_inference_steps=NUM_STEPS)
    pipeline.set_progress_bar_config(disable=True)
    small = torch.nn.functional.interpolate(
        truth.float() / 255, scale_factor=1 / factor, mode="bicubic", antialias=True, align_corners=False
    )
    small = (small.clamp(0, 1) * 255).round() / 255
    generators = seeded_generators(range(len(truth)), pipeline.device)
    samples = pipeline(small, generator=generators, output_type="pt").images
    rows = [to_pil(pipeline.to_conditions(small)), to_pil(samples), to_pil(truth)]
    names = ["enlarged by cubic interpolation", "by the model", "truth"]
    (FOLDER / "triples.png").write_bytes(png_bytes(strip(rows, [""] * len(truth), names)))


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write a line for each run."""
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}; samples in 20 steps of UniPC, of images that "
        "were not trained on. More PSNR (in dB) and more SSIM are better; ± is the standard error over images. Small "
        "images are made by cubic interpolation with an antialiasing filter, and enlarged again by the same.\n\n"
        "| date | machine | data | factor | steps | seconds | images | PSNR, cubic | PSNR, model | SSIM, cubic "
        "| SSIM, model |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        cells = [format_measurement(*row[name]) for name in ("psnr_cubic", "psnr_sample", "ssim_cubic", "ssim_sample")]
        text += (
            f"| {row['date']} | {row['machine']} | {row['data']} | {row['factor']} | {row['steps']:,} "
            f"| {row['seconds']:.0f} | {row['images']:,} | {' | '.join(cells)} |\n"
        )
    (FOLDER / "table.md").write_text(text)


if __name__ == "__main__":
    main()
