"""A set of images of a model in a folder, which any number of processes write, and an interrupted run resumes.

set             one image for each seed from the first one on
samples.json    the settings that decide the images of a set; a folder holds one set
grid.png        the first GRID_IMAGES of them, in 8 bits, which is no image of the set
value range     the values that -1 and 1 stand for in the 16-bit images of a model that was trained on 16-bit images
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.data.array_files import require_package
from hf_ddpm.figures import png_bytes, to_pil
from hf_ddpm.guidance import Guidance
from hf_ddpm.image_size import to_resolution, to_size
from hf_ddpm.names import FORMATS
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.files import (
    NETWORK_FOLDERS,
    look_at,
    read_mapping,
    require_writable_folder,
    weights_sha256,
    write_atomically,
)
from hf_ddpm.runtime.processes import Processes, join_processes
from hf_ddpm.runtime.run_files import read_run, run_folder_of
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.sampling.loading import DEFAULT_TIMESTEPS, describe_guidance, describe_timesteps
from hf_ddpm.sampling.sampler import forward_batch_of, iter_samples, labels_in_turn, sheet_by_label
from hf_ddpm.sampling.set_files import FILE_FORMATS, FileSet, PartFiles, column_name
from hf_ddpm.sampling.settings import SampleSettings
from hf_ddpm.solvers import choose_sampler
from hf_ddpm.value_range import ValueRange, pictured


def write_samples(
    model: str,
    out: str | Path,
    *,
    num_images: int,
    format: str | None = None,
    **settings: Any,
) -> str:
    """Sample a model into the folder `out`: one image for each seed from `seed` on, and the first 64 as grid.png.

    Each process that was launched writes its share. Images of the same set that `out` holds already are kept. The
    files, by format::

        format    files                                      lost when a process is killed
        png       000000.png, named by seed                  the images of two forward passes
        npy, tif  000000.npy (C,H,W), named by seed          the images of two forward passes
        parquet   data/train-00000-of-00064.parquet, ...     a file; `datasets.load_dataset(out)` reads all of them
        npz       samples.npz: arr_0 (N,H,W,C), seeds        a 64th of the set, of at most 1024 images

    Args:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
        out: A new folder, or one that holds a part of this set.
        num_images: The number of images in the set. They have 16 bits where the model was trained on such images,
            and the values that those had before `--value_range`. Those of a model of arrays are in the units and the
            type of its data.
        format: `png`, `npy`, `tif`, `parquet` or `npz`. None: png, or npy for arrays that PNG cannot hold.
        settings: The attributes of `hf_ddpm.sampling.settings.SampleSettings` by name, such as `seed`,
            `num_inference_steps` and `device`.

    Returns:
        The format of the files.

    Raises:
        ValueError: Before sampling, when there is no such model, a setting cannot work, or `out` holds something else.
        OSError: When the model cannot be read, or `out` cannot be written.
    """
    sampling = SampleSettings(**settings)
    if format is not None:
        require_choice("format", format, FORMATS)
        require_package(Path(f"a file .{format}"))
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    check_seeds(sampling.seed, num_images)
    out = look_at("out", out)
    require_writable_folder("out", out)
    with join_processes() as processes:
        processes.require_shared_folder("out", out)
        pipeline, steps, guidance = sampling.load(model)
        size = sampling.size_of(pipeline)
        values = pipeline.value_range
        format = _format_for(format, pipeline.unet.config.in_channels, values)
        labels = _labels_of(pipeline, sampling, num_images)
        label = sampling.class_label if labels is None else labels[:1]
        pipeline._conditions(label, 1, pipeline.device, guidance)
        config, kept = pipeline.scheduler.config, pipeline.kept_sampler
        name = choose_sampler(config, sampling.scheduler, steps, kept, pipeline.searched_timesteps).scheduler
        record = {
            "model": str(model),
            "weights_sha256": weights_sha256(Path(pipeline.unet.config["_name_or_path"])),
            "scheduler": name,
            "num_inference_steps": steps,
            **describe_timesteps(pipeline, steps),
            "seed": sampling.seed,
            "num_images": num_images,
            "resolution": None if size is None else to_resolution(size),
            "class_label": None if labels is None or sampling.class_label is None else labels[0],
            "deterministic": sampling.deterministic,
            "dtype": sampling.dtype or "fp32",
            "compile": sampling.compile,
            "format": format,
            "value_range": None if values is not None else _value_range(pipeline.unet, format, processes),
            **({} if values is None else {"values": {"low": values.low, "high": values.high, "dtype": values.dtype}}),
            "device": pipeline.device.type,
            "forward_batch": forward_batch_of(pipeline.device, sampling.batch_size),
            "guidance": None if guidance is None else describe_guidance(guidance, pipeline),
        }
        _write_set(processes, pipeline, out, record, labels, sampling.batch_size, guidance)
    return format


def _labels_of(pipeline: DDPMPipeline, sampling: SampleSettings, num_images: int) -> list[Any] | None:
    """Return the label of each image of a set; None for a model without labels."""
    if pipeline.labels is not None and sampling.class_label is not None:
        return [pipeline.labels.read(sampling.class_label)] * num_images
    return labels_in_turn(pipeline.labels, range(sampling.seed, sampling.seed + num_images))


def _write_set(
    processes: Processes,
    pipeline: DDPMPipeline,
    out: Path,
    settings: dict[str, Any],
    labels: Sequence[Any] | None,
    batch_size: int,
    guidance: Guidance | None,
) -> None:
    """Write the missing images of the set that `settings` describe, and the grid."""
    seed, num_images, format = settings["seed"], settings["num_images"], settings["format"]
    table = {}
    if pipeline.labels is not None and labels is not None:
        table = {column_name(name): column for name, column in pipeline.labels.table(labels).items()}
    if format in FILE_FORMATS:
        image_set: FileSet | PartFiles = FileSet(out, seed, table, num_images, format)
    else:
        dtype = None if pipeline.value_range is None else pipeline.value_range.dtype
        image_set = PartFiles(out, seed, table, num_images, format, dtype)

    def check_and_record() -> list[int]:
        _check_folder(out, settings, image_set.existing())
        write_atomically(out / "samples.json", json.dumps(settings, indent=2) + "\n")
        return image_set.missing_groups()

    processes.require_equal(settings, "model and settings")
    # The main process records the settings before any process writes: images without samples.json are not of this set.
    groups = processes.on_main(check_and_record)
    indices = [i for k in processes.split(len(groups)) for i in image_set.members(groups[k])]

    def write_share() -> None:
        batches = iter_samples(
            pipeline,
            [seed + i for i in indices],
            batch_size=batch_size,
            num_inference_steps=settings["num_inference_steps"],
            class_labels=None if labels is None else [labels[i] for i in indices],
            deterministic=settings["deterministic"],
            value_range=pipeline.value_range or settings["value_range"],
            guidance=guidance,
            size=None if settings["resolution"] is None else to_size(settings["resolution"]),
        )
        label, is_quiet = processes.label("Sampling"), processes.rank > 0
        with (
            tqdm(total=len(indices), unit="image", desc=label, disable=is_quiet) as progress,
            ThreadPoolExecutor(1) as writer,
        ):
            written = None
            for seeds, images in batches:
                if written is not None:
                    progress.update(written.result())
                # In a thread, so that a GPU computes the next images meanwhile.
                written = writer.submit(write, seeds, images)
            if written is not None:
                progress.update(written.result())

    def write(seeds: Sequence[int], images: Tensor) -> int:
        image_set.add([s - seed for s in seeds], images.permute(0, 2, 3, 1).numpy())
        return len(seeds)

    def finish() -> None:
        first_images = image_set.finish()
        shown, columns = pipeline.labels if settings["class_label"] is None else None, None
        if shown is not None and len(first_images) >= 2 * len(shown.in_turn):
            columns = len(first_images) // len(shown.in_turn)
            first_images = first_images[: columns * len(shown.in_turn)]
        pixels = _in_8_bits(np.stack(first_images), pipeline.value_range or settings["value_range"])
        pictures = to_pil(pictured(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), pipeline.value_range))
        write_atomically(out / "grid.png", png_bytes(sheet_by_label(pictures, columns, shown)))

    processes.gather(write_share)
    processes.on_main(finish)


def _check_folder(out: Path, settings: dict[str, Any], existing: Sequence[Path]) -> None:
    """Check that the folder may hold this set.

    Args:
        existing: The files of the set's names that the folder holds.

    Raises:
        ValueError: When `out` holds another set, or files that belong to none.
    """
    record = out / "samples.json"
    if not record.is_file():
        if existing:
            raise ValueError(
                f"{existing[0]} would be overwritten: choose another folder than {str(out)!r} or another seed"
            )
        return
    recorded = read_mapping(record, "choose another folder, or delete its set")
    # The model may have another name now, and a set of single files may become larger.
    may_differ = {"model", *({DEFAULT_TIMESTEPS} - {*recorded})}  # sets of before do not record these
    if settings["format"] in FILE_FORMATS and _is_part_of(recorded, settings):
        may_differ.add("num_images")
    differing = [key for key in settings if key not in may_differ and recorded.get(key) != settings[key]]
    if differing:
        was = ", ".join(f"{key}={recorded.get(key)!r}" for key in differing)
        now = ", ".join(f"{key}={settings[key]!r}" for key in differing)
        raise ValueError(f"{out} holds samples with {was}, got {now}: choose another folder, or those settings")


def _value_range(unet: Any, format: str, processes: Processes) -> list[float] | None:
    """Return the values that -1 and 1 stand for in images of 16 bits; None for 8 bits.

    A model makes 16-bit images if run.json says that it was trained on them. Pillow writes only gray ones.
    """
    folder = Path(unet.config["_name_or_path"])
    data = read_run(run_folder_of(folder.parent if folder.name in NETWORK_FOLDERS else folder)).get("data", {})
    if data.get("max_value", 255) == 255:
        return None
    if format in ("png", "parquet") and unet.config.in_channels > 1:
        if processes.rank == 0:
            text = f"the images get 8 bits: of 16 bits, {format} files hold gray ones only; --format npz holds all"
            tqdm.write(text, file=sys.stderr)
        return None
    return data.get("value_range") or [0, 65535]


def _is_part_of(recorded: dict[str, Any], settings: dict[str, Any]) -> bool:
    num_images = recorded.get("num_images")
    return isinstance(num_images, int) and num_images <= settings["num_images"]


def _format_for(format: str | None, channels: int, values: ValueRange | None) -> str:
    """Return the format of a set, after checking that it holds the images of the model.

    Raises:
        ValueError: When it does not.
    """
    if values is None:
        fits_png = channels in (1, 3, 4)
    else:
        fits_png = (values.dtype == "uint8" and channels in (1, 3)) or (values.dtype == "uint16" and channels == 1)
    format = format or ("png" if fits_png or values is None else "npy")
    if format == "png" and not fits_png:
        what = f"images of {channels} channels" + ("" if values is None else f" of {values.dtype}")
        raise ValueError(f"format must be 'npy', 'tif', 'parquet' or 'npz' for {what}, got 'png'")
    if format == "parquet" and values is None and not fits_png:
        raise ValueError(f"format must be 'npy', 'tif' or 'npz' for images of {channels} channels, got 'parquet'")
    return format


def _in_8_bits(pixels: np.ndarray, value_range: Sequence[float] | ValueRange | None) -> np.ndarray:
    """Return the images of a set as pictures show them, uint8."""
    if value_range is None:
        return pixels
    is_of_arrays = isinstance(value_range, ValueRange)
    low, high = (value_range.low, value_range.high) if is_of_arrays else value_range
    return np.clip(np.rint((pixels.astype(np.float64) - low) * 255 / (high - low)), 0, 255).astype(np.uint8)
