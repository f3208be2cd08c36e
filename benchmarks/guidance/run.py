"""Ask whether a model of classes draws the class that it is asked for, and what guidance gives and costs.

    hf-ddpm train --label_column label --output_dir runs/digits
    python -m benchmarks.guidance.run runs/digits --machine NAME
    python -m benchmarks.guidance.run runs/digits --guidance_model runs/digits/guide --machine NAME
    python -m benchmarks.guidance.run runs/digits --autoguidance_scale 1.5 --machine NAME

A small convolutional classifier learns the classes from real images; its accuracy on images that it has not seen is
stated. It names the class of samples, which ask for each class in turn. `hf-ddpm evaluate` measures their distance to
the training images at each scale. Appends each row to `rows.jsonl` as soon as it is measured, unless it is there, and
writes `table.md` and, of a model of classes, `samples.png`: a row for each class, at scale 1 to the left, with the
guidance of least FD to the right. A model without classes has distances alone, and is guided by `--guidance_model`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ddpm.data.batches import fixed_pixels
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig, load_data_config
from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.figures import png_bytes, strip, to_pil
from hf_ddpm.guidance import Guidance
from hf_ddpm.names import GUIDANCE_METHODS
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import iter_samples, labels_in_turn

FOLDER = Path(__file__).parent
ROWS = FOLDER / "rows.jsonl"
NUM_CLASSIFIED, BATCH, EPOCHS, HELD_OUT = 1000, 128, 8, 0.2
COLUMNS = 6


def main() -> None:
    """Measure each setting, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0, 3.0])
    parser.add_argument("--interval", type=float, nargs=2, help="low and high; default: everywhere")
    parser.add_argument("--method", default="cfg", choices=GUIDANCE_METHODS, help="of guidance")
    parser.add_argument("--guidance_model", help="a weaker version of the model; default: the model without a class")
    parser.add_argument("--autoguidance_scale", type=float, help="of its early average, beside that without a class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first seed of each repetition")
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="what the network samples in")
    parser.add_argument("--compile", action="store_true", help="compile the network for what is measured")
    parser.add_argument("--classifier", type=Path, help="the file that keeps the weights of the classifier")
    parser.add_argument("--machine", required=True, help="what the processor is called in the table")
    options = parser.parse_args()
    data = load_data_config(options.run / "config.yaml")
    has_classes = bool(read_run(options.run)["data"]["class_names"])
    classifier, accuracy = learn_classifier(data, options.classifier) if has_classes else (None, None)
    weaker = options.guidance_model and weights_sha256(Path(options.guidance_model))
    for seed in options.seeds:
        for scale in options.scales:
            by = None if scale == 1 else weaker
            guidance = None if scale == 1 else guidance_of(options, scale)
            cell = [weights_sha256(options.run), by, None if guidance is None else settings_of(guidance), seed]
            cell += [options.num_images, options.num_inference_steps]
            if any(row["cell"] == cell for row in read_rows()):
                continue
            row = {
                "cell": cell,
                "data": read_run(options.run)["data"]["name"],
                "trained_steps": read_run(options.run)["training"]["steps"],
                "machine": options.machine,
                "date": time.strftime("%Y-%m-%d"),
                "classifier": accuracy,
                "dtype": options.dtype,
                "named": classifier and share_named(options, classifier, guidance, seed),
                **distances(options, data, guidance, seed),
            }
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            write_table(read_rows())
    if has_classes:
        rows = [row for row in read_rows() if row["cell"][:2] == [weights_sha256(options.run), weaker]]
        settings = min(rows, key=lambda row: row["fd"])["cell"][2]
        interval = None if settings is None else settings.pop("interval", None)
        draw(options, None if settings is None else Guidance(interval=interval and tuple(interval), **settings))
    if (options.run / "figures/guidance.png").is_file():
        shutil.copyfile(options.run / "figures/guidance.png", FOLDER / "guidance.png")


def guidance_of(options: argparse.Namespace, scale: float) -> Guidance:
    interval = None if options.interval is None else tuple(options.interval)
    return Guidance(scale, interval, method=options.method, autoguidance_scale=options.autoguidance_scale or 1.0)


def settings_of(guidance: Guidance) -> dict[str, Any]:
    """Return what is not the default, as JSON has it."""
    settings = {name: value for name, value in asdict(guidance).items() if value != getattr(Guidance(), name)}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in settings.items()}


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


class Classifier(nn.Module):
    """Four convolutions and two layers, for gray or color images of at least 8x8 pixels in [0, 1]."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        )
        width = 64 * (size // 4) ** 2
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.convolutions(images))


def learn_classifier(data: DataConfig, file: Path | None = None) -> tuple[Classifier, float]:
    """Return a classifier of the training images, and its accuracy on the test split, or on a fifth, held out.

    Its weights are read from `file`, or written to it where that is absent.
    """
    torch.manual_seed(0)
    images = load_images(data)
    x, y = tensors_of(images)
    try:
        test = tensors_of(load_images(replace(data, train_split="test")))
    except ValueError:  # there is no such split
        order = torch.randperm(len(x))
        held_out, rest = order[: int(HELD_OUT * len(x))], order[int(HELD_OUT * len(x)) :]
        test, (x, y) = (x[held_out], y[held_out]), (x[rest], y[rest])
    classifier = Classifier(images.channels, images.size[0], images.num_classes or 0)
    if file is not None and file.is_file():
        content = torch.load(file)
        if content["fingerprint"] != images.fingerprint:
            raise SystemExit(f"{file} was learned from other images: name another file")
        classifier.load_state_dict(content["weights"])
    else:
        learn(classifier, x, y)
        if file is not None:
            torch.save({"fingerprint": images.fingerprint, "weights": classifier.state_dict()}, file)
    classifier.eval()
    return classifier, float((named(classifier, test[0]) == test[1]).float().mean())


def learn(classifier: Classifier, x: Tensor, y: Tensor) -> None:
    """Train the classifier on images, (N, C, R, R) in [0, 1], and their classes, (N,)."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    epochs = max(EPOCHS, math.ceil(2000 * BATCH / len(x)))  # small data are seen more often
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, epochs * math.ceil(len(x) / BATCH))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                logits = classifier(shifted(x[batch]))
            nn.functional.cross_entropy(logits.float(), y[batch], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def shifted(images: Tensor) -> Tensor:
    """Return the images, moved together by up to a fourteenth of their size, (N, C, R, R); the border is repeated."""
    most = images.shape[-1] // 14
    down, right = torch.randint(2 * most + 1, (2,)).tolist()
    padded = nn.functional.pad(images, [most] * 4, mode="replicate")
    return padded[..., down : down + images.shape[-2], right : right + images.shape[-1]]


def tensors_of(images: ImageCache) -> tuple[Tensor, Tensor]:
    """Return all images, (N, C, R, R) in [0, 1], and their classes, (N,)."""
    assert images.labels is not None
    pixels = torch.from_numpy(np.array(fixed_pixels(images), dtype=np.float32))
    return pixels / images.max_value, torch.from_numpy(images.labels)


@torch.no_grad()
def named(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the class that the classifier names for each image, (N,)."""
    return torch.cat([classifier(batch).argmax(dim=1) for batch in images.split(500)])


def sample(
    options: argparse.Namespace, seeds: Sequence[int], guidance: Guidance | None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Return samples, (N, C, R, R) in [0, 1], and the classes that they were asked for, (N,)."""
    weaker = None if guidance is None else options.guidance_model
    pipeline, _ = load_for_sampling(str(options.run), guidance_model=weaker, **settings)
    labels = labels_in_turn(pipeline.classes, seeds) or []
    batches = iter_samples(
        pipeline,
        seeds,
        batch_size=64,
        num_inference_steps=options.num_inference_steps,
        class_labels=labels,
        guidance=guidance,
    )
    images = torch.cat([images for _, images in batches])
    return images.float() / 255, torch.tensor(labels)


def share_named(options: argparse.Namespace, classifier: Classifier, guidance: Guidance | None, seed: int) -> float:
    """Return the share of samples whose class the classifier names as it was asked for."""
    seeds = range(seed, seed + NUM_CLASSIFIED)
    images, labels = sample(options, seeds, guidance, dtype=options.dtype, compile=options.compile)
    return float((named(classifier, images) == labels).float().mean())


def distances(options: argparse.Namespace, data: DataConfig, guidance: Guidance | None, seed: int) -> dict[str, float]:
    """Return the distances of samples to the training images, as `hf-ddpm evaluate` measures them."""
    result = evaluate(
        options.run,
        data=data,
        network="efficientnet-lite0",
        num_images=options.num_images,
        seed=seed,
        num_inference_steps=[options.num_inference_steps],
        dtype=options.dtype,
        compile=options.compile,
        guidance_scales=[1.0 if guidance is None else guidance.scale],
        guidance_interval=None if guidance is None else guidance.interval,
        guidance_method=None if guidance is None else guidance.method,
        autoguidance_scale=None if guidance is None else guidance.autoguidance_scale,
        guidance_model=None if guidance is None else options.guidance_model,
    )
    return {row["metric"]: row["value"] for row in result["results"]}


def draw(options: argparse.Namespace, guidance: Guidance | None) -> None:
    """Draw the same seeds without guidance and with it, a row for each class."""
    names = read_run(options.run)["data"]["class_names"]
    seeds = range(COLUMNS * len(names))
    plain, labels = sample(options, seeds, None)
    guided, _ = sample(options, seeds, guidance)
    by_class = [labels == number for number in range(len(names))]
    rows = [[*to_pil(plain[each]), *to_pil(guided[each])] for each in by_class]
    titles = ["no guidance", *[""] * (COLUMNS - 1), "guided", *[""] * (COLUMNS - 1)]
    (FOLDER / "samples.png").write_bytes(png_bytes(strip(rows, titles, names)))


def order_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows are sorted by: data, model, seed, scale and steps."""
    weights, _, settings, seed, _, steps = row["cell"]
    return row["data"], weights, seed, (settings or {}).get("scale", 1), steps


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write table.md, by model, seed and scale."""
    last = rows[-1]
    text = (
        f"{last['date']}, {last['machine']}, torch {version('torch')}, diffusers {version('diffusers')}; UniPC. "
        f"*Named* is the share of {NUM_CLASSIFIED:,} samples whose class a classifier names as it was asked "
        "for; higher is better. Beside it stands the share of real images that it names rightly, which it has not "
        "seen. FD and KD are the Fréchet and the kernel distance to the training images by features of "
        "efficientnet-lite0; lower is better. Higher precision and recall are better. Scale 1 is no guidance; else "
        "the model is guided by itself without a class, or by its average after an eighth of the training "
        "(autoguidance). Where *autoguidance* has a scale, it is guided by both.\n\n"
        "| data | steps of training | type | guided by | method | scale | sigma | autoguidance | steps | first seed "
        "| images | named | real images | FD | KD | precision | recall |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in sorted(rows, key=order_of):
        _, weaker, settings, seed, count, steps = row["cell"]
        guided = settings or {}
        by = "" if settings is None else "no class" if weaker is None else "its average"
        method = "" if settings is None else guided.get("method", "cfg")
        interval = guided.get("interval")
        sigma = "" if settings is None else "all" if interval is None else f"{interval[0]:g} to {interval[1]:g}"
        shares = [share and f"{share:.1%}" for share in (row["named"], row["classifier"])]
        text += (
            f"| {row['data']} | {row['trained_steps']:,} | {row.get('dtype', 'fp32')} | {by} | {method} "
            f"| {guided.get('scale', 1):g} | {sigma} | {guided.get('autoguidance_scale', '')} "
            f"| {steps} | {seed:,} | {count:,} | {shares[0] or ''} | {shares[1] or ''} | {row['fd']:.1f} "
            f"| {row['kid']:.4f} | {row['precision']:.3f} | {row['recall']:.3f} |\n"
        )
    (FOLDER / "table.md").write_text(text)


if __name__ == "__main__":
    main()
