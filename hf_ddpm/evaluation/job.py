"""Before the first sample: what was asked of `evaluate`, checked, found and loaded.

request  the arguments of `evaluate`
job      what is ready to be measured
cell     a scheduler and its number of steps; all cells of a grid sample the same seeds

All that can be wrong is said here.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_ddpm.data.batches import center_pixels, epoch_order
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.evaluation.features import FeatureNetwork, check_network, load_network
from hf_ddpm.evaluation.likelihood import inclusion_probabilities
from hf_ddpm.evaluation.measure import DISTANCES, NEIGHBORS, Measured, first_images, measure_distances
from hf_ddpm.evaluation.memorization import MIN_SAMPLES
from hf_ddpm.evaluation.model_data import Splits
from hf_ddpm.evaluation.results import stored_results
from hf_ddpm.evaluation.statistics import Reference, check_comparable, frechet_warnings, load_reference, real_vs_real
from hf_ddpm.hub.download import find_model
from hf_ddpm.hub.readme import named_repository
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.sampling.sampler import DTYPES, forward_batch_of, load_for_sampling
from hf_ddpm.sampling.schedulers import SCHEDULERS, default_scheduler, default_steps, named_scheduler
from hf_ddpm.scheduler import DDPMScheduler, require_num_inference_steps

METRICS = (*DISTANCES, "nll", "memorization")
MEMORIZATION_QUANTILE = 0.01


class Cell(NamedTuple):
    scheduler: str
    num_inference_steps: int


@dataclass(frozen=True)
class Request:
    """The arguments of `evaluate`."""

    model: str | Path
    metrics: Sequence[str]
    reference: str | Path | None
    floor: str | Path | None
    data: DataConfig | None
    split: str
    test_split: str
    num_images: int
    seed: int
    num_inference_steps: Sequence[int]
    schedulers: Sequence[str]
    network: str | None
    network_path: str | Path | None
    timesteps_per_image: int
    batch_size: int
    device: str | None
    dtype: str
    compile: bool
    uniform: bool
    out: str | Path | None


@dataclass(frozen=True, eq=False)
class Job:
    """What is ready to be measured.

    Args:
        out, weights, repo_id: as of `write_evaluation`.
        pipeline: as the likelihood takes it: in float32, not compiled.
        chain: the scheduler of all T steps.
        distances: the metrics among the keys of DISTANCES.
        floors: what real images get; `floor_of` says which.
        class_labels: of the samples, and `classes` how they were chosen.
        held_out, training: images that were not trained on, and that were; None if they are not needed.
        data: the settings of these, whose `random_flip` says whether mirrored images were trained on, too.
    """

    request: Request
    processes: Processes
    out: Path
    weights: str
    repo_id: str | None
    pipeline: DDPMPipeline
    chain: DDPMScheduler
    cells: list[Cell]
    distances: list[str]
    network: FeatureNetwork | None
    reference: Reference | None
    floors: dict[str, Measured]
    floor_of: str
    class_labels: list[int] | None
    classes: str | None
    held_out: ImageCache | None
    training: ImageCache | None
    data: DataConfig


def check_request(request: Request) -> None:
    """What can be said before a file is read."""
    if not request.metrics or set(request.metrics) - set(METRICS):
        raise UsageError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(request.metrics) or 'none'}")
    if unknown := set(request.schedulers) - set(SCHEDULERS):
        raise UsageError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {sorted(unknown)[0]!r}")
    if request.dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {request.dtype!r}")
    for name, value, least in (
        ("num_images", request.num_images, 1),
        ("batch_size", request.batch_size, 1),
        ("seed", request.seed, 0),
    ):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    if request.floor is not None and request.reference is None:
        raise UsageError(f"floor goes with a reference, got {str(request.floor)!r} alone: give --reference, too")


def prepare(request: Request, processes: Processes, stack: ExitStack) -> Job:
    """Finds, loads and checks everything. Raises: UsageError for what cannot work."""
    folder, repo_id = find_model(request.model)
    if request.out is None and repo_id is not None:
        raise UsageError(f"out must be a folder for what is measured, got none for {repo_id!r} of the Hub: give --out")
    out = folder if request.out is None else Path(request.out).expanduser()
    weights = weights_sha256(folder)
    processes.require_equal(weights, "weights")
    if weights is None:
        raise UsageError(f"model must hold the weights of its network, got {str(request.model)!r} without")
    is_own = out.resolve() == folder.resolve()
    _check_out(out, weights, is_own)
    pipeline = _load(folder, request, processes)
    request = replace(request, batch_size=forward_batch_of(pipeline.device, request.batch_size))
    chain, unet = pipeline.scheduler, pipeline.unet.config
    cells = _grid(pipeline, request.schedulers, request.num_inference_steps)
    distances = [metric for metric in DISTANCES if metric in request.metrics]
    splits = Splits(processes, stack, request.data, folder, unet)

    reference = network = None
    floors, floor_of = {}, ""
    if distances or "memorization" in request.metrics:
        if request.reference is not None:
            reference = load_reference(request.reference)
        network = _load_network(request, reference, unet.in_channels, pipeline.device)
    if distances:
        assert network is not None
        if reference is not None:
            check_comparable(reference, network, splits.resolution, unet.in_channels)
            other = None if request.floor is None else load_reference(request.floor)
        else:
            reference, other = splits.references(network, request.split, request.test_split)
        _check_counts(distances, network, reference, request.num_images)
        floor_of = f"halves of {reference.metadata['data']['split']}"
        if other is not None:
            floor_of = f"{other.metadata['data']['split']} against {reference.metadata['data']['split']}"
        real, others = real_vs_real(reference, other)
        floors = processes.on_main(
            lambda: measure_distances(first_images(others, request.num_images), real, distances)
        )
    class_labels, classes = _choose_classes(unet, splits, request.split, request.num_images, request.seed)
    held_out = training = None
    if "nll" in request.metrics:
        inclusion_probabilities(chain, min(request.timesteps_per_image, len(chain)))
        held_out = splits.open(request.test_split, "test_split", is_labeled=classes is not None)
        if classes is not None and held_out.labels is None:
            raise UsageError("label_column must name the classes for the nll of a model of classes: --label_column")
        if len(held_out) < 2 or request.num_images < 2:
            raise UsageError(f"nll needs 2 images or more, got {min(len(held_out), request.num_images)}")
        _check_labels(held_out, splits, request)
    if "memorization" in request.metrics:
        training = splits.open(request.split)
        held_out = held_out or splits.open(request.test_split, "test_split")
        _check_memorization(training, held_out, request.num_images)
    return Job(
        request=request,
        processes=processes,
        out=out,
        weights=weights,
        repo_id=repo_id or (None if is_own else _name_on_cards(out, folder)),
        pipeline=pipeline,
        chain=chain,
        cells=cells,
        distances=distances,
        network=network,
        reference=reference,
        floors=floors,
        floor_of=floor_of,
        class_labels=class_labels,
        classes=classes,
        held_out=held_out,
        training=training,
        data=splits.data or DataConfig(),
    )


def _name_on_cards(*folders: Path) -> str:
    """What the card in one of the folders loads, or else the name of the last."""
    readmes = (folder / "README.md" for folder in folders)
    names = (named_repository(readme.read_text(encoding="utf-8")) for readme in readmes if readme.is_file())
    return next((name for name in names if name), folders[-1].resolve().name)


def _check_out(out: Path, weights: str, is_own: bool) -> None:
    there = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"out must be a folder to write to, got {str(out)!r}")
    others = weights_sha256(out)
    if others not in (None, weights):
        raise UsageError(f"out must not hold another model, got {str(out)!r} with the weights {others}")
    before = stored_results(out, weights)
    if not is_own and not before and (out / "evaluation.json").is_file():
        raise UsageError(f"out must not hold what was measured of other weights, got {str(out)!r}: name a new folder")


def _load(folder: Path, request: Request, processes: Processes) -> DDPMPipeline:
    """The model with the scheduler of all T steps."""
    device = request.device
    if device is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        device = "cpu"
    if device is None and torch.cuda.is_available() and processes.size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    pipeline, _ = load_for_sampling(str(folder), "ddpm", device=device, uniform=request.uniform)
    bad = [name for name, value in pipeline.unet.named_parameters() if not value.isfinite().all()]
    if bad:
        raise UsageError(f"weights must be finite, got NaN or infinity in {len(bad)} of them, first {bad[0]}")
    return pipeline


def _grid(pipeline: DDPMPipeline, schedulers: Sequence[str], num_inference_steps: Sequence[int]) -> list[Cell]:
    """All cells, each of which can be sampled."""
    config = pipeline.scheduler.config
    num_train, cells = config["num_train_timesteps"], []
    for chosen in schedulers or [None]:
        for number in num_inference_steps or [None]:
            name = chosen or default_scheduler(config, pipeline.searched_timesteps, number)
            steps = default_steps(name, num_train) if number is None else number
            require_num_inference_steps(steps, num_train)
            named_scheduler(name, config, steps).set_timesteps(steps)
            cells.append(Cell(name, steps))
    return list(dict.fromkeys(cells))


def _load_network(
    request: Request, reference: Reference | None, channels: int, device: torch.device
) -> FeatureNetwork:
    name = request.network or (reference.metadata["network"]["network"] if reference else "inception")
    if "cmmd" in request.metrics and name != "clip":
        raise UsageError(f"cmmd is of CLIP's embeddings, got the network {name!r}: --network clip")
    if channels not in (1, 3):
        raise UsageError(f"feature networks take 1 or 3 channels, got a model of {channels}: only nll can be measured")
    check_network(name, request.network_path)
    # MPS has no float64, and what it computes is not reproducible.
    return load_network(name, request.network_path, "cpu" if device.type == "mps" else device)


def _check_counts(metrics: list[str], network: FeatureNetwork, reference: Reference, num_images: int) -> None:
    for count, what in ((num_images, "num_images"), (reference.count, "the reference")):
        if "fd" in metrics and (warnings := frechet_warnings(count, network)):
            raise UsageError(f"{what} must be more for fd, got {count:,}: {warnings[0]}")
    least = max({"fd": 2, "kid": 4, "cmmd": 4, "precision": NEIGHBORS + 1}[metric] for metric in metrics)
    for count, what in ((num_images, "num_images"), (len(reference.features), "the reference's features")):
        if count < least:
            raise UsageError(f"{what} must be at least {least} for {', '.join(metrics)}, got {count}")


def _choose_classes(
    unet: Any, splits: Splits, split: str, num_images: int, seed: int
) -> tuple[list[int] | None, str | None]:
    """A class for each sample, if the model is conditioned on classes: those of the data, in a random order."""
    num_classes = unet.num_class_embeds
    if num_classes is None:
        if unet.class_embed_type is not None:
            raise UsageError(
                f"classes must be numbers for this, got a model with embeddings {unet.class_embed_type!r}"
            )
        return None, None
    if not splits.has_labels:
        if num_images < num_classes:
            raise UsageError(f"num_images must be at least {num_classes}, as many as classes, got {num_images}")
        return [(seed + i) % num_classes for i in range(num_images)], "each in turn"
    images = splits.open(split, is_labeled=True)
    assert images.labels is not None
    names = images.class_names or [str(i) for i in range(num_classes)]
    if images.num_classes != num_classes:
        raise UsageError(f"the data must have the model's {num_classes} classes, got {images.num_classes} in {split}")
    counts = np.bincount(images.labels, minlength=num_classes)
    if not counts.all():
        raise UsageError(f"each class must have images in {split}, got none of {names[int(counts.argmin())]!r}")
    order = epoch_order(0, 0, len(images))
    return images.labels[np.resize(order, num_images)].tolist(), f"as in {split}"


def _check_labels(held_out: ImageCache, splits: Splits, request: Request) -> None:
    """That classes of the test split are those of training."""
    if held_out.labels is None:
        return
    known = splits.open(request.split, is_labeled=True)
    if held_out.class_names != known.class_names or held_out.num_classes != known.num_classes:
        raise UsageError(
            f"the classes of {request.test_split} must be those of {request.split}, got {held_out.class_names} and "
            f"{known.class_names}"
        )


def _check_memorization(training: ImageCache, held_out: ImageCache, num_images: int) -> None:
    """What `memorization` would say only after sampling."""
    least = math.ceil(1 / MEMORIZATION_QUANTILE) - 1
    if num_images < MIN_SAMPLES:
        raise UsageError(f"num_images must be at least {MIN_SAMPLES} for memorization, got {num_images}")
    if len(held_out) < least:
        raise UsageError(f"memorization needs at least {least} held-out images, got {len(held_out)}")
    seen = {hashlib.sha256(image.tobytes()).digest() for image in center_pixels(training)}
    same = sum(hashlib.sha256(image.tobytes()).digest() in seen for image in center_pixels(held_out))
    if same >= math.floor(MEMORIZATION_QUANTILE * (len(held_out) + 1) + 1e-9):
        raise UsageError(
            f"held-out images must not be training images, got {same} of {len(held_out)} that are: remove them"
        )
