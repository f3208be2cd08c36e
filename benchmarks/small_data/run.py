"""Measure what happens when a model is trained on few images, with and without augmentation.

    python -m benchmarks.small_data.run digits 140 256 1400 --machine NAME
    python -m benchmarks.small_data.run FOLDER 2624 --recipe fashion-mnist --steps 2000 --machine NAME

The images are shuffled, by seed 0. The first ones, as many as are asked for, are trained on, and the last ones are
held out, the same ones for each number. Each run is `hf-ddpm train` in a process of its own, without stable targets,
once with `--augment_probability 0` and once with 0.12, and is validated a few times (`--eval_steps`). Appends a line
to `rows.jsonl` for each run, and writes `table.md`, and `share-DATA.png` and `val_loss-DATA.png`, the curves of all
lines of the data.
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

import torch
from PIL import Image

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.plots import Curve, draw_curves
from hf_ddpm.runtime.files import read_metrics

FOLDER = Path(__file__).parent
PROBABILITIES = (0.0, 0.12)
VALUES = (
    "kid",
    "kid_standard_error",
    "val_loss",
    "training_share",
    "training_share_by_chance",
    "training_share_p_value",
    "copied_share",
    "training_distance",
    "held_out_distance",
    "real_distance",
)

COLUMNS = (
    *("data", "images", "augmented", "step", "epochs", "nearest to training", "by chance", "p", "copies", "distance"),
    *("real", "KD", "loss"),
)


def main() -> None:
    """Train and validate each number of images with and without augmentation, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="digits, or a folder or data set of images.")
    parser.add_argument("num_images", type=int, nargs="+", help="The numbers of images to train on.")
    parser.add_argument("--num_held_out", type=int, default=397, help="The number of images that are held out.")
    parser.add_argument("--recipe", default="digits", help="The recipe of the runs.")
    parser.add_argument("--steps", type=int, default=400, help="The optimizer steps of each run.")
    parser.add_argument("--eval_steps", type=int, default=100, help="Those between validations.")
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    arguments = parser.parse_args()
    images = load_images(DataConfig(dataset_name=arguments.data))
    for num_images in arguments.num_images:
        for probability in PROBABILITIES:
            with tempfile.TemporaryDirectory() as folder:
                write_images(images, num_images, arguments.num_held_out, Path(folder))
                row = measure(arguments, num_images, probability, Path(folder))
            with (FOLDER / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()]
            write_table(rows)
            draw([line for line in rows if line["data"] == row["data"]], row["data"])


def write_images(images: ImageCache, num_images: int, num_held_out: int, folder: Path) -> None:
    """Write the images of training into `folder/data/train` and those that are held out into `folder/data/test`."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    if num_images + num_held_out > len(order):
        sys.exit(f"{num_images} + {num_held_out} images must be at most {len(order)}: give fewer")
    for split, numbers in (("train", order[:num_images]), ("test", order[-num_held_out:])):
        (folder / "data" / split).mkdir(parents=True)
        for number in numbers:
            pixels = images.image(number)
            picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            picture.save(folder / "data" / split / f"{number:06}.png")


def measure(arguments: argparse.Namespace, num_images: int, probability: float, folder: Path) -> dict[str, Any]:
    """Train once, and return the row of the run."""
    out = folder / "run"
    settings = {
        "recipe": arguments.recipe,
        "dataset_name": folder / "data",
        "cache_dir": folder / "cache",
        "output_dir": out,
        "stable_target_images": 0,
        "augment_probability": probability,
        "max_train_steps": arguments.steps,
        "eval_steps": arguments.eval_steps,
        "eval_num_images": arguments.num_held_out,
        "checkpointing_steps": arguments.steps,
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "hf_ddpm", "train", *options, "--no_save_figures"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    facts = json.loads((out / "run.json").read_text())["training"]
    return {
        "data": Path(arguments.data).name,
        "num_images": num_images,
        "augment_probability": probability,
        "machine": arguments.machine,
        "date": time.strftime("%Y-%m-%d"),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "steps": facts["steps"],
        "images_seen": facts["images"],
        "validations": [
            {name: line[name] for name in ("step", "images", *VALUES)} for line in read_metrics(out / "eval.jsonl")
        ],
    }


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write a line for each validation of each run."""
    lines = [
        "Models of few images, by `python -m benchmarks.small_data.run`, with and without `--augment_probability`.",
        "Epochs are those seen by then. Nearest to training is the share of samples that are nearer to a training",
        "image than to any held-out one, and by chance what a model that does not memorize would have; p is the",
        "probability of a share so large, if which images were held out had been decided afterwards, 0.0001 at least.",
        "Copies are less than a third as far from the nearest training image as from the second nearest. Distance is",
        "the median over samples of the root mean square difference of pixels to the nearest training image, white",
        "being 1; real is that of held-out images. KD is the kernel distance of samples to held-out images with its",
        "standard error, by features of efficientnet-lite0, and loss that of held-out images; lower is better.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in rows:
        for line in row["validations"]:
            lines.append(
                f"| {row['data']} | {row['num_images']:,} | {row['augment_probability']:g} | {line['step']:,} "
                f"| {line['images'] / row['num_images']:.1f} | {line['training_share']:.1%} "
                f"| {line['training_share_by_chance']:.1%} | {line['training_share_p_value']:.2g} "
                f"| {line['copied_share']:.1%} | {line['training_distance']:.3f} | {line['real_distance']:.3f} "
                f"| {line['kid']:.3f} ± {line['kid_standard_error']:.3f} | {line['val_loss']:.4f} |"
            )
    lines += ["", "| data | machine | date | torch, diffusers |", "|---|---|---|---|"]
    lines += dict.fromkeys(
        f"| {row['data']} | {row['machine']} | {row['date']} | {row['torch']}, {row['diffusers']} |" for row in rows
    )
    (FOLDER / "table.md").write_text("\n".join(lines) + "\n")


def draw(rows: list[dict[str, Any]], data: str) -> None:
    """Draw the memorization and the loss of each run over its steps: a color for each number of images."""
    numbers = sorted({row["num_images"] for row in rows})

    def excess(line: dict[str, Any]) -> float:
        chance = line["training_share_by_chance"]
        return (line["training_share"] - chance) / (1 - chance)

    def curves(value: Any) -> list[Curve]:
        return [
            Curve(
                f"{row['num_images']:,} images" + (", augmented" if row["augment_probability"] else ""),
                [line["step"] for line in row["validations"]],
                [value(line) for line in row["validations"]],
                color=numbers.index(row["num_images"]),
                is_dashed=row["augment_probability"] > 0,
            )
            for row in rows
        ]

    draw_curves(
        FOLDER / f"share-{data}.png",
        curves(excess),
        title=f"Samples nearest to a training image, {data}",
        x_label="optimizer step",
        y_label="share beyond chance\n(0: none memorized, 1: all)",
        y_from_zero=True,
    )
    draw_curves(
        FOLDER / f"val_loss-{data}.png",
        curves(lambda line: line["val_loss"]),
        title=f"Loss on held-out images, {data}",
        x_label="optimizer step",
        y_label="mean loss over all t\n(lower is better)",
    )


if __name__ == "__main__":
    main()
