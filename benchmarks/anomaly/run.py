"""Find the class that a model was not trained on by `hf-ddpm anomaly`, and say which settings and scores find it best.

    python -m benchmarks.anomaly.run digits --held_out 7 --machine NAME
    python -m benchmarks.anomaly.run zalando-datasets/fashion_mnist --recipe fashion-mnist --held_out Sandal \
        --max_train_steps 3459 --num_images 2000 --machine NAME

A model learns all classes of DATA but one. Scored are images that it was not trained on: those of the split `test` if
DATA has one, else every fifth image and all of the held-out class. Each row of the table is a strength and a number of
reconstructions; AUROC is that of the held-out class against the others, by four scores of a map: its mean, which the
command takes, the mean of its root, its largest value, and the mean of its largest tenth. The first row has no model:
it is the distance in pixels to the nearest training image. Appends rows to `rows.jsonl`, writes `table.md`, and
`grid.png`, the highest scores of the first row of the default settings. Other options are those of `hf-ddpm train`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.batches import fixed_pixels, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.splits import open_split
from hf_ddpm.data.tables import open_dataset
from hf_ddpm.evaluation.anomaly import anomaly_maps, auroc, scores_of
from hf_ddpm.evaluation.detection import find_anomalies
from hf_ddpm.evaluation.memorization import nearest
from hf_ddpm.runtime.errors import MissingSplitError
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.loading import load_for_sampling

FOLDER = Path(__file__).parent
SETTINGS: list[tuple[tuple[float, ...], int]] = [
    *(((strength,), 4) for strength in (0.2, 0.3, 0.5, 0.6)),
    ((0.4,), 1),
    ((0.4,), 4),
    ((0.4,), 8),
    ((0.3, 0.5), 4),
]
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": scores_of,
    "mean of root": lambda maps: maps.sqrt().flatten(1).mean(dim=1),
    "largest": lambda maps: maps.flatten(1).amax(dim=1),
    "largest tenth": lambda maps: maps.flatten(1).topk(-(-maps[0].numel() // 10)).values.mean(dim=1),
}
BATCH = 128


def main() -> None:
    """Train, score, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="A Hub id, a folder, or digits.")
    parser.add_argument("--held_out", required=True, help="The name of the class that is not trained on.")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--max_train_steps", type=int, help="Default: the recipe's.")
    parser.add_argument("--num_images", type=int, help="How many images to score. Default: all.")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    options, of_training = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        saved, model, out = (str(Path(folder) / name) for name in ("data", "model", "out"))
        save_without_class(options, saved)
        command = [sys.executable, "-m", "hf_ddpm", "train", "--recipe", options.recipe, "--dataset_name", saved]
        command += ["--output_dir", model, "--cache_dir", folder, "--no_save_figures"]
        if options.max_train_steps is not None:
            command += ["--max_train_steps", str(options.max_train_steps)]
        subprocess.run(command + of_training, check=True, stdout=subprocess.DEVNULL)
        config = DataConfig(dataset_name=saved, label_column=options.label_column, cache_dir=folder)
        about = {
            "data": Path(options.data).name,
            "held_out": options.held_out,
            "trained_steps": read_run(Path(model))["training"]["steps"],
            "num_inference_steps": options.num_inference_steps,
            "machine": options.machine,
            "date": time.strftime("%Y-%m-%d"),
        }
        with open_split(config, "train") as training, open_split(config, "test") as scored:
            measure(model, x_0_of(training), scored, options.held_out, about)
            is_picture_missing = not (FOLDER / "grid.png").exists()
            normal = [name for name in scored.class_names or () if name != options.held_out]
        if is_picture_missing:
            steps = options.num_inference_steps
            find_anomalies(model, config, out, split="test", normal=normal, num_maps=0, num_inference_steps=steps)
            (FOLDER / "grid.png").write_bytes((Path(out) / "grid.png").read_bytes())


def save_without_class(options: argparse.Namespace, path: str) -> None:
    """Save the split `train` without the held-out class, and the images to score as `test`, in a random order."""
    config = DataConfig(dataset_name=options.data, label_column=options.label_column)
    train = open_dataset(config, "train")
    label = train.column_names[1]
    names = getattr(train.features[label], "names", None) or sorted(map(str, set(train[:][label])))
    if options.held_out not in names:
        raise SystemExit(f"--held_out must be one of {', '.join(names)}, got {options.held_out!r}")
    is_held_out = np.array(train[:][label]) == names.index(options.held_out)
    try:
        test = open_dataset(config, "test")
    except MissingSplitError:
        is_kept = np.arange(len(train)) % 5 == 0
        test = train.select(np.flatnonzero(is_kept | is_held_out))
        is_held_out |= is_kept
    order = np.random.default_rng(0).permutation(len(test))[: options.num_images]
    parts: Any = {"train": train.select(np.flatnonzero(~is_held_out)), "test": test.select(order)}
    datasets.DatasetDict(parts).save_to_disk(path)


def x_0_of(images: ImageCache) -> Tensor:
    """Return all images, (N, C, H, W) in [-1, 1]."""
    return to_x_0(torch.from_numpy(np.array(fixed_pixels(images))), images.max_value)


def measure(model: str, training: Tensor, scored: ImageCache, held_out: str, about: dict[str, Any]) -> None:
    """Score the images by each setting; append each row and write the table as soon as it is measured."""
    x_0 = x_0_of(scored)
    names = scored.class_names or [str(number) for number in range(scored.num_classes or 0)]
    is_anomalous = np.array(names)[scored.labels] == held_out
    counts = {"num_anomalous": int(is_anomalous.sum()), "num_normal": int((~is_anomalous).sum())}
    distances = nearest(x_0, training)[0].numpy()
    append({**about, **counts, "strengths": None, "auroc": {"mean": auroc(distances, is_anomalous)}})
    steps = about["num_inference_steps"]
    pipeline, _ = load_for_sampling(model, num_inference_steps=steps, uniform=True)
    for strengths, num_reconstructions in SETTINGS:
        batches = [
            anomaly_maps(
                pipeline,
                x_0[first : first + BATCH],
                range(first, min(first + BATCH, len(x_0))),
                strengths=strengths,
                num_inference_steps=steps,
                num_reconstructions=num_reconstructions,
            ).maps
            for first in range(0, len(x_0), BATCH)
        ]
        maps = torch.cat(batches)
        areas = {name: auroc(score(maps).numpy(), is_anomalous) for name, score in SCORES.items()}
        row = {"strengths": strengths, "num_reconstructions": num_reconstructions, "auroc": areas}
        append({**about, **counts, **row})


def append(row: dict[str, Any]) -> None:
    """Append a row to rows.jsonl and write table.md."""
    with (FOLDER / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    write_table([json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()])


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write table.md: a line for each row, in the order in which they were measured."""
    text = (
        f"{rows[-1]['date']}, {rows[-1]['machine']}, torch {version('torch')}, diffusers {version('diffusers')}. "
        "AUROC of a class that the model was not trained on, against held-out images of the others; higher is better, "
        "and 0.5 is chance. The columns are scores of the same maps; the command takes the mean, whose standard error "
        "is that of DeLong et al. 1988. In the rows of the nearest training image there is no model.\n\n"
        "| data | held out | trained steps | images | strength | reconstructions | steps of strength 1 "
        f"| {' | '.join(SCORES)} |\n|{'---|' * (7 + len(SCORES))}\n"
    )
    for row in rows:
        how = ("nearest training image", "", "")
        if row["strengths"]:
            strengths = ", ".join(f"{strength:g}" for strength in row["strengths"])
            how = (strengths, row["num_reconstructions"], row["num_inference_steps"])
        cells = [row["data"], row["held_out"], f"{row['trained_steps']:,}"]
        cells += [f"{row['num_anomalous']:,} of {row['num_anomalous'] + row['num_normal']:,}", *map(str, how)]
        for name in SCORES:
            value, error = row["auroc"].get(name, (None, None))
            shown = f"{value:.3f} ± {error:.3f}" if name == "mean" else "" if value is None else f"{value:.3f}"
            cells.append(shown)
        text += f"| {' | '.join(cells)} |\n"
    (FOLDER / "table.md").write_text(text)


if __name__ == "__main__":
    main()
