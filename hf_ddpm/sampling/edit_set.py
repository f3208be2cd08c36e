"""The edited images of a model in a folder, which any number of processes write: `hf-ddpm edit`.

image      a file that is edited; its edit is a PNG file of the same name in the folder `out`, or for a model of
           arrays a file of its values
mask       a file whose white part, or in an array what is not 0, is repainted: one for all images, or one for each
           in the order of their names
edits.png  the first PICTURE_IMAGES images with their masks and edits, side by side
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.data.given_files import read_image, read_mask, require_shape, shares_of, with_known_values
from hf_ddpm.editing import DDPMImg2ImgPipeline, DDPMInpaintPipeline, require_strength
from hf_ddpm.figures import png_bytes, strip, to_pil
from hf_ddpm.image_inputs import images_to_tensor
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, require_writable_folder, weights_sha256, write_atomically
from hf_ddpm.runtime.processes import Processes, join_processes
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.sampling.array_images import GivenArrays, file_contents, format_of_new_files, given_arrays
from hf_ddpm.sampling.image_files import image_files, new_files
from hf_ddpm.sampling.loading import describe_guidance, load_for_sampling, speed_up
from hf_ddpm.sampling.sampler import forward_batch_of, seeded_generators, shared_batches
from hf_ddpm.sampling.settings import SamplingSettings
from hf_ddpm.solvers import choose_sampler
from hf_ddpm.value_range import ValueRange, pictured

PICTURE = "edits.png"
PICTURE_IMAGES = 16


class Edits(NamedTuple):
    """Edited images: the content of the file of each, and what a picture shows of it."""

    contents: list[bytes]
    pictures: list[Image.Image]


def edit_images(
    model: str,
    image: str | Path,
    out: str | Path,
    *,
    mask: str | Path | None = None,
    strength: float | None = None,
    format: str | None = None,
    batch_size: int = 16,
    **settings: Any,
) -> list[Path]:
    """Edit images with a model, and write the edits and a picture of all into the folder `out`.

    Without a mask each image is noised and denoised again, see `DDPMImg2ImgPipeline`. With one, its white part is
    repainted, see `DDPMInpaintPipeline`. Each process that was launched edits its share, to the files of one process.

    Args:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
        image: An image of the model's size, or a folder of them.
        out: A folder, which must not hold files of the edits' names.
        mask: An image of the same size, or a folder of as many as there are images.
        strength: In (0, 1]. None: 0.5 without a mask, and 1 with one.
        format: The format of the edits of arrays, `npy` or `tif`. None: npy; those of pictures are PNG files.
        batch_size: Images per forward pass; on a CPU there are 16 of two or more images.
        settings: The other attributes of `hf_ddpm.sampling.settings.SamplingSettings` by name, such as `seed`,
            `num_inference_steps` and `device`.

    Returns:
        The files of the edits, in the order of the images.

    Raises:
        ValueError: Before the first network evaluation, when an image, a mask or a setting cannot work, or an edit
            would overwrite a file.
        OSError: When a file cannot be read, or `out` cannot be written.
    """
    default = 0.5 if mask is None else 1.0
    strength = default if strength is None else strength
    require_strength(strength)
    sampling = SamplingSettings(batch_size=batch_size, **settings)
    out = look_at("out", out)
    require_writable_folder("out", out)
    names, files = image_files("image", image)
    arrays = given_arrays(names, files, model)
    format = format_of_new_files(None if arrays is None else arrays.value_range, format)
    names = names if arrays is None else arrays.names
    check_seeds(sampling.seed, len(names))
    edits = new_files(out, names, PICTURE, f".{format}")
    mask_files = None if mask is None else _mask_files(mask, len(names))
    with join_processes() as processes:
        processes.require_shared_folder("out", out)
        plain, _ = load_for_sampling(model, "ddpm", device=sampling.device, guidance_model=sampling.guidance_model)
        guidance = sampling.guidance_of(plain)
        speed_up(plain, sampling.dtype, compile=False)
        kept, searched, config = plain.kept_sampler, plain.searched_timesteps, plain.scheduler.config
        sampler = choose_sampler(config, sampling.scheduler, sampling.num_inference_steps, kept, searched)
        pipeline: Any = (DDPMImg2ImgPipeline if mask_files is None else DDPMInpaintPipeline).from_pipe(plain)
        pipeline.use(sampler.scheduler, sampler.num_inference_steps, guidance_scale=1.0)  # each call is given its own
        shape = plain._image_shape()
        masks = None if mask_files is None else _read_masks(mask_files, len(names), shape)
        if arrays is None:
            images, values = _read_pictures(files, shape), None
        else:
            values = _read_arrays(arrays, masks if strength == 1 else None, shape)
            images = shares_of(values, arrays.value_range)
            processes.on_main(lambda: arrays.describe_clipped([values]))
        plain._conditions(sampling.class_label, 1, plain.device, guidance)
        record: dict[str, Any] = {
            "weights_sha256": weights_sha256(Path(plain.unet.config["_name_or_path"])),
            "images": [str(name) for name in names],
            "sampler": (sampler.scheduler, sampler.num_inference_steps),
            "strength": strength,
            "seed": sampling.seed,
            "class_label": sampling.class_label,
            "guidance": None if guidance is None else describe_guidance(guidance, plain),
            "dtype": sampling.dtype or "fp32",
            "device": plain.device.type,
            "forward_batch": forward_batch_of(plain.device, batch_size),
        }
        processes.require_equal(record, "model, images and settings")

        def edit(numbers: np.ndarray) -> Edits:
            edited = pipeline(
                images[numbers],
                **({} if masks is None else {"mask_image": masks[numbers]}),
                strength=strength,
                generator=seeded_generators([sampling.seed + int(i) for i in numbers], pipeline.device),
                class_labels=sampling.class_label,
                guidance=guidance,
                output_type="pil" if arrays is None else "pt",
            ).images
            if arrays is None or values is None:
                return Edits([*map(png_bytes, edited)], edited)
            repainted = None if masks is None else masks[numbers]
            units = with_known_values(edited, values[numbers], repainted, arrays.value_range)
            return Edits(file_contents(units, format), to_pil(pictured(edited.cpu(), arrays.value_range)))

        pictures = _edit_all(processes, edit, edits, record["forward_batch"])
        shown = partial(_picture, images, masks, pictures, None if arrays is None else arrays.value_range)
        processes.on_main(lambda: write_atomically(out / PICTURE, png_bytes(shown())))
    return edits


def _mask_files(mask: str | Path, num_images: int) -> list[Path]:
    """Return the file of the mask of all images, or of each of them."""
    files = image_files("mask", mask)[1]
    if len(files) not in (1, num_images):
        raise UsageError(
            f"mask must be one image, or one for each of {num_images} images, got {len(files)} in {str(mask)!r}"
        )
    return files


def _read_masks(files: Sequence[Path], num_images: int, shape: tuple[int, int, int]) -> Tensor:
    """Return a mask for each image, (N, 1, H, W) bool.

    Raises:
        UsageError: When a file cannot be read, or does not have the model's height and width.
    """
    return torch.cat([read_mask(path, *shape[1:]) for path in files]).expand(num_images, -1, -1, -1)


def _read_pictures(files: Sequence[Path], shape: tuple[int, int, int]) -> Tensor:
    """Return the pictures, (N, C, H, W) in [0, 1].

    Raises:
        UsageError: When a file cannot be read, or does not have the model's shape, (C, H, W).
    """
    if shape[0] not in (1, 3, 4):
        raise UsageError(f"model must make images of 1, 3 or 4 channels, got {shape[0]}, which no picture holds")
    return torch.cat([read_image(path, lambda picture: images_to_tensor(picture, *shape)) for path in files])


def _read_arrays(arrays: GivenArrays, masks: Tensor | None, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the arrays, (N, C, H, W) in the type of the data.

    Args:
        arrays: Where they are.
        masks: What of them need not be finite, (N, 1, H, W) bool; None: all must be.
        shape: That of the model's images, (C, H, W).

    Raises:
        UsageError: When one cannot be read, or has another shape.
    """
    read = []
    for i, name in enumerate(arrays.names):
        values = arrays.read(i, None if masks is None else masks[i].numpy())
        require_shape(values, shape, str(name))
        read.append(values)
    return np.stack(read)


def _edit_all(
    processes: Processes, edit: Callable[[np.ndarray], Edits], files: Sequence[Path], forward_batch: int
) -> list[Image.Image]:
    """Write all edits; the processes share their batches.

    Args:
        edit: A function that edits the images with the given numbers.
        files: The file of each edit.
        forward_batch: The number of images in a forward pass.

    Returns:
        The first PICTURE_IMAGES edits.
    """
    count = len(files)

    def edit_share() -> list[Image.Image]:
        first_edits = []
        share = shared_batches(processes, count, forward_batch)
        label, is_quiet = processes.label("Editing"), processes.rank > 0
        with tqdm(total=sum(map(len, share)), unit="image", desc=label, file=sys.stderr, disable=is_quiet) as progress:
            for numbers in share:
                # Each forward pass has as many images as any other, see hf_ddpm.sampling.sampler. An image that is
                # alone need not take the time of many: it is nobody's share.
                filled = np.resize(numbers, 1 if count == 1 else forward_batch)
                # Written as soon as they are made, so that a command that is killed has lost no more than a batch.
                for i, content, picture in zip(numbers, *edit(filled), strict=False):
                    write_atomically(files[i], content)
                    if i < PICTURE_IMAGES:
                        first_edits.append(picture)
                progress.update(len(numbers))
        return first_edits

    return [picture for share in processes.gather(edit_share) for picture in share]


def _picture(
    images: Tensor, masks: Tensor | None, edited: Sequence[Image.Image], value_range: ValueRange | None
) -> Image.Image:
    """Return the first images with their masks and edits, one row for each."""
    images = images[:PICTURE_IMAGES]
    columns = [to_pil(pictured(images, value_range)), [*edited[:PICTURE_IMAGES]]]
    labels = ["image", "edit"]
    if masks is not None:
        mode, shown = edited[0].mode, masks[:PICTURE_IMAGES].float()
        if value_range is not None:  # as large as channels that stand side by side
            shown = pictured(shown.expand_as(images), value_range)
        columns.insert(1, [each.convert(mode) for each in to_pil(shown)])
        labels.insert(1, "mask")
    return strip([*zip(*columns, strict=True)], labels)
