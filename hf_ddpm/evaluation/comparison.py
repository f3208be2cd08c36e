"""The features that samples are compared with.

real vs. real   what real images get in the place of samples: the images of another split, or one half of the
                reference against the other half
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.evaluation.array_features import for_arrays
from hf_ddpm.evaluation.features import FeatureNetwork, check_network, load_network
from hf_ddpm.evaluation.measure import NEIGHBORS, Measured, first_images, measure_distances
from hf_ddpm.evaluation.model_data import Splits
from hf_ddpm.evaluation.names import DISTANCES
from hf_ddpm.evaluation.request import Request
from hf_ddpm.evaluation.statistics import Reference, check_comparable, frechet_warnings, load_reference, real_vs_real
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.value_range import require_seen


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


def load_comparison(
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
        check_comparable(reference, network, splits.size, channels)
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


def check_requested_network(request: Request) -> None:
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
