"""The commands that make and edit images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ddpm.commands.options import (
    AutoguidanceScale,
    BatchSize,
    Compile,
    Device,
    Dtype,
    GuidanceInterval,
    GuidanceMethod,
    GuidanceModel,
    GuidanceScale,
    Json,
    Model,
    Seed,
    Uniform,
)
from hf_ddpm.names import ARRAY_FILE_FORMATS, FORMATS, SCHEDULERS
from hf_ddpm.runtime.command_line import choice, finish, join_launcher, option, report_errors, switch
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.loading import without_garbage_collection


def sample(
    model: Model,
    out: Annotated[Path, option("out", "The folder for images and grid.png; an interrupted set is continued.")],
    image: Annotated[
        Path | None,
        option(
            "image",
            "For a model that makes images from images: an image or an array, as in training, or a folder of "
            "them, one sample each.",
        ),
    ] = None,
    num_images: Annotated[int | None, option("num_images", "How many images. Default: 16.", min=1)] = None,
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            "--resolution",
            metavar="INTEGER [INTEGER]",
            help="The side of the images, or height and width. Default: that of training; others may look worse.",
        ),
    ] = None,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        int | None, option("num_inference_steps", "Default: the model's own choice; else 20, or all T of ddpm.", min=1)
    ] = None,
    scheduler: Annotated[
        str | None,
        choice(
            "scheduler",
            "ddpm, ddim, dpmsolver++ or unipc. Default: the model's own choice; else unipc, dpmsolver++ where its "
            "searched timesteps are better, or ddpm where only that can sample the model. A tuned model: lcm alone.",
            SCHEDULERS,
        ),
    ] = None,
    class_label: Annotated[
        str | None,
        option(
            "class_label",
            "The label: a class by its name or number, a number, or for several columns COLUMN=LABEL, COLUMN=LABEL. "
            "Default: each in turn.",
        ),
    ] = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    guidance_method: GuidanceMethod = None,
    autoguidance_scale: AutoguidanceScale = None,
    guidance_model: GuidanceModel = None,
    deterministic: Annotated[bool, switch("deterministic", "With ddpm: iterate the mean, add no noise.")] = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    uniform: Uniform = False,
    format: Annotated[
        str | None,
        choice(
            "format",
            "png, npy or tif, named by seed; parquet, for `datasets`; or npz. Default: png, but npy for arrays that "
            "it cannot hold.",
            FORMATS,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Sample images of a model.

    In several processes: accelerate launch -m hf_ddpm sample
    """
    with report_errors():
        settings: dict[str, Any] = {
            "resolution": resolution or None,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "scheduler": scheduler,
            "class_label": class_label,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_method": guidance_method,
            "autoguidance_scale": autoguidance_scale,
            "guidance_model": guidance_model,
            "deterministic": deterministic,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
            "compile": compile,
            "uniform": uniform,
        }
        if image is not None:
            return _sample_from_images(model, image, out, num_images, format, json, settings)
        join_launcher()
        with without_garbage_collection():
            from hf_ddpm.sampling.image_set import write_samples

        num_images = 16 if num_images is None else num_images
        format = write_samples(model, out, num_images=num_images, format=format, **settings)
    result = {"out": str(out), "num_images": num_images, "grid": str(out / "grid.png"), "format": format}
    first = "all of them" if num_images <= 64 else "the first 64"
    finish(json, result, f"{num_images:,} images are in {out}; grid.png shows {first}.")


def edit(
    model: Model,
    image: Annotated[
        Path, option("image", "An image of the model's size, an array for a model of arrays, or a folder of them.")
    ],
    out: Annotated[Path, option("out", "The folder for the edits and edits.png.")],
    mask: Annotated[
        Path | None,
        option(
            "mask",
            "What is white here, or not 0 in an array, is repainted: one for all images, or a folder of one for each.",
        ),
    ] = None,
    strength: Annotated[
        float | None, option("strength", "In (0, 1], how much changes. Default: 0.5, or 1 with --mask.")
    ] = None,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        int | None, option("num_inference_steps", "See `sample`; the last STRENGTH of them are taken.", min=1)
    ] = None,
    scheduler: Annotated[str | None, choice("scheduler", "See `sample`.", SCHEDULERS)] = None,
    class_label: Annotated[str | None, option("class_label", "The label, see `sample`.")] = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    guidance_method: GuidanceMethod = None,
    autoguidance_scale: AutoguidanceScale = None,
    guidance_model: GuidanceModel = None,
    format: Annotated[
        str | None, choice("format", "Of the edits of arrays, npy or tif. Default: npy.", ("png", *ARRAY_FILE_FORMATS))
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "fp32",
    json: Json = False,
) -> None:
    """Edit images with a model: vary them, or repaint a part of them.

    Without --mask an image is noised and denoised again (SDEdit). With it, all but its white part stays as it is. In
    several processes: accelerate launch -m hf_ddpm edit
    """
    with report_errors():
        join_launcher()
        with without_garbage_collection():
            from hf_ddpm.sampling.edit_set import PICTURE, edit_images

        edits = edit_images(
            model,
            image,
            out,
            mask=mask,
            strength=strength,
            format=format,
            seed=seed,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            class_label=class_label,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_method=guidance_method,
            autoguidance_scale=autoguidance_scale,
            guidance_model=guidance_model,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
    result = {"out": str(out), "edits": [str(path) for path in edits], "picture": str(out / PICTURE)}
    finish(
        json,
        result,
        f"The edited images ({len(edits):,}) are in {out}; {PICTURE} shows them beside the originals.",
        "Others come with another --seed, and need another --out.",
    )


def _sample_from_images(
    model: str,
    image: Path,
    out: Path,
    num_images: int | None,
    format: str | None,
    json: bool,
    settings: Mapping[str, Any],
) -> None:
    """Sample an image from each image."""
    if num_images is not None:
        raise UsageError(f"num_images = {num_images} has no effect with image: each image gives one, leave it out")
    join_launcher()
    with without_garbage_collection():
        from hf_ddpm.sampling.conditional_set import PICTURE, sample_from_images

    files = sample_from_images(model, image, out, format=format, **settings)
    result = {"out": str(out), "images": [str(path) for path in files], "picture": str(out / PICTURE)}
    finish(json, result, f"The samples ({len(files):,}) are in {out}; {PICTURE} shows them beside their images.")
