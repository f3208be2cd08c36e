"""The commands that measure a model, images or a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ddpm.commands.options import (
    AutoguidanceScale,
    BatchSize,
    Compile,
    Data,
    Device,
    Dtype,
    GuidanceInterval,
    GuidanceMethod,
    GuidanceModel,
    Json,
    Model,
    Network,
    NetworkPath,
    Seed,
    Uniform,
    data_config,
)
from hf_ddpm.commands.results import describe_evaluation, describe_search, table_of_auroc
from hf_ddpm.data.config import DataConfig
from hf_ddpm.evaluation.names import DEFAULT_NUM_RECONSTRUCTIONS, DEFAULT_STRENGTHS, METRICS, check_strengths
from hf_ddpm.image_size import format_size, to_size
from hf_ddpm.names import SCHEDULERS
from hf_ddpm.runtime.command_line import (
    choice,
    finish,
    join_launcher,
    option,
    report_errors,
    say,
    say_loading,
    split_commas,
    split_decimals,
    split_numbers,
    with_options_of,
)
from hf_ddpm.runtime.errors import RunError, UnwrittenError, UsageError
from hf_ddpm.runtime.loading import without_garbage_collection

Metrics = Annotated[
    str,
    choice(
        "metrics",
        "Comma-separated: fd (of Inception: the FID), kid, precision (with recall, density, coverage), cmmd, "
        "nll (bits per dimension), memorization, values (moments and spectra, without a network). Of a model that "
        "makes images from images: psnr, ssim, lpips, and these distances.",
        METRICS,
        is_list=True,
    ),
]
TimestepsPerImage = Annotated[
    int | None, option("timesteps_per_image", "Terms of nll for each image. Default: 20, or all T.", min=2)
]


@with_options_of(
    DataConfig,
    (
        *("dataset_name", "dataset_config_name", "image_column", "label_column", "condition_column", "center_crop"),
        *("random_crop", "value_range", "channel_axis", "stack_axis", "array_key", "max_image_pixels", "cache_dir"),
    ),
)
def evaluate(
    model: Model,
    metrics: Metrics = "fd,kid,precision",
    reference: Annotated[
        str | None, option("reference", "A folder of `hf-ddpm reference`. Default: a cached one.")
    ] = None,
    other_reference: Annotated[
        str | None, option("other_reference", "Another one, for what real images get. Default: halves.")
    ] = None,
    split: Annotated[str, option("split", "The split of the reference and of training.")] = "train",
    test_split: Annotated[str, option("test_split", "Images that were not trained on.")] = "test",
    num_images: Annotated[int, option("num_images", "How many images to sample.", min=1)] = 5000,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        str | None, option("num_inference_steps", "See `sample`; several are separated by commas.")
    ] = None,
    scheduler: Annotated[
        str | None, choice("scheduler", "See `sample`; several are separated by commas.", SCHEDULERS, is_list=True)
    ] = None,
    guidance_scale: Annotated[
        str | None, option("guidance_scale", "See `sample`; several, of which 1 is none, are separated by commas.")
    ] = None,
    guidance_interval: GuidanceInterval = None,
    guidance_method: GuidanceMethod = None,
    autoguidance_scale: AutoguidanceScale = None,
    guidance_model: GuidanceModel = None,
    network: Network = None,
    network_path: NetworkPath = None,
    timesteps_per_image: TimestepsPerImage = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    uniform: Uniform = False,
    out: Annotated[str | None, option("out", "Where to write. Default: the model's folder.")] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Measure a model and write it on its card.

    The data are those that the run in the model's folder learned from, unless --dataset_name names others. In several
    processes: accelerate launch -m hf_ddpm evaluate
    """
    with report_errors():
        steps = split_numbers("num_inference_steps", num_inference_steps)
        scales = split_decimals("guidance_scale", guidance_scale)
        data = _data_of_evaluation(flags)
        join_launcher()
        with without_garbage_collection():
            from hf_ddpm.evaluation.evaluate import evaluate

        result, failure = _despite_the_disk(
            evaluate,
            model,
            metrics=split_commas(metrics),
            reference=reference,
            other_reference=other_reference,
            data=data,
            split=split,
            test_split=test_split,
            num_images=num_images,
            seed=seed,
            num_inference_steps=steps,
            schedulers=split_commas(scheduler),
            guidance_scales=scales,
            guidance_interval=guidance_interval,
            guidance_method=guidance_method,
            autoguidance_scale=autoguidance_scale,
            guidance_model=guidance_model,
            network=network,
            network_path=network_path,
            timesteps_per_image=timesteps_per_image,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
            uniform=uniform,
            out=out,
        )
    finish(json, result, *describe_evaluation(result, is_written=failure is None))
    if failure:
        raise failure


@with_options_of(
    DataConfig,
    (
        *("dataset_config_name", "image_column", "label_column", "channels", "value_range", "max_image_pixels"),
        *("channel_axis", "stack_axis", "array_key", "cache_dir"),
    ),
)
def anomaly(
    model: Model,
    data: Data,
    out: Annotated[Path, option("out", "A new folder for scores.csv, anomaly.json, maps and grid.png.")],
    split: Annotated[str, option("split", "train, test, ...")] = "train",
    normal: Annotated[
        str | None,
        option("normal", "The normal classes, by name or number, with --label_column: the AUROC is computed."),
    ] = None,
    strength: Annotated[
        str, option("strength", "Shares of the steps by which images are noised and denoised; separated by commas.")
    ] = ",".join(map(str, DEFAULT_STRENGTHS)),
    num_reconstructions: Annotated[
        int, option("num_reconstructions", "Of each image by each strength, from different noise.", min=1)
    ] = DEFAULT_NUM_RECONSTRUCTIONS,
    num_maps: Annotated[int, option("num_maps", "How many maps to write, those of the highest scores.", min=0)] = 64,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        int | None, option("num_inference_steps", "The steps of strength 1. Default: see `sample`.", min=1)
    ] = None,
    scheduler: Annotated[str | None, choice("scheduler", "See `sample`.", SCHEDULERS)] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    json: Json = False,
    **flags: Any,
) -> None:
    """Find images that are unlike those that a model learned.

    Each image is noised and denoised; where the model makes something else of it, its map is bright, and its score is
    high. In several processes: accelerate launch -m hf_ddpm anomaly
    """
    with report_errors():
        strengths = split_decimals("strength", strength)
        check_strengths(strengths)
        config = data_config({**flags, "dataset_name": data})
        join_launcher()
        with without_garbage_collection():
            from hf_ddpm.evaluation.detection import find_anomalies

        result = find_anomalies(
            model,
            config,
            out,
            split=split,
            normal=split_commas(normal),
            strengths=strengths,
            num_reconstructions=num_reconstructions,
            num_maps=num_maps,
            seed=seed,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
        )
    num_images = result["data"]["num_images"]
    maps = f", the maps of the highest {min(num_maps, num_images):,} in {out / 'maps'}" if num_maps else ""
    ending = (
        f"The scores of {num_images:,} images are in {out / 'scores.csv'}{maps}; {out / 'grid.png'} shows the first."
    )
    if (unit := result.get("unit")) is not None:
        ending += f" Scores and maps are in {unit}; the values of the maps are in .npy files."
    hint = "Name the normal classes to measure how well scores tell: --label_column label --normal CLASS"
    finish(json, {"out": str(out), **result}, *(table_of_auroc(result) or [hint]), ending)


@with_options_of(
    DataConfig,
    (
        *("dataset_config_name", "image_column", "resolution", "channels", "center_crop", "random_crop"),
        *("value_range", "preserve_input_precision", "max_image_pixels", "cache_dir"),
    ),
)
def reference(
    dataset: Data,
    out: Annotated[Path, option("out", "A new folder for the statistics.")],
    split: Annotated[str, option("split", "train, test, ...")] = "train",
    network: Network = None,
    network_path: NetworkPath = None,
    num_features: Annotated[int, option("num_features", "Images whose features are kept.", min=4)] = 10_000,
    batch_size: Annotated[int, option("batch_size", "Images per step.", min=1)] = 64,
    device: Annotated[str, option("device", "cpu, cuda, ...")] = "cpu",
    json: Json = False,
    **flags: Any,
) -> None:
    """Measure a data set to compare samples with."""
    with report_errors():
        config = data_config({**flags, "dataset_name": dataset})
        say_loading()
        with without_garbage_collection():
            from hf_ddpm.evaluation.value_reference import ValueReference, make_reference_of_data

        made = make_reference_of_data(
            config,
            split,
            out,
            network=network,
            network_path=network_path,
            device=device,
            num_features=num_features,
            batch_size=batch_size,
        )
    data = made.metadata["data"]
    for warning in made.metadata["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    finish(
        json,
        {"out": str(out), "num_images": made.count, "metric": made.metric, **made.metadata},
        f"{out} holds the statistics of {made.count:,} images of {data['name']}, split {split}, "
        f"{format_size(to_size(data['resolution']))}, {data['channels']} channels; {made.metric}, "
        f"{made.dimensions:,} dimensions. Compare a model with them: hf-ddpm evaluate MODEL --reference {out}"
        + " --metrics values"
        * isinstance(made, ValueReference),
    )


def schedule(
    model: Model,
    steps: Annotated[str, option("steps", "Comma-separated numbers of steps.")] = "5,8,10",
    scheduler: Annotated[
        str, option("scheduler", "The solvers: unipc, dpmsolver++, ddim; several are separated by commas.")
    ] = "unipc,dpmsolver++",
    num_images: Annotated[int, option("num_images", "Noises to search on, and to measure on.", min=1)] = 32,
    seed: Seed = 0,
    batch_size: Annotated[int, option("batch_size", "Images per forward pass.", min=1)] = 32,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    json: Json = False,
) -> None:
    """Search timesteps for sampling in few steps.

    Those whose images come nearest to the images of many steps are kept with the model, and the better solver becomes
    its default for so many steps.
    """
    results: list[dict[str, Any]] = []
    failure = None
    with report_errors():
        numbers = split_numbers("steps", steps)
        if not numbers:
            raise UsageError(f"steps must be whole numbers, got {steps!r}")
        if min(numbers) < 2:
            raise UsageError(f"steps must be at least 2, got {min(numbers)}")
        from dataclasses import asdict

        from hf_ddpm.timesteps import check_search

        check_search(numbers, split_commas(scheduler))
        # torch is loaded here, so that a wrong number is answered before.
        say_loading()
        with without_garbage_collection():
            from hf_ddpm.evaluation.search import search_and_keep

        found = search_and_keep(
            model,
            numbers,
            schedulers=split_commas(scheduler),
            num_images=num_images,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
        )
        try:
            for searched, path in found:
                results.append({**asdict(searched), "path": path and str(path)})
                if not json:
                    say(*describe_search(searched, path))
        except RunError as error:
            failure = error
    kept = sum(result["path"] is not None for result in results)
    ending = (
        f"{kept} of {len(results)} schedules are kept with the model; `hf-ddpm sample` uses the best at so many steps."
    )
    finish(json, {"results": results}, ending)
    if failure:
        raise failure


def _data_of_evaluation(flags: Mapping[str, Any]) -> DataConfig | None:
    """Return the settings of data that flags give; None if they give none, which means those of the run."""
    if flags and "dataset_name" not in flags:
        raise UsageError(f"{min(flags)} needs --dataset_name, got none: the settings of data go together")
    return data_config(flags) if flags else None


def _despite_the_disk(measure: Callable[..., dict[str, Any]], *arguments: Any, **settings: Any) -> Any:
    """Return what was measured, and the error that kept it from being written if there was one."""
    try:
        return measure(*arguments, **settings), None
    except UnwrittenError as error:
        return error.result, error
