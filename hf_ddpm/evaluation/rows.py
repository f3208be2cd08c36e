"""The results of an evaluation as rows of evaluation.json: each value with everything that determines it."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.data.batches import as_tensor, epoch_order, fixed_pixels
from hf_ddpm.data.conditions import Pairs
from hf_ddpm.evaluation.array_features import as_seen
from hf_ddpm.evaluation.comparison import Comparison
from hf_ddpm.evaluation.distances import MIN_CLASS_IMAGES, kernel_distance
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.fidelity import mean_of, measure_fidelity
from hf_ddpm.evaluation.images import MEMORIZATION_QUANTILE, num_terms
from hf_ddpm.evaluation.job import Job, SamplerSetting
from hf_ddpm.evaluation.likelihood import Likelihood, draw_bound
from hf_ddpm.evaluation.measure import NEIGHBORS, Samples, measure_distances, measure_likelihood, pixel_features
from hf_ddpm.evaluation.memorization import Memorization, draw_pairs, memorization
from hf_ddpm.evaluation.names import DISTANCES, FIDELITY, VALUES, VALUES_NAME
from hf_ddpm.evaluation.results import Draw
from hf_ddpm.evaluation.statistics import Statistics, describe_images, frechet_warnings
from hf_ddpm.evaluation.value_reference import clipped, statistics_of_values
from hf_ddpm.evaluation.value_statistics import (
    describe_spectra,
    draw_spectra,
    scales_of,
    spectrum_rows,
    value_distance,
)
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.format import finite_or_none, format_measurement
from hf_ddpm.sampling.loading import describe_guidance, describe_timesteps
from hf_ddpm.solvers import named_scheduler
from hf_ddpm.value_range import ValueRange


def rows_of_pairs(job: Job, pairs: Pairs, setting: SamplerSetting) -> list[dict[str, Any]]:
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
    sampling = describe_sampling(job, setting, count, measured.samples)
    held_out = describe_images(job.held_out, job.data, job.request.test_split)
    rows, values = [], job.pipeline.value_range
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
        if values is not None and metric != "lpips":
            peak = f"the peak is the width of the value range, {values.high - values.low:g}"
            row["remark"] = "; ".join(filter(None, [row.get("remark"), peak]))
        rows.append(row)
    if job.distances:
        statistics = measured.samples.statistics
        distances = job.processes.on_main(lambda: distance_rows(job, statistics, sampling))
        rows += [{**row, "held_out": held_out} for row in distances]
    return rows


def describe_sampling(job: Job, setting: SamplerSetting, num_images: int, samples: Samples) -> dict[str, Any]:
    """Return everything that determines the samples, and what they cost."""
    return {
        **setting._asdict(),
        "guidance": None if setting.guidance is None else describe_guidance(setting.guidance, job.pipeline),
        **describe_timesteps(job.pipeline, setting.num_inference_steps),
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


def distance_rows(job: Job, samples: Statistics | None, sampling: dict[str, Any]) -> list[dict[str, Any]]:
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


def measure_nll(job: Job) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
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
        fixed_pixels(held_out, indices),
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


def measure_values(
    job: Job, samples: Samples, sampling: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
    """Measure how far the moments and spectra of samples are from those of images; the picture shows the spectra."""
    assert samples.values is not None
    images, reference = job.value_images, job.value_reference
    if reference is not None:
        of_images, described = reference.statistics, reference.metadata["data"]
        value_range = job.pipeline.value_range
    else:
        assert images is not None
        of_images = statistics_of_values(images, job.pipeline.value_range)
        described = describe_images(images, job.data, job.request.split)
        value_range = job.pipeline.value_range or ValueRange(0, images.max_value, "uint8")
    assert value_range is not None
    drawn, real = (each.vectors(value_range) for each in (samples.values, of_images))
    scale = scales_of(of_images, real)
    other, compared = job.other_value_reference, f"halves of {described['split']}"
    halves = real[torch.from_numpy(epoch_order(0, 0, len(real)))]
    one_side, other_side = halves[::2], halves[1::2]
    if other is not None:
        one_side, other_side = other.statistics.vectors(value_range), real
        compared = f"{other.metadata['data']['split']} against {described['split']}"
    spectra = {"samples": spectrum_rows(samples.values), "images": spectrum_rows(of_images)}
    row = {
        "metric": VALUES,
        "name": VALUES_NAME,
        "value": finite_or_none(value_distance(drawn, real, scale)),
        "standard_error": None,
        "num_compared": [len(drawn), len(real)],
        "real_vs_real": {
            "value": finite_or_none(value_distance(one_side, other_side, scale)),
            "standard_error": None,
            "num_compared": [len(one_side), len(other_side)],
            "of": compared,
        },
        "reference": described,
        "sampling": sampling,
        "spectra": spectra,
        "remark": describe_spectra(spectra),
    }
    channels = value_range.display_channels or range(described["channels"])
    return [row], {"spectrum.png": partial(draw_spectra, row, channels)}


def measure_copies(
    job: Job, samples: Samples, sampling: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Draw]]:
    """Measure memorization in pixels and in features; the picture shows the pairs that are nearest in features."""
    training, held_out, comparison = job.training, job.held_out, job.comparison
    assert training is not None
    assert held_out is not None
    assert comparison is not None
    training_pixels, held_out_pixels = (
        clipped(fixed_pixels(each), job.pipeline.value_range) for each in (training, held_out)
    )
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
        "remark": _describe_copies(measured)
        + "; of each larger image one crop is compared" * (job.training.random_crop and not job.training.is_uniform),
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
