"""Ask how good a model samples in one, two and four steps after minutes of tuning.

    hf-ddpm train --recipe fashion-mnist --dataset_name DATA --output_dir runs/clothes
    python -m benchmarks.tuning.run runs/clothes --machine NAME
    python -m benchmarks.tuning.run runs/clothes --change NUM_SUBSTEPS=1 --machine NAME

Each tuning is `hf-ddpm tune` in a process of its own; `--change` gives a constant of `hf_ddpm/consistency.py` another
value in it. Beside it stands the model before it was tuned, by UniPC. The distances are to the training images, as
`hf-ddpm evaluate` measures them. Appends each row to `rows.jsonl` as soon as it is measured, unless it is there, and
writes `table.md` and `samples.png`: the same noises in 1, 2, 4 and 20 steps. `--speed` then lets stock's
`DDPMPipeline` sample the model as it was in T steps, in turn with a tuned model in each number of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch

from hf_ddpm import DDPMPipeline, consistency
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.figures import png_bytes, strip, to_pil
from hf_ddpm.runtime.files import weights_sha256, write_atomically
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import FORWARD_BATCH, iter_samples, labels_in_turn
from hf_ddpm.solvers import tuned_scheduler

FOLDER = Path(__file__).parent
ROWS = FOLDER / "rows.jsonl"
SPEED = FOLDER / "speed.json"
TURNS = 2
TUNED_STEPS = (1, 2, 4)
SHOWN = 10
# Runs a command of `hf-ddpm` with other constants of the objective.
CHANGED = (
    "import sys; from hf_ddpm import consistency; from hf_ddpm.cli import app; "
    "[setattr(consistency, *(name, type(getattr(consistency, name))(value))) "
    "for name, _, value in (each.partition('=') for each in sys.argv[1].split(',') if each)]; app(sys.argv[2:])"
)


def main() -> None:
    """Measure the model before and after each tuning, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of the run to tune")
    parser.add_argument("--steps", type=int, nargs="*", default=[400], help="the optimizer steps of each tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the seeds of tuning, and of sampling")
    parser.add_argument("--unipc", type=int, nargs="*", default=[20], help="the steps of the model as it was")
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--change", default="", help="NAME=VALUE, several with commas")
    parser.add_argument("--settings", default="", help="further flags of `hf-ddpm tune`, in one text")
    parser.add_argument("--speed", action="store_true", help="compare images per second with stock's T steps, too")
    parser.add_argument("--machine", required=True, help="what the processor is called in the table")
    options = parser.parse_args()
    for change in filter(None, options.change.split(",")):
        if not hasattr(consistency, change.partition("=")[0]):
            parser.error(f"change must name a constant of hf_ddpm/consistency.py, got {change}")
    for seed in options.seeds:
        if options.unipc and not options.change:
            add_rows(options, options.model, [seed, 0, "", ""], "unipc", options.unipc)
        for steps in options.steps:
            cell = [seed, steps, options.change, options.settings]
            if all(is_measured(options, [*cell, "lcm", n]) for n in TUNED_STEPS):
                continue
            with tempfile.TemporaryDirectory() as folder:
                tuned = Path(folder, "tuned")
                tune(options, steps, seed, tuned)
                add_rows(options, tuned, cell, "lcm", TUNED_STEPS)
                if not options.change:
                    draw(options.model, tuned)
    if options.speed:
        write_atomically(SPEED, json.dumps(compare_speed(options.model), indent=2) + "\n")
        write_table(read_rows())


def tune(options: argparse.Namespace, steps: int, seed: int, out: Path) -> None:
    """Tune the model in a process of its own."""
    flags = {"max_train_steps": steps, "seed": seed, "output_dir": out, "checkpointing_steps": steps}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--no_save_figures", "--ema_snapshots", "0", *options.settings.split()]
    command = [sys.executable, "-c", CHANGED, options.change, "tune", str(options.model), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def add_rows(options: argparse.Namespace, model: Path, cell: list[Any], scheduler: str, numbers: Any) -> None:
    """Measure a model in each number of steps, and append the rows that are new."""
    numbers = [n for n in numbers if not is_measured(options, [*cell, scheduler, n])]
    if not numbers:
        return
    result = evaluate(
        model,
        network="efficientnet-lite0",
        num_images=options.num_images,
        seed=10**6 * cell[0],
        schedulers=[scheduler],
        num_inference_steps=numbers,
        dtype="bf16",
        compile=True,
        metrics=["fd", "kid"],
        out=tempfile.mkdtemp(),
    )
    training = read_run(model)["training"]
    for n in numbers:
        measured = [row for row in result["results"] if row["sampling"]["num_inference_steps"] == n]
        row = {
            "cell": [weights_sha256(options.model), options.num_images, *cell, scheduler, n],
            "data": read_run(options.model)["data"]["name"],
            "trained_steps": read_run(options.model)["training"]["steps"],
            "machine": options.machine,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": training["seconds"] if cell[1] else None,
            "seconds_per_image": measured[0]["sampling"].get("seconds_per_image"),
            **{each["metric"]: each["value"] for each in measured},
        }
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    write_table(read_rows())


def compare_speed(model: Path) -> dict[str, Any]:
    """Return the images per second of stock's T steps, and how many times as many each number of tuned steps gives.

    The speed does not depend on the weights: those of the model as it was are sampled as a tuned model is.
    """
    stock = diffusers.DDPMPipeline.from_pretrained(model)
    labels: dict[str, Any] = {}
    if stock.unet.config.num_class_embeds is not None:  # stock's DDPMPipeline takes no labels
        labels = {"class_labels": [0] * FORWARD_BATCH}
        stock = diffusers.ConsistencyModelPipeline(stock.unet, stock.scheduler)
    stock.set_progress_bar_config(disable=True)
    chain = stock.scheduler.config["num_train_timesteps"]
    with tempfile.TemporaryDirectory() as folder:
        saved = DDPMPipeline.from_pretrained(model)
        DDPMPipeline(saved.unet, tuned_scheduler(saved.scheduler.config)).save_pretrained(folder)
        tuned = load_for_sampling(folder, dtype="bf16", compile=True)[0]
    of_tuned: dict[int, list[float]] = {n: [] for n in TUNED_STEPS}

    def sample(n: int) -> None:
        """Sample 16 times FORWARD_BATCH images."""
        classes = [0] * 16 * FORWARD_BATCH if labels else None
        for _ in iter_samples(
            tuned, range(16 * FORWARD_BATCH), batch_size=1, num_inference_steps=n, class_labels=classes
        ):
            pass

    sample(1)  # compiles
    of_stock, ratios = [], {n: [] for n in TUNED_STEPS}
    for _ in range(TURNS):
        for n in TUNED_STEPS:
            of_tuned[n].append(16 * FORWARD_BATCH / seconds(partial(sample, n)))
        of_stock.append(
            FORWARD_BATCH / seconds(lambda: stock(batch_size=FORWARD_BATCH, num_inference_steps=chain, **labels))
        )
        for n in TUNED_STEPS:
            ratios[n].append(of_tuned[n][-1] / of_stock[-1])
    return {
        "chain": chain,
        "stock": of_stock,
        "tuned": {str(n): speeds for n, speeds in of_tuned.items()},
        "ratios": {str(n): each for n, each in ratios.items()},
    }


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def is_measured(options: argparse.Namespace, cell: list[Any]) -> bool:
    whole = [weights_sha256(options.model), options.num_images, *cell]
    return any(row["cell"] == whole for row in read_rows())


def draw(model: Path, tuned: Path) -> None:
    """Draw samples of the same noises: of the tuned model, and in 20 steps of the model as it was."""
    rows, names = [], []
    for folder, numbers in ((tuned, TUNED_STEPS), (model, (20,))):
        for n in numbers:
            pipeline, _ = load_for_sampling(str(folder), None, n)
            labels = labels_in_turn(pipeline.labels, range(SHOWN))
            samples = iter_samples(
                pipeline, range(SHOWN), batch_size=SHOWN, num_inference_steps=n, class_labels=labels
            )
            rows.append(to_pil(torch.cat([images for _, images in samples])))
            names.append("1 step" if n == 1 else f"{n} steps")
    sheet = strip(rows, [f"seed {seed}" for seed in range(SHOWN)], names)
    write_atomically(FOLDER / "samples.png", png_bytes(sheet))


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write table.md, by model, seed and steps."""
    last = rows[-1]
    text = (
        f"{last['date']}, {last['machine']}, torch {version('torch')}, diffusers {version('diffusers')}; sampled in "
        "bf16. FD and KD are the Fréchet and the kernel distance to the training images by features of "
        "efficientnet-lite0; lower is better. Few images make FD larger, so compare it between rows of equally many. "
        "Rows without tuning are of the model as it was.\n\n"
        "| data | trained steps | tuned steps | minutes | changed | seed | sampler | steps | images | FD | KD |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in sorted(rows, key=lambda row: (row["data"], row["cell"][0], row["cell"][1:])):
        _, count, seed, steps, change, settings, scheduler, n = row["cell"]
        minutes = "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"
        text += (
            f"| {row['data']} | {row['trained_steps']:,} | {steps or ''} | {minutes} | {change} {settings} | {seed} "
            f"| {scheduler} | {n} | {count:,} | {row['fd']:.1f} | {row['kid']:.4f} |\n"
        )
    if SPEED.exists():
        speed = json.loads(SPEED.read_text())
        text += (
            f"\nStock's {speed['chain']:,} steps give {statistics.mean(speed['stock']):.3f} images per second. "
            f"For each of them a tuned model gives, in bf16 and compiled ({len(speed['stock'])} turns):\n\n"
            "| steps | images for each of stock's | images per second |\n|---|---|---|\n"
        )
        for n, ratios in speed["ratios"].items():
            low, high = min(ratios), max(ratios)
            text += f"| {n} | {low:,.0f} to {high:,.0f} | {statistics.mean(speed['tuned'][n]):.0f} |\n"
    (FOLDER / "table.md").write_text(text)


if __name__ == "__main__":
    main()
