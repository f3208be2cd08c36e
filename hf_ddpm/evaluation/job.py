"""The job of an evaluation: all that is loaded and checked before its first sample.

request          what the user of `evaluate` asks for
job              what is ready to be measured
sampler setting  a scheduler and its number of steps; all settings of a grid sample the same seeds

Every mistake that a request can hold is reported here, before anything is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_ddpm.condition import is_conditional
from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import Pairs
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import listed_once
from hf_ddpm.evaluation.comparison import Comparison, check_requested_network, load_comparison
from hf_ddpm.evaluation.images import choose_labels, open_images, open_pairs, reference_labels
from hf_ddpm.evaluation.model_data import Splits
from hf_ddpm.evaluation.names import DISTANCES, FIDELITY, METRICS, OF_IMAGES_FROM_IMAGES, VALUES
from hf_ddpm.evaluation.perceptual import Perceptual, load_lpips
from hf_ddpm.evaluation.request import Request
from hf_ddpm.evaluation.results import stored_results
from hf_ddpm.evaluation.value_reference import (
    ValueReference,
    check_values_comparable,
    load_value_reference,
    require_enough_images,
)
from hf_ddpm.guidance import Guidance
from hf_ddpm.hub.card import check_readme, loadable_path
from hf_ddpm.hub.download import find_model, is_hub_id
from hf_ddpm.hub.readme import named_repository
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, require_writable_folder, weights_sha256
from hf_ddpm.runtime.processes import Processes, join_processes
from hf_ddpm.sampling.loading import choose_guidance, load_for_sampling
from hf_ddpm.sampling.sampler import forward_batch_of
from hf_ddpm.scheduler import DDPMScheduler, is_tuned
from hf_ddpm.solvers import check_tuning, choose_sampler, named_scheduler
from hf_ddpm.value_range import ValueRange


class SamplerSetting(NamedTuple):
    """A scheduler, its number of steps, and guidance; None for no guidance."""

    scheduler: str
    num_inference_steps: int
    guidance: Guidance | None


@dataclass(frozen=True, eq=False)
class Job:
    """A request with everything that is needed to measure it.

    Attributes:
        request: The request, with the batch size that is used.
        processes: The processes that share the work.
        out: The folder of the results; see `write_evaluation`.
        weights: The sha256 of the model's weights.
        repo_id: The name that the card gives the model; see `write_evaluation`.
        pipeline: The pipeline, in float32 and not compiled, as the likelihood needs it.
        full_chain_scheduler: The model's scheduler, of all T steps.
        sampler_settings: The grid.
        distances: The requested metrics among the keys of DISTANCES.
        comparison: None if no features are needed.
        class_labels: The label of each sample; None for a model without labels.
        class_choice: How these labels were chosen, in words.
        reference_labels: The class of each image whose features the reference keeps; None if nobody tells it.
        held_out: Images that were not trained on; None if they are not needed.
        training: Images that were trained on; None if they are not needed.
        value_images: Images whose values samples are compared with; None if they are not, or with a reference.
        value_reference: The reference of values that samples are compared with; None if there is none.
        other_value_reference: Another one, for what real images get; None: halves of the first.
        pairs: Images that were not trained on with their conditions, for a model that makes images from images.
        perceptual: LPIPS; None if it is not measured.
        data: The settings of these images; `random_flip` says whether mirrored images were trained on, too.
    """

    request: Request
    processes: Processes
    out: Path
    weights: str
    repo_id: str | None
    pipeline: DDPMPipeline
    full_chain_scheduler: DDPMScheduler
    sampler_settings: list[SamplerSetting]
    distances: list[str]
    comparison: Comparison | None
    class_labels: list[Any] | None
    class_choice: str | None
    reference_labels: np.ndarray | None
    held_out: ImageCache | None
    training: ImageCache | None
    value_images: ImageCache | None
    value_reference: ValueReference | None
    other_value_reference: ValueReference | None
    pairs: Pairs | None
    perceptual: Perceptual | None
    data: DataConfig


@contextmanager
def load_job(request: Request) -> Iterator[Job]:
    """Load and check everything that the request needs, for the duration of a `with` block.

    Raises:
        UsageError: When something cannot work.
    """
    with join_processes() as processes, listed_once():
        folder, repo_id = find_model(request.model)
        if request.out is None and repo_id is not None:
            raise UsageError(
                f"out must be a folder for what is measured, got none for {repo_id!r} of the Hub: give --out"
            )
        out = folder if request.out is None else look_at("out", request.out)
        is_model_folder = out.resolve() == folder.resolve()
        makes_from_images = is_conditional(folder)
        _check_metrics(request, makes_from_images)
        check_requested_network(request)
        value_references = _load_value_references(request)
        weights = weights_sha256(folder)
        processes.require_equal(weights, "weights")
        if weights is None:
            raise UsageError(f"model must hold the weights of its network, got {str(request.model)!r} without")
        _check_out(out, weights, is_model_folder)
        pipeline, _ = load_for_sampling(
            str(folder),
            "ddpm",
            device=request.device,
            uniform=request.uniform,
            guidance_model=request.guidance_model,
            makes_from_images=makes_from_images,
        )
        request = replace(request, batch_size=forward_batch_of(pipeline.device, request.batch_size))
        sampler_settings = _grid(pipeline, request)
        distances = [metric for metric in DISTANCES if metric in request.metrics]
        image_shape = pipeline._image_shape()
        value_range = pipeline.value_range
        perceptual = _load_perceptual(pipeline) if "lpips" in request.metrics else None
        _check_metrics_of_values(request, value_range)
        if "nll" in request.metrics and is_tuned(pipeline.scheduler.config):
            raise UsageError(
                "nll must be left out for a model that was tuned for few steps, whose chain of all timesteps was not "
                "tuned: measure the model that it began as"
            )
        condition = pipeline.condition if isinstance(pipeline, ConditionalDDPMPipeline) else None
        of_model = (pipeline.unet.config, image_shape[0], value_range, condition)
        with closing(Splits(processes, request.data, folder, *of_model)) as splits:
            value_images = None
            if isinstance(pipeline, ConditionalDDPMPipeline):
                class_labels, class_choice = None, None if pipeline.labels is None else "of the images"
                held_out, pairs = open_pairs(request, pipeline, splits)
                training = None
                comparison = load_comparison(request, distances, processes, pipeline, splits, len(pairs.images))
            else:
                pairs = None
                comparison = load_comparison(request, distances, processes, pipeline, splits, request.num_images)
                class_labels, class_choice = choose_labels(pipeline, splits, request)
                held_out, training = open_images(request, pipeline, splits)
                if VALUES in request.metrics:
                    require_enough_images("num_images", request.num_images, image_shape[0], splits.size)
                for each in value_references:
                    check_values_comparable(each, value_range, image_shape[0], splits.size)
                    require_enough_images("the reference", each.count, image_shape[0], splits.size)
                if VALUES in request.metrics and not value_references:
                    value_images = splits.open(request.split)
                    settings = image_shape[0], splits.size, value_images.random_crop
                    require_enough_images("the split", len(value_images), *settings)
            yield Job(
                request=request,
                processes=processes,
                out=out,
                weights=weights,
                repo_id=repo_id or (None if is_model_folder else _name_on_card(out, folder)),
                pipeline=pipeline,
                full_chain_scheduler=pipeline.scheduler,
                sampler_settings=sampler_settings,
                distances=distances,
                comparison=comparison,
                class_labels=class_labels,
                class_choice=class_choice,
                reference_labels=reference_labels(request, comparison, splits, class_labels is not None),
                held_out=held_out,
                training=training,
                value_images=value_images,
                value_reference=value_references[0] if value_references else None,
                other_value_reference=value_references[1] if len(value_references) > 1 else None,
                pairs=pairs,
                perceptual=perceptual,
                data=splits.data or DataConfig(),
            )


def _check_metrics(request: Request, makes_from_images: bool) -> None:
    """Check that the metrics are those of the model's kind.

    Raises:
        UsageError: When one is not.
    """
    others = {*METRICS} - {*OF_IMAGES_FROM_IMAGES} if makes_from_images else {*FIDELITY}
    if wrong := [metric for metric in request.metrics if metric in others]:
        kind = "from images" if makes_from_images else "from noise alone"
        raise UsageError(
            f"metrics must be of {', '.join(metric for metric in METRICS if metric not in others)} for a model that "
            f"makes images {kind}, got {', '.join(wrong)} for {str(request.model)!r}: give --metrics"
        )


def _check_metrics_of_values(request: Request, value_range: ValueRange | None) -> None:
    """Check that metrics can be measured of the values of a model.

    Raises:
        UsageError: When one cannot.
    """
    if "nll" in request.metrics and value_range is not None and not value_range.is_integer:
        raise UsageError(
            f"nll must be left out for a model of {value_range.dtype}: bits per dimension are a probability of whole "
            "numbers, and floats have none"
        )


def _load_value_references(request: Request) -> list[ValueReference]:
    """Return the references of values that were asked for; empty where values are compared with those of the data.

    Beside metrics of features, the references of a request are of features.
    """
    if VALUES not in request.metrics or {*DISTANCES, "memorization"} & {*request.metrics}:
        return []
    paths = (request.reference, request.other_reference)
    references = [load_value_reference(path) for path in paths if path is not None]
    if len({each.metadata["data"]["fingerprint"] for each in references}) < len(references):
        raise UsageError("the references must be of different images, got the same twice: give another split")
    return references


def _load_perceptual(pipeline: DDPMPipeline) -> Perceptual:
    """Load LPIPS for what pictures show of a model's images."""
    channels, height, width = pipeline._image_shape()
    if pipeline.value_range is not None and pipeline.value_range.display_channels is not None:
        channels = len(pipeline.value_range.display_channels)
    return load_lpips(channels, height, width, pipeline.device)


def _name_on_card(out: Path, model_folder: Path) -> str:
    """Return the repository that the card in one of the folders loads, or else the path of the model's folder."""
    readmes = (folder / "README.md" for folder in (out, model_folder))
    names = (named_repository(readme.read_text(encoding="utf-8")) for readme in readmes if readme.is_file())
    return next((name for name in names if name and is_hub_id(name)), loadable_path(model_folder))


def _check_out(out: Path, weights: str, is_model_folder: bool) -> None:
    """Check that results of these weights can be written to `out`."""
    require_writable_folder("out", out)
    check_readme(out)
    weights_in_out = weights_sha256(out)
    if weights_in_out not in (None, weights):
        raise UsageError(f"out must not hold another model, got {str(out)!r} with the weights {weights_in_out}")
    has_results = bool(stored_results(out, weights))
    if not is_model_folder and not has_results and (out / "evaluation.json").is_file():
        raise UsageError(f"out must not hold what was measured of other weights, got {str(out)!r}: name a new folder")


def _grid(pipeline: DDPMPipeline, request: Request) -> list[SamplerSetting]:
    """Return the settings of the grid, after checking that each of them can sample the model."""
    config = pipeline.scheduler.config
    settings = []
    guidances = _guidances(pipeline, request)
    for scheduler in request.schedulers or [None]:
        for number in request.num_inference_steps or [None]:
            kept, searched = pipeline.kept_sampler, pipeline.searched_timesteps
            name, steps, *_ = choose_sampler(config, scheduler, number, kept, searched)
            check_tuning(name, config)
            named_scheduler(name, config, steps).set_timesteps(steps)
            settings += [SamplerSetting(name, steps, guidance) for guidance in guidances]
    return list(dict.fromkeys(settings))


def _guidances(pipeline: DDPMPipeline, request: Request) -> list[Guidance | None]:
    """Return the guidance of each scale; a scale of 1 is a setting without guidance, beside others with it.

    Raises:
        ValueError: When guidance cannot work, or a setting of it has no effect.
    """
    if 1 in request.guidance_scales and len(request.guidance_scales) > 1:
        others = tuple(scale for scale in request.guidance_scales if scale != 1)
        return [None, *_guidances(pipeline, replace(request, guidance_scales=others))]
    details = request.guidance_interval, request.guidance_method, request.autoguidance_scale, request.guidance_model
    return [choose_guidance(pipeline, scale, *details) for scale in request.guidance_scales or [None]]
