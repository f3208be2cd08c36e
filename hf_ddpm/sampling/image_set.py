"""A set of images of a model in a folder, which any number of processes write, and an interrupted run resumes.

set             one image for each seed from the first one on
samples.json    the settings that decide the images of a set; a folder holds one set
metadata.jsonl  of a set of single files: the seed of each, and its class; of PNG files, `datasets` and
                `--dataset_name` read them
grid.png        the first GRID_IMAGES of them, in 8 bits, which is no image of the set
value range     the values that -1 and 1 stand for in the 16-bit images of a model that was trained on 16-bit images
units           the values of a model of arrays, in the type of its data; a PNG file holds few of them
group           the images that one process writes together: one file, or a part file of many images
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_ddpm.data.array_files import require_package
from hf_ddpm.data.columns import column_of_arrays
from hf_ddpm.figures import png_bytes, to_pil
from hf_ddpm.guidance import Guidance
from hf_ddpm.names import DTYPES, FORMATS
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.prediction import Label
from hf_ddpm.runtime.devices import process_device, require_compiler
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
from hf_ddpm.sampling.sampler import (
    FORWARD_BATCH,
    check_guidance,
    choose_guidance,
    describe_guidance,
    forward_batch_of,
    iter_samples,
    labels_in_turn,
    load_for_sampling,
    sheet_by_label,
    speed_up,
)
from hf_ddpm.solvers import choose_sampler
from hf_ddpm.value_range import ValueRange, pictured

GRID_IMAGES = 64
# What a set calls its own columns, and numpy an argument.
_TAKEN_NAMES = ("file_name", "image", "seed", "seeds", "labels", "arr_0", "file", "allow_pickle")
# The formats of which a file holds one image.
_FILE_FORMATS = ("png", "npy", "tif")
# A set is written in at most MAX_PARTS part files, unless they would then hold more than MAX_PART_IMAGES each.
MAX_PARTS, MAX_PART_IMAGES = 64, 1024


def write_samples(
    model: str,
    out: str | Path,
    *,
    num_images: int,
    seed: int = 0,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    class_label: Label | None = None,
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
    format: str | None = None,
) -> str:
    """Sample a model into the folder `out`: one image for each seed from `seed` on, and the first 64 as grid.png.

    Each process that was launched writes its share. Images of the same set that `out` holds already are kept. The
    files, by format::

        format    files                                      lost when a process is killed
        png       000000.png, named by seed                  the images of a forward pass
        npy, tif  000000.npy (C,H,W), named by seed          the images of a forward pass
        parquet   data/train-00000-of-00064.parquet, ...     a file; `datasets.load_dataset(out)` reads all of them
        npz       samples.npz: arr_0 (N,H,W,C), seeds        a 64th of the set, of at most 1024 images

    Args:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
        out: A new folder, or one that holds a part of this set.
        num_images: The number of images in the set. They have 16 bits where the model was trained on such images,
            and the values that those had before `--value_range`. Those of a model of arrays are in the units and the
            type of its data.
        seed: The seed of the first image.
        num_inference_steps: A number in [1, T]. None: the one that the model's folder keeps (`DDPMPipeline.use`), or
            20, or all T of `ddpm`.
        scheduler: `ddpm`, `ddim`, `dpmsolver++` or `unipc`. None: the one that the model's folder keeps, or unipc;
            dpmsolver++ where its searched timesteps are better; ddpm where only that can sample the model.
        class_label: The label of all images, see `DDPMPipeline`. None: each class in turn, or the quantiles of
            numbers, if the model has labels.
        guidance_scale: How far images are led away from those of a weaker model: the model without a class, or
            `guidance_model`. None: what the model's folder says, or 1, which is no guidance.
        guidance_interval: (low, high): guidance acts where low < sigma <= high, the ratio of noise to signal.
        guidance_method: `cfg`, `cfg-zero*`, `apg` or `tcfg`. None: what the model's folder says, or `cfg`.
        guidance_model: A weaker model, a folder or a Hub id. None: the model itself without a class, or the one in its
            folder `guide`.
        deterministic: Whether to iterate the mean of each reverse step, without noise; for `ddpm` only.
        batch_size: Images per forward pass; on a CPU there are always 16.
        device: A device of torch. None: the best one of this process.
        dtype: The type that the network computes in, `fp32` or `bf16`. None: fp32.
        compile: Whether `torch.compile` compiles the network, at its first forward pass.
        uniform: Whether to ignore timesteps that were searched for.
        format: `png`, `npy`, `tif`, `parquet` or `npz`. None: png, or npy for arrays that PNG cannot hold.

    Returns:
        The format of the files.

    Raises:
        ValueError: Before sampling, when there is no such model, a setting cannot work, or `out` holds something else.
        OSError: When the model cannot be read, or `out` cannot be written.
    """
    if format is not None:
        require_choice("format", format, FORMATS)
        require_package(Path(f"a file .{format}"))
    if dtype is not None:
        require_choice("dtype", dtype, DTYPES)
    if compile:
        require_compiler(process_device(device))
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    check_seeds(seed, num_images)
    check_guidance([guidance_scale], guidance_interval, guidance_method)
    out = look_at("out", out)
    require_writable_folder("out", out)
    with join_processes() as processes:
        pipeline, steps = load_for_sampling(
            model, scheduler, num_inference_steps, device, uniform=uniform, guidance_model=guidance_model
        )
        guidance = choose_guidance(pipeline, guidance_scale, guidance_interval, guidance_method, guidance_model)
        speed_up(pipeline, dtype, compile)
        unet = pipeline.unet
        values = pipeline.value_range
        format = _format_for(format, unet.config.in_channels, values)
        pipeline._check_inputs(1, None, "pt", ("latents",), deterministic)
        labels = labels_in_turn(pipeline.labels, range(seed, seed + num_images))
        if class_label is not None and pipeline.labels is not None:
            labels = [pipeline.labels.read(class_label)] * num_images
        pipeline._conditions(class_label if labels is None else labels[:1], 1, pipeline.device, guidance)
        searched, kept = pipeline.searched_timesteps_for(steps), pipeline.kept_sampler
        name = choose_sampler(pipeline.scheduler.config, scheduler, steps, kept, pipeline.searched_timesteps).scheduler
        settings = {
            "model": str(model),
            "weights_sha256": weights_sha256(Path(unet.config["_name_or_path"])),
            "scheduler": name,
            "num_inference_steps": steps,
            "timesteps": None if searched is None else [*searched.timesteps],
            "seed": seed,
            "num_images": num_images,
            "class_label": None if labels is None or class_label is None else labels[0],
            "deterministic": deterministic,
            "dtype": dtype or "fp32",
            "compile": compile,
            "format": format,
            "value_range": None if values is not None else _value_range(unet, format, processes),
            **({} if values is None else {"values": {"low": values.low, "high": values.high, "dtype": values.dtype}}),
            "device": pipeline.device.type,
            "forward_batch": forward_batch_of(pipeline.device, batch_size),
            "guidance": None if guidance is None else describe_guidance(guidance, pipeline),
        }
        _write_set(processes, pipeline, out, settings, labels, batch_size, guidance)
    return format


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
        table = {_column_name(name): column for name, column in pipeline.labels.table(labels).items()}
    if format in _FILE_FORMATS:
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
        )
        label, is_quiet = processes.label("Sampling"), processes.rank > 0
        with tqdm(total=len(indices), unit="image", desc=label, disable=is_quiet) as progress:
            for seeds, images in batches:
                image_set.add([s - seed for s in seeds], images.permute(0, 2, 3, 1).numpy())
                progress.update(len(seeds))

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


class FileSet:
    """A set as one file per image.

    Args:
        out: The folder of the set.
        seed: The seed of the first image.
        labels: The label of each image in columns of a table, by their names; none if the model has no labels.
        num_images: The number of images in the set.
        format: One of _FILE_FORMATS.
    """

    def __init__(self, out: Path, seed: int, labels: Mapping[str, Sequence[Any]], num_images: int, format: str):
        self.out, self.seed, self.labels, self.format = out, seed, labels, format
        self.names = [f"{seed + i:06d}.{format}" for i in range(num_images)]

    def existing(self) -> list[Path]:
        """Return the files of the set that exist."""
        names = set(os.listdir(self.out)) if self.out.is_dir() else set()
        return [self.out / name for name in ["grid.png", "metadata.jsonl", *self.names] if name in names]

    def missing_groups(self) -> list[int]:
        """Return the numbers of the images that have no file; an image is a group of its own."""
        existing = set(self.existing())
        return [i for i, name in enumerate(self.names) if self.out / name not in existing]

    def members(self, group: int) -> range:
        """Return the numbers of the images in a group."""
        return range(group, group + 1)

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Write the images with these numbers, (B, H, W, C) uint8, uint16 or in the type of a model of arrays."""
        for i, image in zip(indices, images, strict=True):
            write_atomically(self.out / self.names[i], _file_content(image, self.format))

    def finish(self) -> list[np.ndarray]:
        """Write the metadata, when all images are written, and return the first GRID_IMAGES of them."""
        rows = []
        for i, name in enumerate(self.names):
            label = {column: labels[i] for column, labels in self.labels.items()}
            rows.append(json.dumps({"file_name": name, "seed": self.seed + i, **label}) + "\n")
        write_atomically(self.out / "metadata.jsonl", "".join(rows))
        return [_read_file(self.out / name) for name in self.names[:GRID_IMAGES]]


class PartFiles:
    """A set as files of many images: Parquet files, or NumPy files that `finish` makes into one.

    Args:
        out: The folder of the set.
        seed: The seed of the first image.
        labels: The label of each image in columns of a table, by their names; none if the model has no labels.
        num_images: The number of images in the set.
        format: "parquet" or "npz".
        dtype: The type of the values of a model of arrays; None for other models.
    """

    def __init__(
        self,
        out: Path,
        seed: int,
        labels: Mapping[str, Sequence[Any]],
        num_images: int,
        format: str,
        dtype: str | None = None,
    ):
        self.out, self.seed, self.labels, self.num_images, self.format = out, seed, labels, num_images, format
        self.dtype = dtype
        # Whole forward passes, so that none is filled up.
        forward_passes_per_part = -(-num_images // (MAX_PARTS * FORWARD_BATCH))
        self.part_images = min(MAX_PART_IMAGES, FORWARD_BATCH * forward_passes_per_part)
        num_parts = -(-num_images // self.part_images)
        stem = "data/train" if format == "parquet" else "parts/part"
        self.files = [out / f"{stem}-{k:05d}-of-{num_parts:05d}.{format}" for k in range(num_parts)]
        self.whole_file = out / "samples.npz"
        self.unwritten: dict[int, np.ndarray] = {}

    def existing(self) -> list[Path]:
        """Return the files of the set that exist."""
        return [path for path in [self.out / "grid.png", self.whole_file, *self.files] if path.exists()]

    def missing_groups(self) -> list[int]:
        """Return the numbers of the parts that have no file."""
        existing = set(self.existing())
        if self.whole_file in existing:
            return []
        return [k for k, path in enumerate(self.files) if path not in existing]

    def members(self, group: int) -> range:
        """Return the numbers of the images in a part."""
        return range(group * self.part_images, min((group + 1) * self.part_images, self.num_images))

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Take the images with these numbers, as of `FileSet.add`, and write each part that is then whole."""
        self.unwritten.update(zip(indices, images, strict=True))
        for part in sorted({i // self.part_images for i in self.unwritten}):
            members = self.members(part)
            if all(i in self.unwritten for i in members):
                pixels = np.stack([self.unwritten.pop(i) for i in members])
                encode = self._parquet if self.format == "parquet" else self._npz
                write_atomically(self.files[part], encode(members, pixels))

    def _npz(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        columns = {"arr_0": pixels, "seeds": np.array([self.seed + i for i in members])}
        for name, labels in self.labels.items():
            hidden = "" if _dtype(labels) == "string" else math.nan
            of_members = [hidden if labels[i] is None else labels[i] for i in members]
            columns["labels" if name == "label" else name] = np.array(of_members)
        content = io.BytesIO()
        np.savez(content, **columns)  # pyright: ignore[reportArgumentType]
        return content.getvalue()

    def _parquet(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        seeds = [self.seed + i for i in members]
        columns, features = {}, {}
        columns["image"], features["image"] = _cells(pixels, seeds, self.dtype is not None)
        columns["seed"], features["seed"] = pa.array(seeds, pa.int64()), {"dtype": "int64", "_type": "Value"}
        for name, labels in self.labels.items():
            dtype = _dtype(labels)
            columns[name] = pa.array([labels[i] for i in members], getattr(pa, dtype)())
            features[name] = {"dtype": dtype, "_type": "Value"}
        # `datasets` writes this metadata, too, and takes a column for images by it alone.
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        content = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), content)
        return content.getvalue()

    def finish(self) -> list[np.ndarray]:
        """Return the first GRID_IMAGES images of the set, when all parts are written; make NumPy parts into one."""
        if self.format == "parquet":
            return self._first_of_parquet()
        if not self.whole_file.exists():
            parts = [np.load(path)["arr_0"] for path in self.files]
            write_atomically(self.whole_file, self._npz(range(self.num_images), np.concatenate(parts)))
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        return [*np.load(self.whole_file)["arr_0"][:GRID_IMAGES]]

    def _first_of_parquet(self) -> list[np.ndarray]:
        import pyarrow.parquet as pq

        images: list[np.ndarray] = []
        for path in self.files[: -(-GRID_IMAGES // self.part_images)]:
            for cell in pq.read_table(path, columns=["image"])["image"].to_pylist():
                if self.dtype is not None:
                    images.append(np.asarray(cell, self.dtype).transpose(1, 2, 0))
                    continue
                with Image.open(io.BytesIO(cell["bytes"])) as image:
                    images.append(_pixels(image))
        return images[:GRID_IMAGES]


def _column_name(name: str) -> str:
    """Return the name of a column of labels beside those of a set."""
    return f"label_{name}" if name in _TAKEN_NAMES else name


def _dtype(labels: Sequence[Any]) -> str:
    """Return the type of a column of labels, as Arrow and `datasets` call it."""
    present = [label for label in labels if label is not None]
    if present and isinstance(present[0], str):
        return "string"
    return "int64" if present and isinstance(present[0], int) else "float64"


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
    # The model may have another name now, and a set of PNG files may become larger.
    may_differ = {"model"}
    if settings["format"] in _FILE_FORMATS and _is_part_of(recorded, settings):
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


def _file_content(image: np.ndarray, format: str) -> bytes:
    """Return the content of a file of one image, (H, W, C)."""
    if format == "png":
        return png_bytes(_picture(image))
    planes, content = np.ascontiguousarray(image.transpose(2, 0, 1)), io.BytesIO()
    if format == "npy":
        np.save(content, planes)
    else:
        import tifffile

        # A plane for each channel, which no reader takes for colors.
        layout = "separate" if len(planes) > 1 else None
        tifffile.imwrite(content, planes, photometric="minisblack", metadata=None, planarconfig=layout)
    return content.getvalue()


def _read_file(path: Path) -> np.ndarray:
    """Return the image of a file, (H, W, C)."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return _pixels(image)
    if path.suffix == ".npy":
        planes = np.load(path)
    else:
        import tifffile

        planes = tifffile.imread(path)
    return (planes[None] if planes.ndim == 2 else planes).transpose(1, 2, 0)


def _cells(pixels: np.ndarray, seeds: Sequence[int], is_of_arrays: bool) -> tuple[Any, dict[str, Any]]:
    """Return the column of images of a parquet file, and what `datasets` calls it: pictures, or arrays (C, H, W)."""
    import pyarrow as pa

    if not is_of_arrays:
        pictures = map(_picture, pixels)
        images = [{"bytes": png_bytes(p), "path": f"{s:06d}.png"} for s, p in zip(seeds, pictures, strict=True)]
        return pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})), {"_type": "Image"}
    return column_of_arrays(pixels.transpose(0, 3, 1, 2))


def _picture(image: np.ndarray) -> Image.Image:
    """Return (H, W, C) uint8, or (H, W, 1) uint16, as a picture."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(image.height, image.width, -1)
