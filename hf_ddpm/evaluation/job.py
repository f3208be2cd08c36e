"""Everything that is loaded and checked before the first sample of an evaluation.

request          what the user of `evaluate` asks for
job              what is ready to be measured
sampler setting  a scheduler and its number of steps; all settings of a grid sample the same seeds
real vs. real    what real images get in the place of samples: the images of another split, or one half of the
                 reference against the other half

Every mistake that a request can hold is reported here, before anything is sampled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_ddpm.classes import Classes
from hf_ddpm.condition import is_conditional
from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.data.batches import center_pixels, epoch_order
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import Pairs, example_pairs
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import listed_once
from hf_ddpm.data.labels import label_list, with_network_labels
from hf_ddpm.evaluation.array_features import for_arrays
from hf_ddpm.evaluation.features import FeatureNetwork, check_network, load_network
from hf_ddpm.evaluation.likelihood import inclusion_probabilities
from hf_ddpm.evaluation.measure import NEIGHBORS, Measured, first_images, measure_distances
from hf_ddpm.evaluation.memorization import MIN_SAMPLES
from hf_ddpm.evaluation.model_data import DEFAULT_TEST_SPLIT, Splits
from hf_ddpm.evaluation.names import DISTANCES, FIDELITY, METRICS, OF_IMAGES_FROM_IMAGES, VALUES
from hf_ddpm.evaluation.perceptual import Perceptual, load_lpips
from hf_ddpm.evaluation.results import stored_results
from hf_ddpm.evaluation.statistics import Reference, check_comparable, frechet_warnings, load_reference, real_vs_real
from hf_ddpm.evaluation.value_statistics import num_components
from hf_ddpm.guidance import Guidance
from hf_ddpm.hub.card import check_readme, loadable_path
from hf_ddpm.hub.download import find_model, is_hub_id
from hf_ddpm.hub.readme import named_repository
from hf_ddpm.names import DTYPES, SCHEDULERS
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, require_writable_folder, weights_sha256
from hf_ddpm.runtime.processes import Processes, join_processes
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.runtime.settings import check_values, require_choice, with_plain_paths
from hf_ddpm.sampling.sampler import (
    check_guidance,
    choose_guidance,
    forward_batch_of,
    labels_in_turn,
    load_for_sampling,
)
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.solvers import choose_sampler, named_scheduler
from hf_ddpm.value_range import ValueRange, require_seen

MEMORIZATION_QUANTILE = 0.01


@dataclass(frozen=True, kw_only=True)
class Request:
    """The model that `evaluate` measures, and how it does so.

    Attributes:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a Hub id.
        metrics: Some of fd (Fréchet distance), kid, precision (with recall, density and coverage), cmmd, nll (bits per
            dimension), memorization and values (moments and spectra). For a model that makes images from images: some
            of psnr, ssim, lpips and the distances, of samples that are made from the conditions of `test_split`.
        reference: A folder of `hf-ddpm reference`. None: it is made of `data`, and kept in the cache of the data; of
            `split`, or of `test_split`, which is the truth, for a model that makes images from images.
        other_reference: A second reference, of other images: what real images get is measured with both. None: with
            halves of `reference`. It needs `reference`.
        data: The settings of the data. None: those of the run in the model's folder. nll and memorization need data,
            and so do distances without `reference`.
        split: The split of the reference, and of training.
        test_split: The split of images that were not trained on.
        num_images: The number of samples, from the seeds `seed`, `seed` + 1, ...; nll takes at most as many images of
            the test split.
        seed: The first seed.
        num_inference_steps: The numbers of steps of a grid. Empty: the default of `sample`.
        schedulers: The schedulers of a grid. Empty: the default of `sample`.
        guidance_scales: The scales of guidance of a grid, 1 for none. Empty: the default of `sample`.
        guidance_interval: Where guidance acts, see `sample`.
        guidance_method: How it guides, see `sample`.
        guidance_model: The weaker model, see `sample`.
        network: The feature network: `inception`, `dinov2`, `clip` or `efficientnet-lite0`. None: that of the
            reference, or inception.
        network_path: The file of the feature network; of `dinov2` and `clip` a folder or a Hub id. None: the
            published weights.
        timesteps_per_image: K of nll, the number of terms of the bound for each image. None: 20, or all T of a model
            that has fewer.
        batch_size: Images per network evaluation; on a CPU always 16. Elsewhere it changes rounding.
        device: A device of torch. None: the best one of this process.
        dtype: The type that the network computes in when it samples, fp32 or bf16; nll is always one of float32.
        compile: Whether the network is compiled when it samples.
        uniform: Whether to ignore timesteps that were searched for.
        out: The folder to write to. None: the model's folder; a Hub id needs another one.

    Raises:
        UsageError: When a value cannot work. This is found out before a file is read.
    """

    model: str | Path
    metrics: Sequence[str] = ("fd", "kid", "precision")
    reference: str | Path | None = None
    other_reference: str | Path | None = None
    data: DataConfig | None = None
    split: str = "train"
    test_split: str = DEFAULT_TEST_SPLIT
    num_images: int = 5000
    seed: int = 0
    num_inference_steps: Sequence[int] = ()
    schedulers: Sequence[str] = ()
    guidance_scales: Sequence[float] = ()
    guidance_interval: Sequence[float] | None = None
    guidance_method: str | None = None
    guidance_model: str | None = None
    network: str | None = None
    network_path: str | Path | None = None
    timesteps_per_image: int | None = None
    batch_size: int = 64
    device: str | None = None
    dtype: str = "fp32"
    compile: bool = False
    uniform: bool = False
    out: str | Path | None = None

    def __post_init__(self) -> None:
        if not self.metrics or set(self.metrics) - set(METRICS):
            raise UsageError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(self.metrics) or 'none'}")
        if {*FIDELITY} & {*self.metrics} and not {*OF_IMAGES_FROM_IMAGES} >= {*self.metrics}:
            raise UsageError(
                f"metrics must be of {', '.join(OF_IMAGES_FROM_IMAGES)} with {' or '.join(FIDELITY)}, got "
                f"{', '.join(self.metrics)}: leave the others out"
            )
        for scheduler in self.schedulers:
            require_choice("scheduler", scheduler, SCHEDULERS)
        require_choice("dtype", self.dtype, DTYPES)
        for name, least in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_seeds(self.seed, self.num_images)
        check_guidance(self.guidance_scales or [None], self.guidance_interval, self.guidance_method)
        self._check_guidance_takes_effect()
        if self.data is not None:
            object.__setattr__(self, "data", with_plain_paths(self.data, DataConfig))
            check_values(self.data)
        if self.other_reference is not None and self.reference is None:
            raise UsageError(
                f"other_reference goes with a reference, got {str(self.other_reference)!r} alone: "
                "give --reference, too"
            )

    def _check_guidance_takes_effect(self) -> None:
        """Check that guidance is asked for only where something is sampled."""
        given = {
            "guidance_scale": [scale for scale in self.guidance_scales if scale != 1] or None,
            "guidance_interval": self.guidance_interval,
            "guidance_method": self.guidance_method,
            "guidance_model": self.guidance_model,
        }
        for name, value in given.items():
            if value is not None and {*self.metrics} == {"nll"}:
                shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
                raise UsageError(
                    f"{name} has no effect on nll, which is of the model without guidance, got {shown}: leave it out, "
                    "or measure distances"
                )


class SamplerSetting(NamedTuple):
    """A scheduler, its number of steps, and guidance; None for no guidance."""

    scheduler: str
    num_inference_steps: int
    guidance: Guidance | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """The features that samples are compared with.

    Attributes:
        network: The feature network.
        reference: The reference; None if no distance is measured.
        real_vs_real: What real images get in each metric.
        compared: Which real images were compared, in words.
    """

    network: FeatureNetwork
    reference: Reference | None = None
    real_vs_real: dict[str, Measured] = field(default_factory=dict)
    compared: str = ""


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
        value_images: Images whose values samples are compared with; None if they are not.
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
        _check_network(request)
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
        perceptual = load_lpips(*image_shape, pipeline.device) if "lpips" in request.metrics else None
        value_range = pipeline.value_range
        _check_metrics_of_values(request, value_range)
        of_model = (pipeline.unet.config, image_shape[0], value_range)
        with closing(Splits(processes, request.data, folder, *of_model)) as splits:
            value_images = None
            if isinstance(pipeline, ConditionalDDPMPipeline):
                class_labels, class_choice = None, None if pipeline.labels is None else "of the images"
                held_out, pairs = _open_pairs(request, pipeline, splits)
                training = None
                comparison = _load_comparison(request, distances, processes, pipeline, splits, len(pairs.images))
            else:
                pairs = None
                comparison = _load_comparison(request, distances, processes, pipeline, splits, request.num_images)
                class_labels, class_choice = _choose_labels(pipeline, splits, request)
                held_out, training = _open_images(request, pipeline, splits)
                if VALUES in request.metrics:
                    value_images = splits.open(request.split)
                    _check_values(value_images, request.num_images)
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
                reference_labels=_reference_labels(request, comparison, splits, class_labels is not None),
                held_out=held_out,
                training=training,
                value_images=value_images,
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


def _check_values(images: ImageCache, num_images: int) -> None:
    """Check that there are more images, and more samples, than components of their statistics."""
    least = num_components(images.channels, images.resolution, images.resolution) + 1
    for name, count in (("num_images", num_images), ("the split", len(images))):
        if count < least:
            raise UsageError(
                f"{name} must be at least {least} for values, got {count:,}: a covariance of {least - 1} statistics "
                "needs more images"
            )


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
    details = request.guidance_interval, request.guidance_method, request.guidance_model
    return [choose_guidance(pipeline, scale, *details) for scale in request.guidance_scales or [None]]


def _load_comparison(
    request: Request,
    distances: list[str],
    processes: Processes,
    pipeline: DDPMPipeline,
    splits: Splits,
    num_images: int,
) -> Comparison | None:
    """Load the feature network and the reference, and measure what `num_images` real images get."""
    if not distances and "memorization" not in request.metrics:
        return None
    channels = pipeline._image_shape()[0]
    split, other_split = request.split, request.test_split
    if isinstance(pipeline, ConditionalDDPMPipeline):  # which is compared with the truth
        split, other_split = other_split, split
    reference = None if request.reference is None else load_reference(request.reference)
    if pipeline.value_range is not None:
        require_seen(pipeline.value_range, channels)
    elif channels not in (1, 3):
        raise UsageError(f"feature networks take 1 or 3 channels, got a model of {channels}: only nll can be measured")
    # MPS has no float64, and what it computes is not reproducible.
    device = "cpu" if pipeline.device.type == "mps" else pipeline.device
    network = load_network(_network_name(request, reference), request.network_path, device)
    if pipeline.value_range is not None:
        network = for_arrays(network, pipeline.value_range, channels)
    if not distances:
        return Comparison(network)
    # The features of all images of a split take minutes: counts are compared before.
    _check_count("num_images", num_images, distances, network)
    if reference is not None:
        check_comparable(reference, network, splits.resolution, channels)
        other_reference = None if request.other_reference is None else load_reference(request.other_reference)
        _check_count("the reference", reference.count, distances, network)
        _check_count("the reference's features", len(reference.features), [*{*distances} - {"fd"}], network)
    else:
        _check_count("the reference", len(splits.open(split)), distances, network)
        reference, other_reference = splits.references(network, split, other_split)
    compared = f"halves of {reference.metadata['data']['split']}"
    if other_reference is not None:
        compared = f"{other_reference.metadata['data']['split']} against {reference.metadata['data']['split']}"
    real, other_real = real_vs_real(reference, other_reference)
    measured = processes.on_main(lambda: measure_distances(first_images(other_real, num_images), real, distances))
    return Comparison(network, reference, measured, compared)


def _network_name(request: Request, reference: Reference | None) -> str:
    return request.network or (reference.metadata["network"]["network"] if reference else "inception")


def _check_network(request: Request) -> None:
    """Look for the feature network, if one is needed, before the model is loaded."""
    if not {*DISTANCES, "memorization"} & {*request.metrics}:
        return
    reference = None if request.reference is None else load_reference(request.reference)
    name = _network_name(request, reference)
    if "cmmd" in request.metrics and name != "clip":
        raise UsageError(f"cmmd is of CLIP's embeddings, got the network {name!r}: --network clip")
    check_network(name, request.network_path)


def _check_count(name: str, count: int, metrics: Sequence[str], network: FeatureNetwork) -> None:
    """Check that so many images are enough for each metric."""
    if "fd" in metrics:
        for warning in frechet_warnings(count, network):
            raise UsageError(f"{name} must be more for fd, got {count:,}: {warning}")
    least = max(({"fd": 2, "kid": 4, "cmmd": 4, "precision": NEIGHBORS + 1}[each] for each in metrics), default=0)
    if count < least:
        raise UsageError(f"{name} must be at least {least} for {', '.join(metrics)}, got {count}")


def _choose_labels(pipeline: DDPMPipeline, splits: Splits, request: Request) -> tuple[list[Any] | None, str | None]:
    """Choose a label for each sample of a model with labels: those of the data in a random order, or each in turn.

    Returns:
        The labels as the pipeline takes them, and in words how they were chosen; None and None for a model without.
    """
    labels, num_images, split = pipeline.labels, request.num_images, request.split
    if labels is not None and not isinstance(labels, Classes):
        if not splits.has_labels:
            return labels_in_turn(labels, range(request.seed, request.seed + num_images)), "each in turn"
        images = with_network_labels(splits.open(split, is_labeled=True), labels)
        order = np.resize(epoch_order(0, 0, len(images)), num_images)
        return label_list(images, order), f"as in {split}"
    classes = labels
    if classes is None:
        if (kind := pipeline.unet.config.get("class_embed_type")) is not None:
            raise UsageError(f"classes must be numbers for this, got a model with embeddings {kind!r}")
        return None, None
    num_classes = len(classes)
    if not splits.has_labels:
        if num_images < num_classes:
            raise UsageError(f"num_images must be at least {num_classes}, as many as classes, got {num_images}")
        return labels_in_turn(classes, range(request.seed, request.seed + num_images)), "each in turn"
    images = splits.open(split, is_labeled=True)
    assert images.labels is not None
    if images.num_classes != num_classes:
        raise UsageError(f"the data must have the model's {num_classes} classes, got {images.num_classes} in {split}")
    names = tuple(images.class_names or classes.names)
    if classes.is_named and names != classes.names:
        raise UsageError(f"the data must have the model's classes, {classes.names}, in this order, got {names}")
    counts = np.bincount(images.labels, minlength=num_classes)
    if not counts.all():
        name = names[int(counts.argmin())]
        raise UsageError(f"each class must have images in {split}, got none of {name!r}")
    order = epoch_order(0, 0, len(images))
    return images.labels[np.resize(order, num_images)].tolist(), f"as in {split}"


def _reference_labels(
    request: Request, comparison: Comparison | None, splits: Splits, has_classes: bool
) -> np.ndarray | None:
    """Return the class of each image whose features the reference keeps, if it was made of the model's own data."""
    has_labels = has_classes and request.reference is None and splits.has_labels
    if not has_labels or comparison is None or comparison.reference is None:
        return None
    labels = splits.open(request.split, is_labeled=True).labels
    assert labels is not None
    return labels[epoch_order(0, 0, len(labels))][: len(comparison.reference.features)]


def num_terms(request: Request, scheduler: DDPMScheduler) -> int:
    """Return K, the number of terms of the bound for each image."""
    given = request.timesteps_per_image
    return min(20, len(scheduler)) if given is None else given


def _open_images(
    request: Request, pipeline: DDPMPipeline, splits: Splits
) -> tuple[ImageCache | None, ImageCache | None]:
    """Return the held-out images and those of training, as far as nll and memorization need them."""
    held_out = training = None
    scheduler, has_classes = pipeline.scheduler, pipeline.labels is not None
    if "nll" in request.metrics:
        inclusion_probabilities(scheduler, num_terms(request, scheduler))
        held_out = splits.open(request.test_split, "test_split", is_labeled=has_classes)
        if has_classes and held_out.labels is None:
            raise UsageError("label_column must name the labels for the nll of a model of labels: --label_column")
        if len(held_out) < 2 or request.num_images < 2:
            raise UsageError(f"nll needs 2 images or more, got {min(len(held_out), request.num_images)}")
        if held_out.labels is not None and pipeline.classes is not None:
            _check_class_names(held_out, splits.open(request.split, is_labeled=True), request)
        held_out = with_network_labels(held_out, pipeline.labels)
    if "memorization" in request.metrics:
        training = splits.open(request.split)
        held_out = held_out or splits.open(request.test_split, "test_split")
        _check_memorization(training, held_out, request.num_images)
    return held_out, training


def _open_pairs(request: Request, pipeline: ConditionalDDPMPipeline, splits: Splits) -> tuple[ImageCache, Pairs]:
    """Return the held-out images, and as many of them as are asked for with their conditions."""
    has_classes = pipeline.labels is not None
    images = splits.open(request.test_split, "test_split", is_labeled=has_classes)
    if has_classes and images.labels is None:
        raise UsageError("label_column must name the labels for a model of labels: --label_column")
    images = with_network_labels(images, pipeline.labels)
    condition = pipeline.condition
    if condition.super_resolution is None and images.conditions is None:
        raise UsageError("condition_column must name the images that the model makes images from: --condition_column")
    pairs = example_pairs(condition, images, request.num_images)
    if pairs.conditions.shape[1] != condition.channels:
        raise UsageError(
            f"conditions must have the channels that the model takes, {condition.channels}, got "
            f"{pairs.conditions.shape[1]} in {request.test_split}"
        )
    return images, pairs


def _check_class_names(held_out: ImageCache, training: ImageCache, request: Request) -> None:
    """Check that the classes of the test split are those of training."""
    if held_out.class_names != training.class_names or held_out.num_classes != training.num_classes:
        raise UsageError(
            f"the classes of {request.test_split} must be those of {request.split}, got {held_out.class_names} and "
            f"{training.class_names}"
        )


def _check_memorization(training: ImageCache, held_out: ImageCache, num_images: int) -> None:
    """Check what `memorization` would refuse only after sampling."""
    least_held_out = math.ceil(1 / MEMORIZATION_QUANTILE) - 1
    if num_images < MIN_SAMPLES:
        raise UsageError(f"num_images must be at least {MIN_SAMPLES} for memorization, got {num_images}")
    if len(held_out) < least_held_out:
        raise UsageError(f"memorization needs at least {least_held_out} held-out images, got {len(held_out)}")
    digests = {hashlib.sha256(image.tobytes()).digest() for image in center_pixels(training)}
    num_same = sum(hashlib.sha256(image.tobytes()).digest() in digests for image in center_pixels(held_out))
    if num_same >= math.floor(MEMORIZATION_QUANTILE * (len(held_out) + 1) + 1e-9):
        raise UsageError(
            f"held-out images must not be training images, got {num_same} of {len(held_out)} that are: remove them"
        )
