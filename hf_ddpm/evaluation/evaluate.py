"""`hf-ddpm evaluate`: measures a model, our own or any of diffusers' DDPMPipelines, and writes down what it found.

result  a value, its standard error, the floor, and all that decides them
floor   what real images get in the samples' place: those of another split, or one half against the other

Each result is written as soon as it is there: a later error takes nothing back.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ddpm._version import __version__
from hf_ddpm.data.batches import center_pixels, epoch_order
from hf_ddpm.data.config import DataConfig
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.job import MEMORIZATION_QUANTILE, Cell, Job, Request, check_request, prepare
from hf_ddpm.evaluation.likelihood import draw_bound
from hf_ddpm.evaluation.measure import (
    DISTANCES,
    NEIGHBORS,
    Samples,
    measure_distances,
    measure_likelihood,
    pixel_features,
    sample_statistics,
)
from hf_ddpm.evaluation.memorization import Memorization, draw_pairs, memorization
from hf_ddpm.evaluation.results import Draw, write_evaluation
from hf_ddpm.evaluation.statistics import Statistics, describe_images, frechet_warnings
from hf_ddpm.runtime.processes import join_processes
from hf_ddpm.sampling.sampler import iter_samples, speed_up
from hf_ddpm.sampling.schedulers import named_scheduler

NUM_MEMORIZATION_SAMPLES = 1000


def evaluate(
    model: str | Path,
    *,
    metrics: Sequence[str] = ("fd", "kid", "precision"),
    reference: str | Path | None = None,
    floor: str | Path | None = None,
    data: DataConfig | None = None,
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
    dtype: str = "fp32",
    compile: bool = False,
    uniform: bool = False,
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
        num_inference_steps, schedulers: the grid; default: as of `load_for_sampling`.
        network, network_path: of features, as of `load_network`; default: the reference's, or inception.
        timesteps_per_image: K of nll.
        batch_size: images per network evaluation, on a CPU always FORWARD_BATCH; elsewhere it changes rounding.
        device: default: cuda or mps if there is one, else cpu.
        dtype, compile: of the network while it samples, as of `load_for_sampling`; nll is always of float32.
        uniform: do without searched timesteps.
        out: where to write; default: the model's folder. A Hub id needs one.

    Returns: {"out", "weights_sha256", "results": those measured now, "card": its path}.

    Raises:
        UsageError: before anything is sampled, what cannot work; later, samples that are not finite.
    """
    request = Request(**locals())
    check_request(request)
    measured: list[dict[str, Any]] = []
    with ExitStack() as stack:
        job = prepare(request, stack.enter_context(join_processes()), stack)
        versions = {"hf_ddpm": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
        about = {"command": _command(job), "versions": versions}
        for rows, pictures in _measure(job):
            rows = [row | about for row in rows]
            measured += rows
            job.processes.on_main(
                lambda: write_evaluation(job.out, job.weights, rows, pictures, job.repo_id)  # noqa: B023
            )
    return {"out": str(job.out), "weights_sha256": job.weights, "results": measured, "card": job.out / "README.md"}


def _measure(job: Job) -> Iterator[tuple[list[dict[str, Any]], dict[str, Draw]]]:
    """Results and pictures, as soon as they are there."""
    if "nll" in job.request.metrics:
        yield _measure_likelihood(job)
    # Not before: the bound is that of the network as it was loaded.
    speed_up(job.pipeline, job.request.dtype, job.request.compile)
    copies = "memorization" in job.request.metrics
    for cell in job.cells if job.distances else job.cells[: int(copies)]:
        job.pipeline.scheduler = named_scheduler(cell.scheduler, job.chain.config, cell.num_inference_steps)
        found = job.pipeline.searched(cell.num_inference_steps)
        kept = min(NUM_MEMORIZATION_SAMPLES, job.request.num_images) if copies else 0
        num_images = job.request.num_images if job.distances else kept
        if job.request.compile and cell == job.cells[0]:
            job.processes.gather(partial(_sample_one, job, cell))  # compiles, which is no part of an image's time
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
            "timesteps": None if found is None else [*found.timesteps],
            "seed": job.request.seed,
            "num_images": num_images,
            "classes": job.classes,
            "dtype": job.request.dtype,
            "compile": job.request.compile,
            "network_evaluations": samples.network_evaluations,
            "seconds_per_image": samples.seconds_per_image,
            "batch_size": job.request.batch_size,
            "num_processes": job.processes.size,
            "device": _device_name(job.pipeline.device),
        }
        if job.distances:
            yield job.processes.on_main(lambda: _distance_rows(job, samples.statistics, sampling)), {}  # noqa: B023
        if copies:
            yield _measure_copies(job, samples, sampling | {"num_images": kept})
            copies = False


def _sample_one(job: Job, cell: Cell) -> None:
    """One image, in a forward pass as large as any other."""
    seed, batch_size = job.request.seed, job.request.batch_size
    labels = None if job.class_labels is None else job.class_labels[:1]
    steps = cell.num_inference_steps
    next(iter_samples(job.pipeline, [seed], batch_size=batch_size, num_inference_steps=steps, class_labels=labels))


def _distance_rows(job: Job, samples: Statistics | None, sampling: dict[str, Any]) -> list[dict[str, Any]]:
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
            "reference": job.reference.metadata["data"],
            "sampling": sampling,
            **({"neighbors": NEIGHBORS} if metric in DISTANCES["precision"] else {}),
        }
        biased = frechet_warnings(min(floor.num_compared), job.network) if metric == "fd" else []
        rows.append(row | ({"remark": f"of the real images, {biased[0]}"} if biased else {}))
    return rows


def _name(metric: str, network: FeatureNetwork) -> str:
    """Only what is measured with Inception is called FID and KID."""
    frechet = network.frechet_name
    names = {"fd": frechet, "kid": "KID" if frechet == "FID" else frechet.replace("FD", "KD"), "cmmd": "CMMD"}
    return names.get(metric, metric.capitalize())


def _measure_likelihood(job: Job) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
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
        "reference": describe_images(held_out, job.data, request.test_split),
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
    job: Job, samples: Samples, sampling: dict[str, Any]
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

    rows, found = [], job.processes.on_main(compare)
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
                "reference": describe_images(training, job.data, job.request.split),
                "held_out": describe_images(held_out, job.data, job.request.test_split),
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


def _command(job: Job) -> str:
    """What repeats this; of paths the names, as the rest of them says where and not what."""
    request = job.request
    data = {} if request.data is None else vars(request.data)
    solvers, steps = ([*dict.fromkeys(column)] for column in zip(*job.cells, strict=True))
    # By default solver and number of steps go by each other; to name all of them would ask for more cells.
    is_grid = len(job.cells) == len(steps) * len(solvers)
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
        "num_inference_steps": ",".join(map(str, steps if is_grid else request.num_inference_steps)) or None,
        "scheduler": ",".join(solvers if is_grid else request.schedulers) or None,
        "network": None if job.network is None else job.network.name,
        "network_path": request.network_path,
        "timesteps_per_image": request.timesteps_per_image if "nll" in request.metrics else None,
        "dtype": None if request.dtype == "fp32" else request.dtype,
        "out": request.out,
    }
    words = ["hf-ddpm", "evaluate", job.repo_id or Path(request.model).resolve().name]
    for name, value in options.items():
        if value is not None:
            is_path = name == "out" or (isinstance(value, str | Path) and Path(value).exists())
            words += [f"--{name}", Path(value).resolve().name if is_path else str(value)]
    flags = {
        **{"--center_crop": data.get("center_crop"), "--compile": request.compile},
        "--uniform": request.uniform,
    }
    return shlex.join(words + [flag for flag, is_set in flags.items() if is_set])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
