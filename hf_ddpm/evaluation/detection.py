"""`hf-ddpm anomaly`: the anomaly scores and maps of a set of images, in a folder.

scores.csv     file_name, label and score of each image, in the order of the data; label stands there if it is known
anomaly.json   the settings behind the scores, and how well the scores tell normal from anomalous images
maps           the maps of the images with the highest scores, on one scale from 0 to `map_scale`; of arrays also
               their values, (H, W) float32 in .npy files
grid.png       the first of these images beside their reconstructions and their maps
unit           that of maps and scores: x_0 squared, or of arrays that of the data squared
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_ddpm.data.batches import as_tensor, fixed_pixels, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import listed_once
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.splits import check_split, open_split
from hf_ddpm.evaluation.anomaly import anomaly_maps, auroc, scores_of, set_last_timesteps
from hf_ddpm.evaluation.inspected import Inspected, describe_inspected, fit_to_model, inspect
from hf_ddpm.evaluation.names import DEFAULT_NUM_RECONSTRUCTIONS, DEFAULT_STRENGTHS, check_strengths
from hf_ddpm.figures import png_bytes, strip, to_pil
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, require_writable_folder, weights_sha256, write_atomically
from hf_ddpm.runtime.processes import Processes, join_processes
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import forward_batch_of
from hf_ddpm.solvers import choose_sampler
from hf_ddpm.value_range import pictured

GRID_ROWS = 8
_NAME_LENGTH = 32
# Of maps and scores of arrays.
UNIT = "squared units of the data"


class Finding(NamedTuple):
    """An image with its map; they sort by falling score, and then by number.

    Args:
        order: The score times -1, and the number of the image.
        map: (H, W) float32.
        pictures: The image and its reconstructions as pictures show them, (1 + S, c, H, W') uint8.
    """

    order: tuple[float, int]
    map: np.ndarray
    pictures: np.ndarray


def find_anomalies(
    model: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    split: str = "train",
    normal: Sequence[str] = (),
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    num_reconstructions: int = DEFAULT_NUM_RECONSTRUCTIONS,
    num_maps: int = 64,
    seed: int = 0,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
) -> dict[str, Any]:
    """Score images by how far a model's reconstructions are from them, and write scores, maps and pictures.

    Each process that was launched scores its share. Image i has the seed `seed` + i, so its score does not depend on
    the batch size, on a CPU, or on the number of processes.

    Args:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
        data: The settings of the data. The resolution is the model's, and so is `value_range` unless it is given.
        out: A folder that is new or empty.
        split: The split of the data.
        normal: The normal classes, by name or number, whose images should have low scores. Empty: nobody knows.
        strengths: The shares of the steps of sampling by which images are noised and denoised, each in (0, 1].
        num_reconstructions: Reconstructions of each image by each strength, from different noise.
        num_maps: How many maps to write: those of the highest scores.
        seed: The seed of the first image.
        num_inference_steps: The number of steps of strength 1, in [1, T]. None: as for `sample`.
        scheduler: `ddpm`, `ddim`, `dpmsolver++` or `unipc`. None: as for `sample`.
        batch_size: Images per forward pass; on a CPU there are always 16.
        device: A device of torch. None: the best one of this process.
        dtype: The type that the network computes in, `fp32` or `bf16`. None: fp32.
        compile: Whether `torch.compile` compiles the network, at its first forward pass.

    Returns:
        The content of anomaly.json.

    Raises:
        ValueError: Before the first image is scored, when a setting cannot work, the data do not fit the model, or
            `out` holds something else.
        OSError: When the model cannot be read, or `out` cannot be written.
    """
    check_strengths(strengths)
    _check_counts(num_reconstructions, num_maps)
    out = _new_folder(out)
    _check_data(data, split, normal, out)
    with join_processes() as processes, ExitStack() as stack:
        stack.enter_context(listed_once())
        # Searched timesteps are for sampling from pure noise.
        pipeline, steps = load_for_sampling(str(model), scheduler, num_inference_steps, device, dtype, compile, True)
        pipeline._check_inputs(1, None, "pt", ("latents",), False)
        folder = Path(pipeline.unet.config["_name_or_path"])
        data = fit_to_model(data, pipeline, folder)
        images = processes.main_then_rest(lambda: stack.enter_context(open_split(data, split)))
        inspected = inspect(images, data, split, normal, pipeline, folder)
        check_seeds(seed, len(images))
        images = inspected.images
        if processes.rank == 0:
            tqdm.write("\n".join(describe_inspected(data, split, images)), file=sys.stderr)
        settings = {
            "model": str(model),
            "weights_sha256": weights_sha256(folder),
            "data": _facts_of_data(data, split, images, normal),
            "scheduler": choose_sampler(pipeline.scheduler.config, scheduler, steps, pipeline.kept_sampler).scheduler,
            "num_inference_steps": steps,
            "strengths": [*strengths],
            "timesteps": [int(set_last_timesteps(pipeline, s, steps)[0]) for s in strengths],
            "num_reconstructions": num_reconstructions,
            "seed": seed,
            "dtype": dtype or "fp32",
            "compile": compile,
            "device": pipeline.device.type,
            "forward_batch": forward_batch_of(pipeline.device, batch_size),
        }
        processes.require_equal(settings, "model, data and settings")
        scores, findings = score_images(processes, pipeline, inspected, settings, max(num_maps, GRID_ROWS))
        unit = {} if images.value_range is None else {"unit": UNIT}
        result = {**settings, **_measure(scores, inspected), "map_scale": scale_of(findings), **unit}
        processes.on_main(lambda: _write(out, result, scores, inspected, findings, num_maps))
    return result


def score_images(
    processes: Processes, pipeline: DDPMPipeline, inspected: Inspected, settings: dict[str, Any], num_findings: int
) -> tuple[np.ndarray, list[Finding]]:
    """Score all images; the processes share their batches.

    Args:
        settings: What decides the scores, as in anomaly.json.
        num_findings: The number of images whose maps are kept.

    Returns:
        The scores, (N,) float64, and the images with the highest scores, the highest first.
    """
    size, count = settings["forward_batch"], len(inspected.images)

    def score_share() -> tuple[np.ndarray, list[Finding]]:
        scores, findings = [np.empty(0)], []
        share, is_quiet = processes.split(-(-count // size)), processes.rank > 0
        total = sum(min(size, count - k * size) for k in share)
        with tqdm(total=total, unit="image", desc=processes.label("Scoring"), disable=is_quiet) as progress:
            for k in share:
                numbers = range(k * size, min((k + 1) * size, count))
                batch_scores, batch = _score_batch(pipeline, inspected, settings, numbers)
                scores.append(batch_scores)
                findings = sorted([*findings, *batch], key=lambda finding: finding.order)[:num_findings]
                progress.update(len(numbers))
        return np.concatenate(scores), findings

    shares = processes.gather(score_share)
    findings = sorted((each for _, share in shares for each in share), key=lambda finding: finding.order)
    return np.concatenate([scores for scores, _ in shares]), findings[:num_findings]


def _score_batch(
    pipeline: DDPMPipeline, inspected: Inspected, settings: dict[str, Any], numbers: Sequence[int]
) -> tuple[np.ndarray, list[Finding]]:
    """Return the scores of the images with these numbers, and all of them as findings."""
    # Each forward pass has as many images as any other; see hf_ddpm.sampling.sampler.
    filled = np.resize(np.array(numbers), settings["forward_batch"])
    values, pixels = inspected.images.value_range, as_tensor(fixed_pixels(inspected.images, filled))
    # An anomaly may lie beyond the values that the model learned, and counts with all of its error.
    x_0 = to_x_0(pixels, inspected.images.max_value) if values is None else values.scaled(pixels)
    maps, reconstructions = anomaly_maps(
        pipeline,
        x_0,
        [settings["seed"] + int(i) for i in filled],
        strengths=settings["strengths"],
        num_inference_steps=settings["num_inference_steps"],
        num_reconstructions=settings["num_reconstructions"],
        class_labels=None if inspected.class_labels is None else [inspected.class_labels[i] for i in filled],
    )
    if values is not None:
        maps = maps * ((values.high - values.low) / 2) ** 2
    scores = scores_of(maps).numpy()[: len(numbers)]
    shares = torch.cat([x_0.unsqueeze(1), reconstructions], dim=1) / 2 + 0.5
    pictures = pictured(shares.flatten(0, 1).clamp(0, 1).mul(255).round().to(torch.uint8), values)
    pictures = pictures.unflatten(0, shares.shape[:2])
    findings = [
        Finding((-float(score), number), map_.numpy().copy(), shown.numpy().copy())
        for score, number, map_, shown in zip(scores, numbers, maps, pictures, strict=False)
    ]
    return scores, findings


def _facts_of_data(data: DataConfig, split: str, images: ImageCache, normal: Sequence[str]) -> dict[str, Any]:
    """Return what anomaly.json says of the data."""
    values = images.value_range
    return {
        "name": images.name,
        "split": split,
        "fingerprint": images.fingerprint,
        "num_images": len(images),
        "label_column": data.label_column,
        "normal": [*normal] or None,
        **({} if values is None else {"values": str(values), "num_clipped": images.num_clipped}),
    }


def _check_counts(num_reconstructions: int, num_maps: int) -> None:
    for name, value, least in (("num_reconstructions", num_reconstructions, 1), ("num_maps", num_maps, 0)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")


def _new_folder(out: str | Path) -> Path:
    """Return `out` as a path, after checking that it is a folder that is new or empty."""
    folder = look_at("out", out)
    require_writable_folder("out", folder)
    if folder.is_dir() and (inside := sorted(os.listdir(folder))):
        raise UsageError(f"out must be a new or an empty folder, got {str(out)!r}, which holds {inside[0]!r}")
    return folder


def _check_data(data: DataConfig, split: str, normal: Sequence[str], out: Path) -> None:
    """Check what can be said of the data before the model is loaded."""
    if normal and data.label_column is None:
        raise UsageError(
            f"normal needs the classes of the images, got {', '.join(normal)} without label_column: give "
            "--label_column label for the folders that images are in, or the name of a column"
        )
    source = find_source(data)
    if source.folder is not None and out.resolve().is_relative_to(source.folder.resolve()):
        raise UsageError(
            f"out must not be in the folder of images, whose images its pictures would be, got {str(out)!r}: give "
            "another --out"
        )
    check_split(data, split)


def _measure(scores: np.ndarray, inspected: Inspected) -> dict[str, Any]:
    """Return the AUROC of all anomalous images, and of each class of them, against the normal ones."""
    is_anomalous = inspected.is_anomalous
    if is_anomalous is None or inspected.labels is None:
        return {"auroc": None, "auroc_by_class": None}
    labels = np.array(inspected.labels)

    def measured(which: np.ndarray) -> dict[str, Any]:
        selected = which | ~is_anomalous
        area = auroc(scores[selected], is_anomalous[selected])
        return {**area._asdict(), "num_anomalous": int(which.sum()), "num_normal": int((~is_anomalous).sum())}

    by_class = {str(name): measured(labels == name) for name in np.unique(labels[is_anomalous])}
    return {"auroc": measured(is_anomalous), "auroc_by_class": by_class}


def _write(
    out: Path,
    result: dict[str, Any],
    scores: np.ndarray,
    inspected: Inspected,
    findings: list[Finding],
    num_maps: int,
) -> None:
    """Write all files, each whole or absent, and anomaly.json as the last one."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns: list[Sequence[Any]] = [inspected.names, scores.tolist()]
    header = ["file_name", "score"]
    if inspected.labels is not None:
        columns.insert(1, inspected.labels)
        header.insert(1, "label")
    writer.writerows([header, *zip(*columns, strict=True)])
    write_atomically(out / "scores.csv", table.getvalue())
    for finding in findings[:num_maps]:
        name = inspected.names[finding.order[1]]
        (picture,) = map_pictures([finding.map], result["map_scale"])
        write_atomically(out / "maps" / _with_suffix(name, ".png"), png_bytes(picture))
        if inspected.images.value_range is not None:
            content = io.BytesIO()
            np.save(content, finding.map)
            write_atomically(out / "maps" / _with_suffix(name, ".npy"), content.getvalue())
    write_atomically(out / "grid.png", png_bytes(draw_findings(findings[:GRID_ROWS], inspected, result)))
    write_atomically(out / "anomaly.json", json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _with_suffix(name: str, suffix: str) -> str:
    return name if name.endswith(suffix) else f"{name}{suffix}"


def scale_of(findings: Sequence[Finding]) -> float:
    """Return the value that the brightest color of all maps stands for, above which are 0.5 % of their pixels."""
    return float(np.quantile(np.stack([finding.map for finding in findings]), 0.995))


def map_pictures(maps: Sequence[np.ndarray], scale: float) -> list[Image.Image]:
    """Return maps as RGB pictures, from black for 0 to light yellow for `scale` and more."""
    from matplotlib import colormaps

    colors = colormaps["inferno"](np.stack(maps) / (scale or 1), bytes=True)[..., :3]
    return [Image.fromarray(np.ascontiguousarray(each)) for each in colors]


def draw_findings(findings: Sequence[Finding], inspected: Inspected, result: dict[str, Any]) -> Image.Image:
    """Return a picture with a row for each finding: image, mean reconstruction by each strength, and map.

    The rows are called by file name, label and score.
    """
    rows, names = [], []
    is_of_arrays = inspected.images.value_range is not None
    for finding in findings:
        shown = [picture.convert("RGB") for picture in to_pil(finding.pictures)]
        (of_map,) = map_pictures([finding.map], result["map_scale"])
        canvas = Image.new("RGB", shown[0].size, "white")  # as wide as channels that stand side by side
        canvas.paste(of_map)
        rows.append([*shown, canvas])
        score, number = finding.order
        name = inspected.names[number]
        name = name if len(name) <= _NAME_LENGTH else f"...{name[3 - _NAME_LENGTH :]}"
        label = "" if inspected.labels is None else f"{inspected.labels[number]:.{_NAME_LENGTH}}  "
        names.append(f"{name}  {label}{-score:{'.3g' if is_of_arrays else '.3f'}}")
    columns = ["image", *(f"strength {strength:g}" for strength in result["strengths"])]
    scale = result["map_scale"]
    of_maps = f"map, 0 to {scale:.3g} {UNIT}" if is_of_arrays else f"map, 0 to {scale:.2g}"
    return strip(rows, [*columns, of_maps], names)
