"""The metadata of a model card, by which the Hub finds the model and shows its results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_ddpm.hub.download import is_hub_id
from hf_ddpm.hub.readme import REFERENCE_KEY

# The licenses that data may have: https://huggingface.co/docs/hub/repositories-licenses. The Hub rejects other words.
LICENSE = re.compile(
    r"apache-2\.0|mit|isc|zlib|unlicense|bsd(-[23]-clause)?|[al]?gpl-3\.0|gpl-2\.0|mpl-2\.0|gfdl|c-uda|cc0-1\.0"
    r"|cc-by(-sa)?-[34]\.0|cc-by-2\.[05]|cc-by-nc(-sa)?-[234]\.0|cc-by-nd-4\.0|cc-by-nc-nd-[34]\.0|etalab-2\.0"
    r"|cdla-sharing-1\.0|cdla-permissive-[12]\.0|odc-by|odbl|pddl|openmdw-1\.0"
)
TASK, TASK_NAME = "unconditional-image-generation", "Unconditional Image Generation"
IMAGE_TASK, IMAGE_TASK_NAME = "image-to-image", "Image-to-Image"


def card_metadata(
    title: str,
    license: str | None,
    dataset: str | None,
    base_model: str | None,
    results: list[dict[str, Any]],
    makes_from_images: bool = False,
) -> ModelCardData:
    """Return the metadata of a model card.

    Args:
        title: The name under which the results stand.
        license: The license of the data. One that the Hub does not know is left out.
        dataset: The name of the data set. It is left out unless it is a Hub id.
        base_model: The Hub id of the model with whose weights the training began, if there was one.
        results: The results of evaluation.json.
        makes_from_images: Whether the model makes images from images.
    """
    task = IMAGE_TASK if makes_from_images else TASK
    license_id = str(license or "").lower().replace(" ", "-")
    model_results = eval_results(results, task)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=license_id if LICENSE.fullmatch(license_id) else None,
        datasets=[dataset] if dataset is not None and is_hub_id(dataset) else None,
        base_model=base_model,
        tags=["diffusers", "ddpm", "hf_ddpm", task],
        eval_results=model_results or None,
        model_name=title if model_results else None,
    )


def eval_results(results: list[dict[str, Any]], task: str = TASK) -> list[EvalResult]:
    """Return the finite results as the Hub's metadata hold them.

    Results of one data set and split stand together: otherwise they come back from a README in another order.
    """
    groups: dict[Any, list[EvalResult]] = {}
    for row in results:
        if row["value"] is None:
            continue
        reference = row["reference"]
        result = EvalResult(
            task_type=task,
            task_name=IMAGE_TASK_NAME if task == IMAGE_TASK else TASK_NAME,
            dataset_type=_dataset_type(reference["name"], reference["fingerprint"]),
            dataset_name=reference["name"],
            dataset_config=reference.get("config"),
            dataset_split=reference["split"],
            metric_type=row["metric"],
            metric_name=row["name"],
            metric_value=row["value"],
            metric_args={name: value for name, value in _metric_args(row).items() if value is not None},
            verified=False,
        )
        groups.setdefault(result.unique_identifier, []).append(result)
    return [result for group in groups.values() for result in group]


def _metric_args(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a result, in the order of the metadata; None for what does not apply to it."""
    network, sampling, likelihood, real = (
        row.get(name) or {} for name in ("network", "sampling", "likelihood", "real_vs_real")
    )
    return {
        "num_compared": row["num_compared"],
        "standard_error": row.get("standard_error"),
        "real_images": real.get("value"),
        REFERENCE_KEY: row["reference"]["fingerprint"],
        "network": network.get("network"),
        "network_sha256": network.get("weights_sha256"),
        **{name: sampling.get(name) for name in ("scheduler", "num_inference_steps", "timesteps", "dtype")},
        "neighbors": row.get("neighbors"),
        "timesteps_per_image": likelihood.get("timesteps_per_image"),
        "seed": (likelihood or sampling)["seed"],
    }


def _dataset_type(name: str, fingerprint: str) -> str:
    """Return the name of a data set in characters that the Hub accepts, different for different data."""
    if re.fullmatch(r"([\w-]+/)?[\w.-]+", name, re.ASCII):
        return name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") + f"-{fingerprint[:8]}"
