"""The images that a model makes from images, in a folder that any number of processes write: `hf-ddpm sample --image`.

image        a file that a sample is made from; the sample is a PNG file of the same name in the folder `out`, or for a
             model of arrays a file of its values
samples.png  the first PICTURE_IMAGES images with their samples, side by side
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.condition import read_condition
from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.data.array_files import is_array_file
from hf_ddpm.data.given_files import read_image, shares_of
from hf_ddpm.figures import png_bytes, side_by_side, to_pil
from hf_ddpm.hub.download import find_model
from hf_ddpm.labels import describe_labels
from hf_ddpm.prediction import Label
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, naming_damage, require_writable_folder, weights_sha256, write_atomically
from hf_ddpm.runtime.processes import Processes, join_processes
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.sampling.array_images import GivenArrays, file_contents, format_of_new_files, given_arrays
from hf_ddpm.sampling.image_files import image_files, new_files
from hf_ddpm.sampling.loading import describe_guidance
from hf_ddpm.sampling.sampler import forward_batch_of, iter_samples, shared_batches
from hf_ddpm.sampling.settings import SampleSettings
from hf_ddpm.value_range import ValueRange, pictured, read_value_range

PICTURE = "samples.png"
PICTURE_IMAGES = 16


def sample_from_images(
    model: str,
    image: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    **settings: Any,
) -> list[Path]:
    """Sample an image from each image, and write the samples and a picture of all into the folder `out`.

    Each process that was launched samples its share, and the files are those of one process.

    Args:
        model: A folder that holds a model that makes images from images, or a run of one; or a Hub id.
        image: An image of the model's size, or a folder of them. For super-resolution they may have the low
            resolution.
        out: A folder, which must not hold files of the samples' names.
        format: The format of the samples of arrays, `npy` or `tif`. None: npy; those of pictures are PNG files.
        settings: The attributes of `hf_ddpm.sampling.settings.SampleSettings` by name, such as `seed`,
            `num_inference_steps` and `device`.

    Returns:
        The files of the samples, in the order of the images.

    Raises:
        ValueError: Before the first network evaluation, when an image or a setting cannot work, the model makes no
            images from images, or a sample would overwrite a file.
        OSError: When a file cannot be read, or `out` cannot be written.
    """
    sampling = SampleSettings(**settings)
    out = look_at("out", out)
    require_writable_folder("out", out)
    names, files = image_files("image", image)
    arrays = given_arrays(names, files, model)
    values = _values_of_samples(find_model(model)[0], are_arrays=arrays is not None)
    format = format_of_new_files(values, format)
    names = names if arrays is None else arrays.names
    check_seeds(sampling.seed, len(names))
    new = new_files(out, names, PICTURE, f".{format}")

    with join_processes() as processes:
        processes.require_shared_folder("out", out)
        pipeline, steps, guidance = sampling.load(model, makes_from_images=True)
        assert isinstance(pipeline, ConditionalDDPMPipeline)
        if arrays is None:
            _require_pictures(pipeline, names)
        labels = _class_labels(pipeline, sampling.class_label, len(names))
        size = sampling.size_of(pipeline)
        to_conditions = partial(pipeline.to_conditions, size=size)
        if arrays is None:
            conditions = torch.cat([read_image(path, to_conditions) for path in files])
        else:
            conditions = _arrays_as_conditions(processes, arrays, pipeline.condition.channels, to_conditions)
        record: dict[str, Any] = {
            "weights_sha256": weights_sha256(Path(pipeline.unet.config["_name_or_path"])),
            "images": [str(name) for name in names],
            "scheduler": (type(pipeline.scheduler).__name__, steps),
            "seed": sampling.seed,
            "size": size,
            "class_label": labels and labels[0],
            "deterministic": sampling.deterministic,
            "guidance": None if guidance is None else describe_guidance(guidance, pipeline),
            "dtype": sampling.dtype or "fp32",
            "compile": sampling.compile,
            "device": pipeline.device.type,
            "forward_batch": forward_batch_of(pipeline.device, sampling.batch_size),
        }
        processes.require_equal(record, "model, images and settings")

        def sample_share() -> list[Image.Image]:
            share = [i for batch in shared_batches(processes, len(names), record["forward_batch"]) for i in batch]
            batches = iter_samples(
                pipeline,
                [sampling.seed + i for i in share],
                batch_size=sampling.batch_size,
                num_inference_steps=steps,
                class_labels=None if labels is None else [labels[i] for i in share],
                deterministic=sampling.deterministic,
                guidance=guidance,
                conditions=conditions[share],
                size=size,
                value_range=values,
            )
            return _write_share(processes, batches, len(share), new, sampling.seed, values, format)

        samples = [picture for share in processes.gather(sample_share) for picture in share]

        shown = to_pil(pictured(conditions[:PICTURE_IMAGES], None if arrays is None else arrays.value_range))
        picture = side_by_side([shown, samples], [pipeline.condition.label, "sample"])
        processes.on_main(lambda: write_atomically(out / PICTURE, png_bytes(picture)))
    return new


def _values_of_samples(folder: Path, are_arrays: bool) -> ValueRange | None:
    """Return the values of samples that are arrays; None for pictures.

    They are those of the model. The enlarged image of a picture is one, whatever super-resolution was trained on.

    Args:
        folder: The folder of the model.
        are_arrays: Whether samples are made from arrays.
    """
    condition = read_condition(folder)
    is_of_column = condition is not None and condition.super_resolution is None
    return read_value_range(folder) if is_of_column or are_arrays else None


def _require_pictures(pipeline: ConditionalDDPMPipeline, names: Sequence[Path]) -> None:
    """Check that a model takes pictures, and that files are none of arrays.

    Raises:
        UsageError: When it makes samples from arrays, or a file is one of arrays.
    """
    if pipeline.condition.value_range is not None:
        raise UsageError(
            f"image must hold arrays of {pipeline.condition.value_range}, which the model makes samples from, got "
            f"the picture {names[0]}: save its values as such an array"
        )
    if arrays := [name for name in names if is_array_file(name)]:
        raise UsageError(
            f"image must hold pictures, which the model makes samples from, got the array {arrays[0]}: save it as a "
            "picture"
        )


def _write_share(
    processes: Processes,
    batches: Iterable[tuple[list[int], Tensor]],
    num_images: int,
    files: Sequence[Path],
    seed: int,
    values: ValueRange | None,
    format: str,
) -> list[Image.Image]:
    """Write the samples of this process, and return those of the first PICTURE_IMAGES images.

    Args:
        processes: The processes, each of which writes its own samples.
        batches: The seeds and the samples of each batch, as `iter_samples` yields them.
        num_images: The number of samples in all batches.
        files: The files of the samples of all processes.
        seed: The seed of the first of these.
        values: The values of samples that are arrays; None for pictures.
        format: The format of the files.
    """
    first_samples = []
    label, is_quiet = processes.label("Sampling"), processes.rank > 0
    with tqdm(total=num_images, unit="image", desc=label, file=sys.stderr, disable=is_quiet) as progress:
        for seeds, images in batches:
            # Written as soon as it is made, so that a command that is killed has lost no more than a batch.
            if values is None:
                pictures = to_pil(images)
                contents = [*map(png_bytes, pictures)]
            else:
                pictures = to_pil(pictured(values.to_unit_interval(images), values))
                contents = file_contents(images.numpy(), format)
            for each, content, picture in zip(seeds, contents, pictures, strict=True):
                write_atomically(files[each - seed], content)
                if each - seed < PICTURE_IMAGES:
                    first_samples.append(picture)
            progress.update(len(seeds))
    return first_samples


def _arrays_as_conditions(
    processes: Processes, arrays: GivenArrays, channels: int, to_conditions: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return arrays as conditions, (N, C', H, W) in [0, 1].

    Raises:
        UsageError: When one cannot be read, or a function that makes conditions of shares refuses it.
    """
    values = [arrays.read(i) for i in range(len(arrays.names))]
    processes.on_main(lambda: arrays.describe_clipped(values))
    conditions = []
    for name, row, each in zip(arrays.names, arrays.rows, values, strict=True):
        remedy = "change the file, or give another one"
        if channels == 1 < len(each) and row["slice"] is None:
            remedy = f"if these are {len(each)} images, save them as (N, 1, H, W); else give another file"
        with naming_damage(f"{name} cannot be taken", remedy):
            conditions.append(to_conditions(shares_of(each, arrays.value_range)[None]))
    return torch.cat(conditions)


def _class_labels(pipeline: ConditionalDDPMPipeline, class_label: Label | None, num_images: int) -> list[Any] | None:
    """Return a label for each image: the one that was named; None for the one that stands for every label.

    Raises:
        UsageError: When there is no such class, or one must be named.
    """
    labels = pipeline.labels
    if labels is None:
        if class_label is not None:
            raise UsageError(f"class_label has no effect on a model without classes, got {class_label!r}")
        return None
    if class_label is not None:
        return [labels.read(class_label)] * num_images
    if labels.unconditional is None:
        raise UsageError(f"class_label must be given: the model is conditioned on {describe_labels(labels)}")
    return None
