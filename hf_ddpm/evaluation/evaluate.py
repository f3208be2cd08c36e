"""`hf-ddpm evaluate`: measures a model, our own or any of diffusers' DDPMPipelines, and writes down what it found.

result            a value, its standard error, the floor, and all that decides them
floor             what real images get in the samples' place: those of another split, or one half against the other
evaluation.json   {format, weights_sha256, results}: results of one network's weights only
cell              a scheduler and its number of steps; all cells of a grid sample the same seeds

A result replaces the one that was measured in the same way; `_key` says what that means. Each is written as soon as it
is there: a later error takes nothing back. All that can be wrong is said before the first sample.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import diffusers
import huggingface_hub
import numpy as np
import torch

from hf_ddpm import __version__, hub
from hf_ddpm.config import TrainingConfig, UsageError, load_config
from hf_ddpm.data import ImageCache, epoch_order, load_images
from hf_ddpm.evaluation.features import FeatureNetwork, check_network, load_network
from hf_ddpm.evaluation.likelihood import draw_bound, inclusion_probabilities
from hf_ddpm.evaluation.measure import (
    DISTANCES,
    Measured,
    Samples,
    center_pixels,
    first_images,
    measure_distances,
    measure_likelihood,
    pixel_features,
    sample_statistics,
)
from hf_ddpm.evaluation.memorization import MIN_SAMPLES, Memorization, draw_pairs, memorization
from hf_ddpm.evaluation.references import FORMAT as REFERENCE_FORMAT
from hf_ddpm.evaluation.references import (
    Reference,
    Statistics,
    check_comparable,
    load_reference,
    make_reference,
    open_split,
    real_floor,
    warnings_of,
)
from hf_ddpm.figures import curve
from hf_ddpm.files import weights_sha256, write_atomically
from hf_ddpm.launch import run_command
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.processes import Processes, joined_processes
from hf_ddpm.sampling import SCHEDULERS, default_scheduler, load_for_sampling, named_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.sources import find_source

FORMAT = 1
METRICS = (*DISTANCES, "nll", "memorization")
PICTURES = ("steps.png", "seconds.png", "bound.png", "memorization.png")
NUM_MEMORIZATION_SAMPLES = 1000
MEMORIZATION_QUANTILE = 0.01
NEIGHBORS = 5  # k of precision, recall, density and coverage


class Cell(NamedTuple):
    scheduler: str
    num_inference_steps: int


def evaluate(
    model: str | Path,
    *,
    metrics: Sequence[str] = ("fd", "kid", "precision"),
    reference: str | Path | None = None,
    floor: str | Path | None = None,
    data: TrainingConfig | None = None,
    split: str = "train",
    test_split: str = "test",
    num_images: int = 5000,
    seed: int = 0,
    num_inference_steps: Sequence[int] = (),
    schedulers: Sequence[str] = (),
    network: str | None = None,
    network_path: str | Path | None = None,
    timesteps_per_image: int = 20,
    batch_size: int = 64,
    device: str | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measures a model and writes evaluation.json, pictures and the card.

    Several processes, of `accelerate launch`, torchrun or a running process group, share the work and write the same
    numbers; the first of them writes.

    Args:
        model: a folder that holds a pipeline, stock diffusers' or ours, or a Hub id.
        metrics: of fd (Fréchet distance), kid, precision (with recall, density and coverage), cmmd, nll (bits per
            dimension), memorization.
        reference: a folder of `hf-ddpm reference`. Default: made of `data`, and kept in its cache.
        floor: a second one, of other images; default: halves of `reference`. Only with `reference`.
        data: the settings of the data; default: those of the run in the model's folder. Needed for nll and
            memorization, and without a reference.
        split, test_split: the reference's and training's, and that of images which were not trained on.
        num_images: sampled, from the seeds `seed`, `seed` + 1, ...; nll takes at most as many of the test split.
        num_inference_steps, schedulers: the grid; default: 20 of dpmsolver++, or all T of ddpm, which is also what a
            step denoiser is sampled by.
        network, network_path: of features, as of `load_network`; default: the reference's, or inception.
        timesteps_per_image: K of nll.
        batch_size: images per network evaluation; changes rounding only.
        device: default: cuda or mps if there is one, else cpu.
        out: where to write; default: the model's folder. A Hub id needs one.

    Returns: {"out", "weights_sha256", "results": those measured now, "card": its path, or None if it was left alone}.

    Raises:
        UsageError: before anything is sampled, what cannot work; later, samples that are not finite.
    """
    request = _Request(**locals())
    _check(request)
    measured: list[dict[str, Any]] = []
    card: Path | None = None
    with ExitStack() as stack:
        job = _prepare(request, stack.enter_context(joined_processes()), stack)
        versions = {"hf_ddpm": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
        about = {"command": _command(job), "versions": versions}
        for rows, pictures in _measure(job):
            rows = [row | about for row in rows]
            measured += rows
            card = job.processes.only_first(
                lambda: write_evaluation(job.out, job.weights, rows, pictures, job.repo_id)  # noqa: B023
            )
    return {"out": str(job.out), "weights_sha256": job.weights, "results": measured, "card": card}


def write_evaluation(
    out: Path,
    weights: str,
    rows: list[dict[str, Any]],
    pictures: dict[str, Callable[[Path], None]] | None = None,
    repo_id: str | None = None,
) -> Path | None:
    """Adds results to `out`: to evaluation.json, and to the card unless it is another than `hub.write_card` wrote.

    Args:
        out: made if it does not exist.
        weights: `weights_sha256` of the model; results of other weights, and their pictures, go.
        rows: results, of which each replaces the one that was measured in the same way.
        pictures: names in `figures` -> what draws them into a path.
        repo_id: for the examples of a new card.

    Returns: the card's path, or None if it was left alone.
    """
    before = _stored_results(out, weights)
    is_edited, repo_id = hub.is_edited(out), hub.named_repository(out) or repo_id
    if not before:
        for name in PICTURES:
            (out / "figures" / name).unlink(missing_ok=True)
    new = {_key(row): row for row in rows}
    results = [row for row in before if _key(row) not in new] + [*new.values()]
    for name, draw in {**(pictures or {}), **_grid_pictures(results, rows)}.items():
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / name)
            write_atomically(out / "figures" / name, (Path(folder) / name).read_bytes())
    content = {"format": FORMAT, "weights_sha256": weights, "results": results}
    write_atomically(
        out / "evaluation.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return None if is_edited else hub.write_card(out, repo_id)


@dataclass(frozen=True)
class _Request:
    """The arguments of `evaluate`."""

    model: str | Path
    metrics: Sequence[str]
    reference: str | Path | None
    floor: str | Path | None
    data: TrainingConfig | None
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
    out: str | Path | None


@dataclass(frozen=True, eq=False)
class _Job:
    """What is ready to be measured.

    Args:
        out, weights, repo_id: as of `write_evaluation`.
        chain: the scheduler of all T steps.
        distances: the metrics among the keys of DISTANCES.
        floors: what real images get; `floor_of` says which.
        class_labels: of the samples, and `classes` how they were chosen.
        held_out, training: images that were not trained on, and that were; None if they are not needed.
        data: the settings of these, whose `random_flip` says whether mirrored images were trained on, too.
    """

    request: _Request
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
    data: TrainingConfig


def _check(request: _Request) -> None:
    """What can be said before a file is read."""
    if not request.metrics or set(request.metrics) - set(METRICS):
        raise UsageError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(request.metrics) or 'none'}")
    if unknown := set(request.schedulers) - set(SCHEDULERS):
        raise UsageError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {sorted(unknown)[0]!r}")
    for name, value, least in (
        ("num_images", request.num_images, 1),
        ("batch_size", request.batch_size, 1),
        ("seed", request.seed, 0),
    ):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    if request.floor is not None and request.reference is None:
        raise UsageError(f"floor goes with a reference, got {str(request.floor)!r} alone: give --reference, too")


def _prepare(request: _Request, processes: Processes, stack: ExitStack) -> _Job:
    """Finds, loads and checks everything. Raises: UsageError for what cannot work."""
    folder, repo_id = _find_model(request.model)
    if request.out is None and repo_id is not None:
        raise UsageError(f"out must be a folder for what is measured, got none for {repo_id!r} of the Hub: give --out")
    out = folder if request.out is None else Path(request.out).expanduser()
    weights = weights_sha256(folder)
    if weights is None:
        raise UsageError(f"model must hold the weights of its network, got {str(request.model)!r} without")
    _check_out(out, weights)
    pipeline = _load(folder, request.device, processes)
    chain, unet = pipeline.scheduler, pipeline.unet.config
    cells = _grid(chain.config, request.schedulers, request.num_inference_steps)
    distances = [metric for metric in DISTANCES if metric in request.metrics]
    splits = _Splits(processes, stack, request.data, folder, unet)

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
        floor_of = f"halves of {reference.about['data']['split']}"
        if other is not None:
            floor_of = f"{other.about['data']['split']} against {reference.about['data']['split']}"
        real, others = real_floor(reference, other)
        floors = processes.only_first(
            lambda: measure_distances(first_images(others, request.num_images), real, distances)
        )
    class_labels, classes = _choose_classes(unet, splits, request.split, request.num_images)
    held_out = training = None
    if "nll" in request.metrics:
        inclusion_probabilities(chain, min(request.timesteps_per_image, len(chain)))
        held_out = splits.open(request.test_split, is_labeled=classes is not None)
        if len(held_out) < 2 or request.num_images < 2:
            raise UsageError(f"nll needs 2 images or more, got {min(len(held_out), request.num_images)}")
        _check_labels(held_out, splits, request)
    if "memorization" in request.metrics:
        training = splits.open(request.split)
        held_out = held_out or splits.open(request.test_split)
        _check_memorization(training, held_out, request.num_images)
    return _Job(
        request=request,
        processes=processes,
        out=out,
        weights=weights,
        repo_id=repo_id,
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
        data=splits.data or TrainingConfig(),
    )


Draw: TypeAlias = Callable[[Path], None]


def _measure(job: _Job) -> Iterator[tuple[list[dict[str, Any]], dict[str, Draw]]]:
    """Results and pictures, as soon as they are there."""
    if "nll" in job.request.metrics:
        yield _measure_likelihood(job)
    copies = "memorization" in job.request.metrics
    for cell in job.cells if job.distances else job.cells[: int(copies)]:
        job.pipeline.scheduler = named_scheduler(cell.scheduler, job.chain.config, cell.num_inference_steps)
        kept = min(NUM_MEMORIZATION_SAMPLES, job.request.num_images) if copies else 0
        num_images = job.request.num_images if job.distances else kept
        samples = sample_statistics(
            job.processes,
            job.pipeline,
            job.network,
            range(job.request.seed, job.request.seed + num_images),
            None if job.class_labels is None else job.class_labels[:num_images],
            num_inference_steps=cell.num_inference_steps,
            batch_size=job.request.batch_size,
            num_kept=kept,
            label=f"{cell.scheduler}, {cell.num_inference_steps} steps",
        )
        sampling = {
            **cell._asdict(),
            "seed": job.request.seed,
            "num_images": num_images,
            "classes": job.classes,
            "network_evaluations": samples.network_evaluations,
            "seconds_per_image": samples.seconds_per_image,
            "batch_size": job.request.batch_size,
            "num_processes": job.processes.size,
            "device": _device_name(job.pipeline.device),
        }
        if job.distances:
            yield job.processes.only_first(lambda: _distance_rows(job, samples.statistics, sampling)), {}  # noqa: B023
        if copies:
            yield _measure_copies(job, samples, sampling | {"num_images": kept})
            copies = False


def _distance_rows(job: _Job, samples: Statistics | None, sampling: dict[str, Any]) -> list[dict[str, Any]]:
    assert samples is not None and job.reference is not None and job.network is not None  # noqa: PT018
    rows = []
    for metric, found in measure_distances(samples, job.reference, job.distances).items():
        floor = job.floors[metric]
        row: dict[str, Any] = {
            "metric": metric,
            "name": _name(metric, job.network),
            **found._asdict(),
            "floor": {**floor._asdict(), "of": job.floor_of},
            "network": job.network.identity,
            "reference": job.reference.about["data"],
            "sampling": sampling,
        }
        biased = warnings_of(min(floor.num_compared), job.network) if metric == "fd" else []
        rows.append(row | ({"remark": f"of the real images, {biased[0]}"} if biased else {}))
    return rows


def _name(metric: str, network: FeatureNetwork) -> str:
    """Only what is measured with Inception is called FID and KID."""
    frechet = network.frechet_name
    names = {"fd": frechet, "kid": "KID" if frechet == "FID" else frechet.replace("FD", "KD"), "cmmd": "CMMD"}
    return names.get(metric, metric.capitalize())


def _measure_likelihood(job: _Job) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
    held_out, request = job.held_out, job.request
    assert held_out is not None
    chosen = epoch_order(0, 0, len(held_out))[: request.num_images]
    steps = min(request.timesteps_per_image, len(job.chain))
    likelihood = measure_likelihood(
        job.processes,
        job.pipeline.unet,
        job.chain,
        center_pixels(held_out, chosen),
        held_out.labels[chosen] if job.classes is not None and held_out.labels is not None else None,
        seed=request.seed,
        timesteps_per_image=steps,
        batch_size=request.batch_size,
        device=job.pipeline.device,
    )
    bits, error = likelihood.bits_per_dimension, likelihood.standard_error
    parts = {"prior": likelihood.prior, "decoder": likelihood.decoder}
    remark = f"of them L_T = {likelihood.prior:.4g}, the decoder {likelihood.decoder:.4g}"
    if likelihood.non_finite_timesteps:
        remark = f"the bound is not finite, by its terms at t = {str(likelihood.non_finite_timesteps)[1:-1]}"
    row = {
        "metric": "nll",
        "name": "Bits per dimension",
        "value": bits if math.isfinite(bits) else None,
        "standard_error": error if math.isfinite(error) else None,
        "num_compared": [likelihood.num_images],
        "reference": _about(held_out, job.data, request.test_split),
        "likelihood": {
            "num_images": likelihood.num_images,
            "timesteps_per_image": steps,
            "seed": request.seed,
            "classes": None if job.classes is None else "of the images",
            "non_finite_timesteps": likelihood.non_finite_timesteps,
            **{name: value if math.isfinite(value) else None for name, value in parts.items()},
        },
        "remark": remark,
    }
    return [row], {"bound.png": lambda path: draw_bound(likelihood, path)}


def _measure_copies(
    job: _Job, samples: Samples, sampling: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
    """Memorization in pixels and in features; the picture is of the pairs that are nearest in features."""
    training, held_out, network = job.training, job.held_out, job.network
    assert training is not None and held_out is not None and network is not None  # noqa: PT018
    pixels, others = center_pixels(training), center_pixels(held_out)
    if job.data.random_flip:
        pixels = np.concatenate([pixels, pixels[..., ::-1]])
    batch_size = job.request.batch_size
    features = [
        pixel_features(job.processes, network, x, batch_size) for x in (samples.images.numpy(), pixels, others)
    ]

    def compare() -> list[Memorization]:
        sets = [(samples.images, pixels, others), features]
        return [memorization(*rows, quantile=MEMORIZATION_QUANTILE) for rows in sets]

    rows, found = [], job.processes.only_first(compare)
    for space, one in zip(("pixels", "features"), found, strict=True):
        rows.append(
            {
                "metric": f"memorization_{space}",
                "name": f"Near training images, in {space}",
                "value": one.near_fraction,
                "standard_error": None,
                "num_compared": [one.num_samples, one.num_training],
                "floor": {
                    "value": one.expected_near_fraction,
                    "standard_error": None,
                    "num_compared": [one.num_held_out, one.num_training],
                    "of": f"{job.request.test_split} against {job.request.split}",
                },
                **({"network": network.identity} if space == "features" else {}),
                "reference": _about(training, job.data, job.request.split),
                "held_out": _about(held_out, job.data, job.request.test_split),
                "sampling": sampling,
                "memorization": {
                    **{name: value for name, value in asdict(one).items() if name != "pairs"},
                    "mirrored": job.data.random_flip,
                },
                "remark": f"a model that does not copy has so many with probability {one.near_p_value:.2g}; "
                f"Z = {one.z:.2f}, of which the probability is {one.z_p_value:.2g}",
            }
        )
    return rows, {"memorization.png": lambda path: draw_pairs(samples.images, pixels, found[1].pairs, path)}


class _Splits:
    """The data of a model, as 8-bit images of its size and channels; each split is opened once."""

    def __init__(
        self, processes: Processes, stack: ExitStack, data: TrainingConfig | None, folder: Path, unet: Any
    ) -> None:
        self._processes, self._stack, self._given = processes, stack, data is not None
        self._folder, self._size, self._channels = folder, unet.sample_size, unet.in_channels
        self.data = data
        if data is None and (folder / "config.yaml").is_file():
            self.data = load_config(str(folder / "config.yaml"))
        self._opened: dict[tuple[str, bool], ImageCache] = {}

    @property
    def resolution(self) -> int:
        height, width = (self._size, self._size) if isinstance(self._size, int) else self._size
        if height != width:
            raise UsageError(f"data can be compared with square images only, got {width} x {height}")
        return height

    @property
    def has_labels(self) -> bool:
        return self.data is not None and self.data.label_column is not None

    @cached_property
    def config(self) -> TrainingConfig:
        """The settings, for images of the model's size and channels."""
        if self.data is None:
            raise UsageError(
                "the data must be known for this, but the model's folder has no config.yaml of a run: "
                "give --dataset_name or, for distances alone, --reference"
            )
        for name, value in (("resolution", self.resolution), ("channels", self._channels)):
            if getattr(self.data, name) not in (None, value):
                raise UsageError(f"{name} must be the model's, {value}, got {getattr(self.data, name)}: leave it out")
        config = replace(
            self.data, resolution=self.resolution, channels=self._channels, preserve_input_precision=False
        )
        recorded = hub.read_run(self._folder).get("data", {}).get("fingerprint")
        if not self._given and recorded and not config.streaming:
            found = self._processes.first(lambda: load_images(self.data or config)).fingerprint
            if found != recorded:
                raise UsageError(
                    "the data must be those that the model was trained on, got images with the fingerprint\n"
                    f"  {found} instead of\n  {recorded}: bring them back, or give --dataset_name on purpose"
                )
        return config

    def open(self, split: str, is_labeled: bool = False) -> ImageCache:
        """The images of a split, which stay until the end."""
        config = self.config if is_labeled else replace(self.config, label_column=None)
        if (split, is_labeled) not in self._opened:
            self._opened[split, is_labeled] = self._processes.first(
                lambda: self._stack.enter_context(open_split(config, split))
            )
        return self._opened[split, is_labeled]

    def references(self, network: FeatureNetwork, split: str, test_split: str) -> tuple[Reference, Reference | None]:
        """That of `split`, and that of `test_split` if there is one; kept in the cache, and made if need be."""
        if self._channels not in (1, 3):
            raise UsageError(f"feature networks take 1 or 3 channels, got a model of {self._channels}")
        self.open(split)
        names = [split]
        if test_split != split:
            with suppress(UsageError):
                self.open(test_split)
                names.append(test_split)
        root = Path(self.config.cache_dir or huggingface_hub.constants.HF_HOME).expanduser() / "hf_ddpm"
        identity = {key: value for key, value in network.identity.items() if key != "information"}
        found: list[Reference] = []
        for name in names:
            images = self.open(name)
            decisive = [REFERENCE_FORMAT, name, images.fingerprint, self.config.center_crop, identity]
            folder = root / "references" / hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

            def find(name: str = name, folder: Path = folder) -> Reference:
                if not folder.is_dir():
                    make_reference(self.config, name, network, folder)
                return load_reference(folder)

            found.append(self._processes.first(find))
        return found[0], found[1] if len(found) > 1 else None


def _find_model(model: str | Path) -> tuple[Path, str | None]:
    """The folder of a pipeline, and its name if it is on the Hub."""
    folder, repo_id = Path(model).expanduser(), None
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
        repo_id = str(model)
        try:
            folder = Path(str(diffusers.DiffusionPipeline.download(repo_id)))
            huggingface_hub.snapshot_download(repo_id, allow_patterns=["config.yaml", "run.json"])
        except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these types
            raise UsageError(
                f"model must be a folder or on the Hub, got {repo_id!r}, which is neither here nor reachable "
                f"({type(error).__name__})"
            ) from error
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"model must be a folder with model_index.json, got {str(model)!r}, which has none")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index.get("unet", ["", ""])[1] != "UNet2DModel":
        raise UsageError(
            f"model must be a DDPMPipeline of a UNet2DModel and a scheduler, got {str(model)!r}, a "
            f"{index.get('_class_name')}"
        )
    return folder, repo_id


def _check_out(out: Path, weights: str) -> None:
    there = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"out must be a folder to write to, got {str(out)!r}")
    others = weights_sha256(out)
    if others not in (None, weights):
        raise UsageError(f"out must not hold another model, got {str(out)!r} with the weights {others}")
    _stored_results(out, weights)


def _load(folder: Path, device: str | None, processes: Processes) -> DDPMPipeline:
    """The model with the scheduler of all T steps."""
    if device is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        device = "cpu"
    if device is None and torch.cuda.is_available() and processes.size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    pipeline, _ = load_for_sampling(str(folder), "ddpm", device=device)
    bad = [name for name, value in pipeline.unet.named_parameters() if not value.isfinite().all()]
    if bad:
        raise UsageError(f"weights must be finite, got NaN or infinity in {len(bad)} of them, first {bad[0]}")
    return pipeline


def _grid(config: Any, schedulers: Sequence[str], num_inference_steps: Sequence[int]) -> list[Cell]:
    """All cells, each of which can be sampled."""
    num_train, cells = config["num_train_timesteps"], []
    for name in schedulers or [default_scheduler(config)]:
        for steps in num_inference_steps or [num_train if name == "ddpm" else min(20, num_train)]:
            if not 1 <= steps <= num_train:
                raise UsageError(
                    f"num_inference_steps must be in [1, {num_train}], got {steps}: "
                    f"the model was trained with {num_train} timesteps"
                )
            named_scheduler(name, config, steps).set_timesteps(steps)
            cells.append(Cell(name, steps))
    return list(dict.fromkeys(cells))


def _load_network(
    request: _Request, reference: Reference | None, channels: int, device: torch.device
) -> FeatureNetwork:
    name = request.network or (reference.about["network"]["network"] if reference else "inception")
    if "cmmd" in request.metrics and name != "clip":
        raise UsageError(f"cmmd is of CLIP's embeddings, got the network {name!r}: --network clip")
    if channels not in (1, 3):
        raise UsageError(f"feature networks take 1 or 3 channels, got a model of {channels}: only nll can be measured")
    check_network(name, request.network_path)
    # MPS has no float64, and what it computes is not reproducible.
    return load_network(name, request.network_path, "cpu" if device.type == "mps" else device)


def _check_counts(metrics: list[str], network: FeatureNetwork, reference: Reference, num_images: int) -> None:
    for count, what in ((num_images, "num_images"), (reference.count, "the reference")):
        if "fd" in metrics and (warnings := warnings_of(count, network)):
            raise UsageError(f"{what} must be more for fd, got {count:,}: {warnings[0]}")
    least = max({"fd": 2, "kid": 4, "cmmd": 4, "precision": NEIGHBORS + 1}[metric] for metric in metrics)
    for count, what in ((num_images, "num_images"), (len(reference.features), "the reference's features")):
        if count < least:
            raise UsageError(f"{what} must be at least {least} for {', '.join(metrics)}, got {count}")


def _choose_classes(unet: Any, splits: _Splits, split: str, num_images: int) -> tuple[list[int] | None, str | None]:
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
        return [i % num_classes for i in range(num_images)], "each in turn"
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


def _check_labels(held_out: ImageCache, splits: _Splits, request: _Request) -> None:
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


def _stored_results(out: Path, weights: str) -> list[dict[str, Any]]:
    """The results in `out` of these weights."""
    path = out / "evaluation.json"
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UsageError(f"{path} must have the format {FORMAT}, got {content['format']}: move it away")
        results: list[dict[str, Any]] = content["results"] if content["weights_sha256"] == weights else []
        for row in results:
            _key(row)
        return results
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} must be whole, got a damaged file ({error!r}): move it away") from error


def _key(row: dict[str, Any]) -> str:
    """All that decides a result, beside the weights."""

    def chosen(part: str, *names: str) -> dict[str, Any]:
        values = row.get(part) or {}
        return {name: values.get(name) for name in names}

    network = {key: value for key, value in (row.get("network") or {}).items() if key != "information"}
    decisive = [
        row["metric"],
        network,
        chosen("reference", "fingerprint", "split", "count"),
        chosen("held_out", "fingerprint", "split", "count"),
        chosen("sampling", "scheduler", "num_inference_steps", "seed", "num_images", "classes"),
        chosen("likelihood", "num_images", "timesteps_per_image", "seed"),
    ]
    return json.dumps(decisive, sort_keys=True)


def _grid_pictures(results: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Draw]:
    """Quality against cost, of the grid to which the new rows belong, in its first metric."""
    names = [name for metric in DISTANCES.values() for name in metric]
    for new in sorted((row for row in rows if row["metric"] in names), key=lambda row: names.index(row["metric"]))[:1]:
        grid = [row for row in results if _key(_one_cell(row)) == _key(_one_cell(new))]
        if len(grid) > 1:
            costs = {"steps.png": "network_evaluations", "seconds.png": "seconds_per_image"}
            return {name: partial(_draw_grid, grid, cost) for name, cost in costs.items()}
    return {}


def _one_cell(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "sampling": {**(row.get("sampling") or {}), "scheduler": None, "num_inference_steps": None}}


def _draw_grid(grid: list[dict[str, Any]], cost: str, path: Path) -> None:
    every = [row["sampling"][cost] for row in grid]
    floor = grid[-1]["floor"]["value"]
    series: dict[str, tuple[list[float], list[float]]] = {
        "real images": ([min(every), max(every)], [floor, floor]),
    }
    for name in SCHEDULERS:
        points = sorted((r["sampling"][cost], r["value"]) for r in grid if r["sampling"]["scheduler"] == name)
        if points:
            series[name] = [x for x, _ in points], [y for _, y in points]
    label = {"network_evaluations": "network evaluations per image", "seconds_per_image": "seconds per image"}[cost]
    curve(path, series, label, grid[0]["name"], log_y=grid[0]["metric"] == "fd", log_x=True)


def _command(job: _Job) -> str:
    """What repeats this; of paths the names, as the rest of them says where and not what."""
    request = job.request
    data = {} if request.data is None else vars(request.data)
    options = {
        "metrics": ",".join(request.metrics),
        "reference": request.reference,
        "floor": request.floor,
        **{name: data.get(name) for name in ("dataset_name", "dataset_config_name", "train_data_dir")},
        **{name: data.get(name) for name in ("image_column", "label_column")},
        "split": None if request.split == "train" else request.split,
        "test_split": None if request.test_split == "test" else request.test_split,
        "num_images": request.num_images,
        "seed": request.seed,
        "num_inference_steps": ",".join(str(n) for n in dict.fromkeys(cell.num_inference_steps for cell in job.cells)),
        "scheduler": ",".join(dict.fromkeys(cell.scheduler for cell in job.cells)),
        "network": None if job.network is None else job.network.name,
        "network_path": request.network_path,
        "timesteps_per_image": request.timesteps_per_image if "nll" in request.metrics else None,
        "out": request.out,
    }
    words = ["hf-ddpm", "evaluate", job.repo_id or Path(request.model).resolve().name]
    for name, value in options.items():
        if value is not None:
            is_path = isinstance(value, str | Path) and Path(value).exists()
            words += [f"--{name}", Path(value).resolve().name if is_path else str(value)]
    return shlex.join(words + (["--center_crop"] if data.get("center_crop") else []))


def _about(images: ImageCache, data: TrainingConfig, split: str) -> dict[str, Any]:
    """What decides the images of a split, as references say it."""
    return {
        "name": find_source(data).name,
        "config": data.dataset_config_name,
        "split": split,
        "count": len(images),
        "num_bad": images.num_bad,
        "fingerprint": images.fingerprint,
        "resolution": images.resolution,
        "channels": images.channels,
        "crop": "none" if images.is_uniform else "center",
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


if __name__ == "__main__":
    run_command("evaluate", __spec__.name)
