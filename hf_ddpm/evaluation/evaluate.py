"""`hf-ddpm evaluate`: measure a model, our own or any of diffusers' DDPMPipelines, and write the results down.

A result is a value with its standard error, beside what real images get, and with everything that determines both.
Each result is written as soon as it is measured: an error later on takes nothing back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_ddpm._version import __version__
from hf_ddpm.evaluation.command import command_of
from hf_ddpm.evaluation.job import Job, SamplerSetting, load_job
from hf_ddpm.evaluation.measure import Samples, sample_statistics
from hf_ddpm.evaluation.names import VALUES
from hf_ddpm.evaluation.request import Request
from hf_ddpm.evaluation.results import Draw, write_evaluation
from hf_ddpm.evaluation.rows import (
    describe_sampling,
    distance_rows,
    measure_copies,
    measure_nll,
    measure_values,
    rows_of_pairs,
)
from hf_ddpm.runtime.errors import UnwrittenError, UsageError, in_one_line
from hf_ddpm.sampling.loading import speed_up
from hf_ddpm.sampling.sampler import iter_samples
from hf_ddpm.solvers import named_scheduler

NUM_MEMORIZATION_SAMPLES = 1000


def evaluate(model: str | Path, **settings: Any) -> dict[str, Any]:
    """Measure a model and write evaluation.json, pictures and the card.

    Several processes, those of `accelerate launch`, torchrun or a running process group, share the work and get the
    same numbers; the main process writes.

    Args:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a Hub id.
        settings: The other attributes of `hf_ddpm.evaluation.request.Request` by name, such as `metrics`, `data`,
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
        metadata = {"command": command_of(job), "versions": versions}
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
        yield measure_nll(job)
    # Not earlier: the bound is that of the network in float32, as it was loaded.
    speed_up(job.pipeline, job.request.dtype, job.request.compile)
    if job.pairs is not None:
        for setting in job.sampler_settings:
            yield rows_of_pairs(job, job.pairs, setting), {}
        return
    measures_copies = "memorization" in job.request.metrics
    measures_values = VALUES in job.request.metrics
    is_grid = bool(job.distances) or measures_values
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
        sampling = describe_sampling(job, setting, num_images, samples)
        if job.distances:
            yield job.processes.on_main(partial(distance_rows, job, samples.statistics, sampling)), {}
        if measures_values:
            yield job.processes.on_main(partial(measure_values, job, samples, sampling))
        if num_images_to_keep:
            yield measure_copies(job, samples, sampling | {"num_images": num_images_to_keep})


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
        measures_values=VALUES in job.request.metrics,
        label=f"{setting.scheduler}, {steps} steps" + (f", {setting.guidance.scale:g}" if setting.guidance else ""),
    )


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
