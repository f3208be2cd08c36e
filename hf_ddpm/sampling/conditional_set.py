"""Images that a model makes from images, in a folder, which any number of processes write: `hf-ddpm sample --image`.

image        a file that a sample is made from; the sample is a PNG file of the same name in the folder `out`
samples.png  the first PICTURE_IMAGES images with their samples, side by side
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.figures import png_bytes, side_by_side, to_pil
from hf_ddpm.image_size import to_size
from hf_ddpm.labels import describe_labels
from hf_ddpm.names import DTYPES
from hf_ddpm.runtime.devices import process_device, require_compiler
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, require_writable_folder, weights_sha256, write_atomically
from hf_ddpm.runtime.processes import join_processes
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.sampling.edit_set import image_files, new_files, read_image, shared_batches
from hf_ddpm.sampling.sampler import (
    check_guidance,
    choose_guidance,
    describe_guidance,
    forward_batch_of,
    iter_samples,
    load_for_sampling,
    speed_up,
)

PICTURE = "samples.png"
PICTURE_IMAGES = 16


def sample_from_images(
    model: str,
    image: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    resolution: int | Sequence[int] | None = None,
    class_label: int | str | None = None,
    guidance_scale: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    guidance_method: str | None = None,
    guidance_model: str | None = None,
    deterministic: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    uniform: bool = False,
) -> list[Path]:
    """Sample an image from each image, and write the samples and a picture of all into the folder `out`.

    Each process that was launched samples its share, and the files are those of one process.

    Args:
        model: A folder that holds a model that makes images from images, or a run of one; or a Hub id.
        image: An image of the model's size, or a folder of them. For super-resolution they may have the low
            resolution.
        out: A folder, which must not hold files of the samples' names.
        seed: The seed of the first sample; sample i has seed + i.
        num_inference_steps: See `write_samples`, as for all that follows.
        scheduler: The scheduler.
        resolution: The size of the samples, and of the images but for a low resolution of them.
        class_label: The class of all images.
        guidance_scale: How far images are led away from those of a weaker model.
        guidance_interval: Where guidance acts.
        guidance_method: How it guides.
        guidance_model: The weaker model, which makes images from the same images.
        deterministic: Whether to add no noise.
        batch_size: Images per forward pass.
        device: A device of torch.
        dtype: The type that the network computes in.
        compile: Whether the network is compiled.
        uniform: Whether to ignore timesteps that were searched for.

    Returns:
        The files of the samples, in the order of the images.

    Raises:
        ValueError: Before the first network evaluation, when an image or a setting cannot work, the model makes no
            images from images, or a sample would overwrite a file.
        OSError: When a file cannot be read, or `out` cannot be written.
    """
    if dtype is not None:
        require_choice("dtype", dtype, DTYPES)
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if compile:
        require_compiler(process_device(device))
    check_guidance([guidance_scale], guidance_interval, guidance_method)
    out = look_at("out", out)
    require_writable_folder("out", out)
    names, files = image_files("image", image)
    check_seeds(seed, len(names))
    new = new_files(out, names, PICTURE)

    with join_processes() as processes:
        pipeline, steps = load_for_sampling(
            model,
            scheduler,
            num_inference_steps,
            device,
            uniform=uniform,
            guidance_model=guidance_model,
            makes_from_images=True,
        )
        assert isinstance(pipeline, ConditionalDDPMPipeline)
        guidance = choose_guidance(pipeline, guidance_scale, guidance_interval, guidance_method, guidance_model)
        pipeline._check_inputs(1, None, "pil", ("latents",), deterministic)
        labels = _class_labels(pipeline, class_label, len(names))
        size = None if not resolution else pipeline._requested_size(*to_size(resolution))
        conditions = torch.cat([read_image(path, partial(pipeline.to_conditions, size=size)) for path in files])
        speed_up(pipeline, dtype, compile)
        settings: dict[str, Any] = {
            "weights_sha256": weights_sha256(Path(pipeline.unet.config["_name_or_path"])),
            "images": [str(name) for name in names],
            "scheduler": (type(pipeline.scheduler).__name__, steps),
            "seed": seed,
            "size": size,
            "class_label": labels and labels[0],
            "deterministic": deterministic,
            "guidance": None if guidance is None else describe_guidance(guidance, pipeline),
            "dtype": dtype or "fp32",
            "compile": compile,
            "device": pipeline.device.type,
            "forward_batch": forward_batch_of(pipeline.device, batch_size),
        }
        processes.require_equal(settings, "model, images and settings")

        def sample_share() -> list[Image.Image]:
            share = [i for batch in shared_batches(processes, len(names), settings["forward_batch"]) for i in batch]
            batches = iter_samples(
                pipeline,
                [seed + i for i in share],
                batch_size=batch_size,
                num_inference_steps=steps,
                class_labels=None if labels is None else [labels[i] for i in share],
                deterministic=deterministic,
                guidance=guidance,
                conditions=conditions[share],
                size=size,
            )
            first_samples = []
            label, is_quiet = processes.label("Sampling"), processes.rank > 0
            with tqdm(total=len(share), unit="image", desc=label, file=sys.stderr, disable=is_quiet) as progress:
                for seeds, images in batches:
                    # Written as soon as it is made, so that a command that is killed has lost no more than a batch.
                    for each, picture in zip(seeds, to_pil(images), strict=True):
                        write_atomically(new[each - seed], png_bytes(picture))
                        if each - seed < PICTURE_IMAGES:
                            first_samples.append(picture)
                    progress.update(len(seeds))
            return first_samples

        samples = [picture for share in processes.gather(sample_share) for picture in share]

        def write_picture() -> None:
            columns = [to_pil(conditions[:PICTURE_IMAGES]), samples]
            write_atomically(out / PICTURE, png_bytes(side_by_side(columns, [pipeline.condition.label, "sample"])))

        processes.on_main(write_picture)
    return new


def _class_labels(
    pipeline: ConditionalDDPMPipeline, class_label: int | str | None, num_images: int
) -> list[Any] | None:
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
