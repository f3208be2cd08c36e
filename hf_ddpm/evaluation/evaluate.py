"""`hf-ddpm evaluate`: measure a model, our own or any of diffusers' DDPMPipelines, and write the results down.

A result is a value with its standard error, beside what real images get, and with everything that determines both.
Each result is written as soon as it is measured: an error later on takes nothing back.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ddpm._version import __version__
from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.data.batches import as_tensor, center_pixels, epoch_order
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import Pairs
from hf_ddpm.evaluation.array_features import as_seen
from hf_ddpm.evaluation.distances import MIN_CLASS_IMAGES, kernel_distance
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.fidelity import mean_of, measure_fidelity
from hf_ddpm.evaluation.job import MEMORIZATION_QUANTILE, Comparison, Job, Request, SamplerSetting, load_job, num_terms
from hf_ddpm.evaluation.likelihood import Likelihood, draw_bound
from hf_ddpm.evaluation.measure import (
    NEIGHBORS,
    Samples,
    measure_distances,
    measure_likelihood,
    pixel_features,
    sample_statistics,
)
from hf_ddpm.evaluation.memorization import Memorization, draw_pairs, memorization
from hf_ddpm.evaluation.model_data import DEFAULT_TEST_SPLIT
from hf_ddpm.evaluation.names import DISTANCES, FIDELITY, VALUES
from hf_ddpm.evaluation.results import Draw, write_evaluation
from hf_ddpm.evaluation.statistics import Statistics, describe_images, frechet_warnings
from hf_ddpm.evaluation.value_statistics import (
    describe_spectra,
    draw_spectra,
    joined,
    scales_of,
    spectrum_rows,
    value_distance,
    value_statistics,
)
from hf_ddpm.hub.download import is_hub_id
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.errors import UnwrittenError, UsageError, in_one_line
from hf_ddpm.runtime.format import finite_or_none, format_measurement
from hf_ddpm.sampling.sampler import describe_guidance, iter_samples, speed_up
from hf_ddpm.solvers import named_scheduler
from hf_ddpm.value_range import ValueRange

NUM_MEMORIZATION_SAMPLES = 1000
STATISTICS_BATCH = 64  # images of which statistics of values are computed at once


def evaluate(model: str | Path, **settings: Any) -> dict[str, Any]:
    """Measure a model and write evaluation.json, pictures and the card.

    Several processes, those of `accelerate launch`, torchrun or a running process group, share the work and get the
    same numbers; the main process writes.

    Args:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a Hub id.
        settings: The other attributes of `hf_ddpm.evaluation.job.Request` by name, such as `metrics`, `data`,
            `num_images` and `num_inference_steps`.

    Returns:
        "out": the folder; "weights_sha256": what identifies the weights; "results": those that were measured now;
        "card": the path of the card.

    Raises:
        UsageError: When something cannot work, before anything is sampled; later, when samples are not finite.
        UnwrittenError: When results were measured and could not be written; it holds what this would return.
    """
    results: list[dict[str, Any]] = []
    unwritten: list[dict[str, Any]] = []
    undrawn: dict[str, Draw] = {}
    problem = None
    with load_job(Request(model=model, **settings)) as job:
        versions = {"hf_ddpm": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
        metadata = {"command": _command(job), "versions": versions}
        for measured_rows, pictures in _measure(job):
            rows = [row | metadata for row in measured_rows]
            results += rows
            unwritten += rows
            undrawn |= pictures
            problem = job.processes.on_main(partial(_try_to_write, job, unwritten, undrawn))
            if problem is None:
                unwritten, undrawn = [], {}
    result = {"out": str(job.out), "weights_sha256": job.weights, "results": results, "card": job.out / "README.md"}
    if problem is not None:
        raise UnwrittenError(
            f"{len(unwritten)} of {len(results)} results could not be written into {str(job.out)!r}: {problem}. Make "
            "room there, or give another --out",
            result,
        )
    return result


def _try_to_write(job: Job, rows: list[dict[str, Any]], pictures: dict[str, Draw]) -> str | None:
    """Write results, which took minutes to measure, and return what kept them from being written."""
    try:
        write_evaluation(job.out, job.weights, rows, pictures, job.repo_id)
    except (OSError, UsageError) as error:  # a UsageError is of a file that somebody edits
        return in_one_line(error)
    return None


def _measure(job: Job) -> Iterator[tuple[list[dict[str, Any]], dict[str, Draw]]]:
    """Yield results and what draws their pictures, as soon as they are measured."""
    if "nll" in job.request.metrics:
        yield _measure_likelihood(job)
    # Not earlier: the bound is that of the network in float32, as it was loaded.
    speed_up(job.pipeline, job.request.dtype, job.request.compile)
    if job.pairs is not None:
        for setting in job.sampler_settings:
            yield _rows_of_pairs(job, job.pairs, setting), {}
        return
    measures_copies = "memorization" in job.request.metrics
    is_grid = bool(job.distances) or job.value_images is not None
    num_settings = len(job.sampler_settings) if is_grid else int(measures_copies)
    for number, setting in enumerate(job.sampler_settings[:num_settings]):
        is_first = number == 0
        num_images_to_keep = 0
        if measures_copies and is_first:
            num_images_to_keep = min(NUM_MEMORIZATION_SAMPLES, job.request.num_images)
        num_images = job.request.num_images if is_grid else num_images_to_keep
        earlier = job.sampler_settings[:number]
        # Guided by its own classes, a network gets twice as many images: a shape that is compiled for itself.
        if job.request.compile and bool(setting.guidance) not in {bool(each.guidance) for each in earlier}:
            # This compiles the network, which is no part of the time that an image takes.
            job.processes.gather(partial(_sample_one, job, setting))
        samples = _sample(job, setting, num_images, num_images_to_keep)
        sampling = _describe_sampling(job, setting, num_images, samples)
        if job.distances:
            yield job.processes.on_main(partial(_distance_rows, job, samples.statistics, sampling)), {}
        if job.value_images is not None:
            yield job.processes.on_main(partial(_measure_values, job, job.value_images, samples, sampling))
        if num_images_to_keep:
            yield _measure_copies(job, samples, sampling | {"num_images": num_images_to_keep})


def _sample(job: Job, setting: SamplerSetting, num_images: int, num_images_to_keep: int) -> Samples:
    steps = setting.num_inference_steps
    job.pipeline.scheduler = named_scheduler(setting.scheduler, job.full_chain_scheduler.config, steps)
    return sample_statistics(
        job.processes,
        job.pipeline,
        None if job.comparison is None else job.comparison.network,
        range(job.request.seed, job.request.seed + num_images),
        None if job.class_labels is None else job.class_labels[:num_images],
        num_inference_steps=steps,
        batch_size=job.request.batch_size,
        num_images_to_keep=num_images_to_keep,
        guidance=setting.guidance,
        measures_values=job.value_images is not None,
        label=f"{setting.scheduler}, {steps} steps" + (f", {setting.guidance.scale:g}" if setting.guidance else ""),
    )


def _rows_of_pairs(job: Job, pairs: Pairs, setting: SamplerSetting) -> list[dict[str, Any]]:
    """Return how near samples come to the truth, beside what the enlarged images of a low resolution get.

    Distances are those from all samples to all images of the truth.
    """
    assert isinstance(job.pipeline, ConditionalDDPMPipeline)
    assert job.held_out is not None
    steps, count = setting.num_inference_steps, len(pairs.images)
    is_super_resolution = job.pipeline.condition.super_resolution is not None
    job.pipeline.scheduler = named_scheduler(setting.scheduler, job.full_chain_scheduler.config, steps)
    measured = measure_fidelity(
        job.processes,
        job.pipeline,
        pairs,
        job.request.seed,
        network=None if job.comparison is None else job.comparison.network,
        perceptual=job.perceptual,
        compare_conditions=is_super_resolution,
        num_inference_steps=steps,
        batch_size=job.request.batch_size,
        guidance=setting.guidance,
        label=f"{setting.scheduler}, {steps} steps",
    )
    sampling = _describe_sampling(job, setting, count, measured.samples)
    held_out = describe_images(job.held_out, job.data, job.request.test_split)
    rows = []
    for metric in (name for name in FIDELITY if name in job.request.metrics):
        row = {
            "metric": metric,
            "name": FIDELITY[metric],
            **mean_of(getattr(measured.of_samples, metric))._asdict(),
            "num_compared": [count],
            "reference": held_out,
            "sampling": sampling,
        }
        if measured.of_conditions is not None:
            of_input = mean_of(getattr(measured.of_conditions, metric))
            row["input"] = of_input._asdict()
            if of_input.value is not None:
                text = format_measurement(of_input.value, of_input.standard_error)
                better = "less" if metric == "lpips" else "more"
                row["remark"] = f"the low resolution, enlarged by cubic interpolation, gets {text}; {better} is better"
        rows.append(row)
    if job.distances:
        statistics = measured.samples.statistics
        distances = job.processes.on_main(lambda: _distance_rows(job, statistics, sampling))
        rows += [{**row, "held_out": held_out} for row in distances]
    return rows


def _sample_one(job: Job, setting: SamplerSetting) -> None:
    """Sample one image, in a forward pass as large as any other."""
    steps = setting.num_inference_steps
    job.pipeline.scheduler = named_scheduler(setting.scheduler, job.full_chain_scheduler.config, steps)
    batches = iter_samples(
        job.pipeline,
        [job.request.seed],
        batch_size=job.request.batch_size,
        num_inference_steps=steps,
        class_labels=None if job.class_labels is None else job.class_labels[:1],
        guidance=setting.guidance,
    )
    next(batches)


def _describe_sampling(job: Job, setting: SamplerSetting, num_images: int, samples: Samples) -> dict[str, Any]:
    """Return everything that determines the samples, and what they cost."""
    searched = job.pipeline.searched_timesteps_for(setting.num_inference_steps)
    return {
        **setting._asdict(),
        "guidance": None if setting.guidance is None else describe_guidance(setting.guidance, job.pipeline),
        "timesteps": None if searched is None else [*searched.timesteps],
        "seed": job.request.seed,
        "num_images": num_images,
        "classes": job.class_choice,
        "dtype": job.request.dtype,
        "compile": job.request.compile,
        "network_evaluations": samples.network_evaluations,
        "seconds_per_image": samples.seconds_per_image,
        "batch_size": job.request.batch_size,
        "num_processes": job.processes.size,
        "device": device_name(job.pipeline.device),
    }


def _distance_rows(job: Job, samples: Statistics | None, sampling: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a result for each distance of the samples from the reference."""
    comparison = job.comparison
    assert samples is not None
    assert comparison is not None
    assert comparison.reference is not None
    rows = []
    for metric, measured in measure_distances(samples, comparison.reference, job.distances).items():
        real = comparison.real_vs_real[metric]
        row: dict[str, Any] = {
            "metric": metric,
            "name": _metric_name(metric, comparison.network),
            **measured._asdict(),
            "real_vs_real": {**real._asdict(), "of": comparison.compared},
            "network": comparison.network.identity,
            "reference": comparison.reference.metadata["data"],
            "sampling": sampling,
        }
        if metric in DISTANCES["precision"]:
            row["neighbors"] = NEIGHBORS
        if metric == "kid" and (by_class := _distances_by_class(job, samples)):
            row["by_class"] = by_class
        warnings = frechet_warnings(min(real.num_compared), comparison.network) if metric == "fd" else []
        if warnings:
            row["remark"] = f"of the real images, {warnings[0]}"
        rows.append(row)
    return rows


def _distances_by_class(job: Job, samples: Statistics) -> dict[str, dict[str, float | None]]:
    """Return the kernel distance of each class of which there are enough samples and images, by the class' name."""
    measured: dict[str, dict[str, float | None]] = {}
    classes, reference_labels = job.pipeline.classes, job.reference_labels
    if classes is None or job.class_labels is None or reference_labels is None:
        return measured
    assert job.comparison is not None
    assert job.comparison.reference is not None
    labels = np.array(job.class_labels[: len(samples.features)])
    for number, name in enumerate(classes.names):
        drawn, real = (torch.from_numpy(each == number) for each in (labels, reference_labels))
        if min(int(drawn.sum()), int(real.sum())) >= MIN_CLASS_IMAGES:
            distance = kernel_distance(samples.features[drawn], job.comparison.reference.features[real])
            error = finite_or_none(distance.standard_error)
            measured[name] = {"value": finite_or_none(distance.distance), "standard_error": error}
    return measured


def _metric_name(metric: str, network: FeatureNetwork) -> str:
    """Return the name of a metric; only distances that are measured with Inception are called FID and KID."""
    frechet = network.frechet_name
    names = {"fd": frechet, "kid": "KID" if frechet == "FID" else frechet.replace("FD", "KD"), "cmmd": "CMMD"}
    return names.get(metric, metric.capitalize())


def _measure_likelihood(job: Job) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
    """Measure the bits per dimension of held-out images; the picture shows the terms of the bound."""
    held_out, request = job.held_out, job.request
    assert held_out is not None
    indices = epoch_order(0, 0, len(held_out))[: request.num_images]
    labels = None
    if job.class_labels is not None and held_out.labels is not None:
        labels = held_out.labels[indices]
    timesteps_per_image = num_terms(request, job.full_chain_scheduler)
    likelihood = measure_likelihood(
        job.processes,
        job.pipeline.unet,
        job.full_chain_scheduler,
        center_pixels(held_out, indices),
        labels,
        seed=request.seed,
        timesteps_per_image=timesteps_per_image,
        batch_size=request.batch_size,
        device=job.pipeline.device,
        scale=job.pipeline.value_range or 255,
    )
    row = {
        "metric": "nll",
        "name": "Bits per dimension",
        "value": finite_or_none(likelihood.bits_per_dimension),
        "standard_error": finite_or_none(likelihood.standard_error),
        "num_compared": [likelihood.num_images],
        "reference": describe_images(held_out, job.data, request.test_split),
        "likelihood": {
            "num_images": likelihood.num_images,
            "timesteps_per_image": timesteps_per_image,
            "seed": request.seed,
            "classes": None if job.class_labels is None else "of the images",
            "non_finite_timesteps": likelihood.non_finite_timesteps,
            "prior": finite_or_none(likelihood.prior),
            "decoder": finite_or_none(likelihood.decoder),
        },
        "remark": _describe_terms(likelihood),
    }
    return [row], {"bound.png": partial(draw_bound, likelihood)}


def _describe_terms(likelihood: Likelihood) -> str:
    if likelihood.non_finite_timesteps:
        return f"the bound is not finite, by its terms at t = {str(likelihood.non_finite_timesteps)[1:-1]}"
    return f"of them L_T = {likelihood.prior:.4g}, the decoder {likelihood.decoder:.4g}"


def _measure_values(
    job: Job, images: ImageCache, samples: Samples, sampling: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
    """Measure how far the moments and spectra of samples are from those of images; the picture shows the spectra."""
    assert samples.values is not None
    value_range = job.pipeline.value_range or ValueRange(0, images.max_value, "uint8")
    pixels = center_pixels(images)
    of_images = joined(
        [
            value_statistics(as_tensor(np.array(pixels[first : first + STATISTICS_BATCH])))
            for first in range(0, len(pixels), STATISTICS_BATCH)
        ]
    )
    drawn, real = (each.vectors(value_range) for each in (samples.values, of_images))
    scale = scales_of(of_images, real)
    halves = real[torch.from_numpy(epoch_order(0, 0, len(real)))]
    spectra = {"samples": spectrum_rows(samples.values), "images": spectrum_rows(of_images)}
    row = {
        "metric": VALUES,
        "name": "Fréchet distance of values",
        "value": finite_or_none(value_distance(drawn, real, scale)),
        "standard_error": None,
        "num_compared": [len(drawn), len(real)],
        "real_vs_real": {
            "value": finite_or_none(value_distance(halves[::2], halves[1::2], scale)),
            "standard_error": None,
            "num_compared": [len(halves[::2]), len(halves[1::2])],
            "of": f"halves of {job.request.split}",
        },
        "reference": describe_images(images, job.data, job.request.split),
        "sampling": sampling,
        "spectra": spectra,
        "remark": describe_spectra(spectra),
    }
    channels = value_range.display_channels or range(images.channels)
    return [row], {"spectrum.png": partial(draw_spectra, row, channels)}


def _measure_copies(
    job: Job, samples: Samples, sampling: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
    """Measure memorization in pixels and in features; the picture shows the pairs that are nearest in features."""
    training, held_out, comparison = job.training, job.held_out, job.comparison
    assert training is not None
    assert held_out is not None
    assert comparison is not None
    training_pixels, held_out_pixels = center_pixels(training), center_pixels(held_out)
    if job.data.random_flip:
        training_pixels = np.concatenate([training_pixels, training_pixels[..., ::-1]])
    pixels = (samples.images.numpy(), training_pixels, held_out_pixels)
    features = [pixel_features(job.processes, comparison.network, x, job.request.batch_size) for x in pixels]

    def compare() -> dict[str, Memorization]:
        return {
            "pixels": memorization(*pixels, quantile=MEMORIZATION_QUANTILE),
            "features": memorization(*features, quantile=MEMORIZATION_QUANTILE),
        }

    measured = job.processes.on_main(compare)
    rows = [_memorization_row(job, space, one, sampling, comparison) for space, one in measured.items()]
    pairs = measured["features"].pairs
    shown, shown_training = samples.images, training_pixels
    if (value_range := job.pipeline.value_range) is not None:
        shown = as_seen(samples.images, value_range)
        shown_training = as_seen(as_tensor(np.array(training_pixels)), value_range).numpy()
    return rows, {"memorization.png": lambda path: draw_pairs(shown, shown_training, pairs, path)}


def _memorization_row(
    job: Job, space: str, measured: Memorization, sampling: dict[str, Any], comparison: Comparison
) -> dict[str, Any]:
    """Return the result of one space, "pixels" or "features"."""
    assert job.training is not None
    assert job.held_out is not None
    split, test_split = job.request.split, job.request.test_split
    row = {
        "metric": f"memorization_{space}",
        "name": f"Near training images, in {space}",
        "value": measured.near_fraction,
        "standard_error": None,
        "num_compared": [measured.num_samples, measured.num_training],
        "real_vs_real": {
            "value": measured.expected_near_fraction,
            "standard_error": None,
            "num_compared": [measured.num_held_out, measured.num_training],
            "of": f"{test_split} against {split}",
        },
        "reference": describe_images(job.training, job.data, split),
        "held_out": describe_images(job.held_out, job.data, test_split),
        "sampling": sampling,
        "memorization": {
            **{name: value for name, value in asdict(measured).items() if name != "pairs"},
            "mirrored": job.data.random_flip,
        },
        "remark": _describe_copies(measured),
    }
    return row | ({"network": comparison.network.identity} if space == "features" else {})


def _describe_copies(measured: Memorization) -> str:
    """Return in words how probable so many near samples are, and on which side of real images samples lie."""
    if measured.z > 3:
        side = "samples are nearer to training images than held-out ones are, beyond chance"
    elif measured.z < -3:
        side = "samples are farther from training images than held-out ones are, so they are no copies as a whole"
    else:
        side = "samples are as far from training images as held-out ones are, within chance"
    return (
        f"of models that do not copy, {measured.near_p_value:.2g} have at least so many near samples; "
        f"Z = {measured.z:.2f}: {side}"
    )


def _command(job: Job) -> str:
    """Return the command that repeats this evaluation; paths are given by their last component alone.

    The rest of a path says where things lie on this machine, which is of no use to others.
    """
    request = job.request
    data = {} if request.data is None else vars(request.data)
    pairs = dict.fromkeys((each.scheduler, each.num_inference_steps) for each in job.sampler_settings)
    names, numbers = ([*dict.fromkeys(column)] for column in zip(*pairs, strict=True))
    # By default the scheduler and the number of steps depend on one another. Naming all of both would then ask for
    # more settings than there are.
    is_full_grid = len(pairs) == len(numbers) * len(names)
    steps = numbers if is_full_grid else request.num_inference_steps
    schedulers = names if is_full_grid else request.schedulers
    data_options = (
        *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column"),
        "condition_column",
    )
    options = {
        "metrics": ",".join(request.metrics),
        "reference": request.reference,
        "other_reference": request.other_reference,
        **{name: data.get(name) for name in data_options},
        "split": None if request.split == "train" else request.split,
        "test_split": None if request.test_split == DEFAULT_TEST_SPLIT else request.test_split,
        "num_images": request.num_images,
        "seed": request.seed,
        "num_inference_steps": ",".join(map(str, steps)) or None,
        "scheduler": ",".join(schedulers) or None,
        "guidance_scale": ",".join(f"{scale:g}" for scale in request.guidance_scales) or None,
        "guidance_method": request.guidance_method,
        "guidance_model": request.guidance_model,
        "network": None if job.comparison is None else job.comparison.network.name,
        "network_path": request.network_path,
        "timesteps_per_image": num_terms(request, job.full_chain_scheduler) if "nll" in request.metrics else None,
        "dtype": None if request.dtype == "fp32" else request.dtype,
        "out": request.out,
    }
    interval = request.guidance_interval
    flags = {
        f"--guidance_interval {' '.join(f'{end:g}' for end in interval or ())}": interval is not None,
        "--center_crop": data.get("center_crop"),
        "--compile": request.compile,
        "--uniform": request.uniform,
    }
    # The command stands on the card, which may be shared: no folder above the model's is named there.
    is_on_hub = job.repo_id is not None and is_hub_id(job.repo_id)
    words = ["hf-ddpm", "evaluate", str(job.repo_id) if is_on_hub else Path(request.model).resolve().name]
    for name, value in options.items():
        if value is not None:
            is_path = name == "out" or (isinstance(value, str | Path) and Path(value).exists())
            words += [f"--{name}", Path(value).resolve().name if is_path else str(value)]
    return shlex.join(words + [word for flag, is_set in flags.items() if is_set for word in flag.split()])
