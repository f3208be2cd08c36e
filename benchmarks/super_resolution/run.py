"""Train a model that makes images from images, and compare what it makes with the truth, on images that it never saw.

    python -m benchmarks.super_resolution.run digits --machine NAME
    python -m benchmarks.super_resolution.run zalando-datasets/fashion_mnist --recipe fashion-mnist --factor 4 \
        --max_train_steps 3459 --machine NAME
    python -m benchmarks.super_resolution.run pairs --condition_column condition --resolution 32 --machine NAME

A run learns the split `train` of DATA with `--super_resolution`, or with the column of conditions that is named.
Compared are images of the split `test`, or every fifth image, which is then not trained on. PSNR and SSIM are those of
`hf-ddpm evaluate`; beside them stands what the condition itself gets, which is the small image, enlarged by cubic
interpolation. Appends a row to `rows.jsonl`, and writes `table.md` and `triples-DATA.png`: the condition, the sample
and the truth. Other options are those of `hf-ddpm train`. `emoji.py` makes pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from hf_ddpm import ConditionalDDPMPipeline
from hf_ddpm.condition import read_condition
from hf_ddpm.data.conditions import Pairs, pairs_of
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.splits import open_split
from hf_ddpm.data.tables import open_dataset
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.fidelity import mean_of, psnr, ssim
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
    parser.add_argument("--condition_column", help="Makes images from this column, instead of from small images.")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--num_images", type=int, default=1000, help="The most images that are compared.")
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    options, of_training = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        saved, model = (str(Path(folder) / name) for name in ("data", "model"))
        save_splits(data_of(options, options.data), saved, options.num_images)
        command = [sys.executable, "-m", "hf_ddpm", "train", "--recipe", options.recipe, "--dataset_name", saved]
        command += ["--stable_target_images", "0", "--cache_dir", folder, "--output_dir", model, "--no_save_figures"]
        command += ["--max_train_steps", str(options.max_train_steps)]
        if options.condition_column is None:
            command += ["--super_resolution", str(options.factor)]
        else:
            command += ["--condition_column", options.condition_column]
        if options.resolution is not None:
            command += ["--resolution", str(options.resolution)]
        subprocess.run(command + of_training, check=True, stdout=subprocess.DEVNULL)
        data = replace(data_of(options, saved), cache_dir=folder)
        result = evaluate(model, metrics=["psnr", "ssim"], data=data, num_images=options.num_images)
        row = {
            "data": Path(options.data).name,
            "factor": None if options.condition_column else options.factor,
            "steps": read_run(Path(model))["training"]["steps"],
            "seconds": read_run(Path(model))["training"]["seconds"],
            "images": result["results"][0]["num_compared"][0],
            "machine": options.machine,
            "date": time.strftime("%Y-%m-%d"),
        }
        for measured in result["results"]:
            row[measured["metric"]] = [measured["value"], measured["standard_error"]]
        condition = read_condition(Path(model))
        assert condition is not None
        with open_split(data, "test") as test:
            pairs = pairs_of(condition, test, np.arange(row["images"]))
        for name, measure in (("psnr", psnr), ("ssim", ssim)):
            row[f"{name}_condition"] = [*mean_of(measure(pairs.conditions, pairs.images))]
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        write_table([json.loads(line) for line in ROWS.read_text().splitlines()])
        (FOLDER / f"triples-{row['data']}.png").write_bytes(png_bytes(draw(model, pairs)))


def data_of(options: argparse.Namespace, name: str) -> DataConfig:
    return DataConfig(
        dataset_name=name,
        condition_column=options.condition_column,
        image_column="image" if options.condition_column else None,
        resolution=options.resolution,
    )


def save_splits(config: DataConfig, path: str, num_images: int) -> None:
    """Save DATA in two splits; without a split `test`, every fifth image is one of it. Its images are shuffled."""
    train = open_dataset(config, "train", with_conditions=True)
    try:
        test = open_dataset(config, "test", with_conditions=True)
    except MissingSplitError:
        is_test = np.arange(len(train)) % 5 == 0
        train, test = (train.select(np.flatnonzero(each)) for each in (~is_test, is_test))
    order = np.random.default_rng(0).permutation(len(test))[:num_images]
    datasets.DatasetDict({"train": train, "test": test.select(order)}).save_to_disk(path)


def draw(model: str, pairs: Pairs) -> Image.Image:
    """Return what the model makes of conditions, in columns, beside conditions and truth."""
    pipeline = ConditionalDDPMPipeline.from_pretrained(model).use(num_inference_steps=NUM_STEPS)
    pipeline.set_progress_bar_config(disable=True)
    conditions, truth = pairs.conditions[:NUM_SHOWN], pairs.images[:NUM_SHOWN]
    generators = seeded_generators(range(len(truth)), pipeline.device)
    samples = pipeline(conditions, generator=generators, output_type="pt").images
    return strip(
        [to_pil(conditions), to_pil(samples), to_pil(truth)], [""] * len(truth), ["condition", "by the model", "truth"]
    )


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write a line for each run."""
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}; samples in 20 steps of UniPC, of images that "
        "were not trained on. More PSNR (in dB) and more SSIM are better; ± is the standard error over images. With a "
        "factor, the condition is the small image, enlarged: both by cubic interpolation, the first with an "
        "antialiasing filter.\n\n"
        "| date | machine | data | factor | steps | seconds | images | PSNR, condition | PSNR, model "
        "| SSIM, condition | SSIM, model |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        cells = [format_measurement(*row[name]) for name in ("psnr_condition", "psnr", "ssim_condition", "ssim")]
        text += (
            f"| {row['date']} | {row['machine']} | {row['data']} | {row['factor'] or ''} | {row['steps']:,} "
            f"| {row['seconds']:.0f} | {row['images']:,} | {' | '.join(cells)} |\n"
        )
    (FOLDER / "table.md").write_text(text)


if __name__ == "__main__":
    main()
