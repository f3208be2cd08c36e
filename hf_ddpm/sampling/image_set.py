"""A set of images of a model, in a folder: what any number of processes write, and an interrupted run goes on with.

set           an image for each seed from the first on
samples.json  all that decides the images of a set; a folder holds one set
grid.png      the first GRID_IMAGES of them
part          a file of many images, which one process writes; of PNG files, each is of one image
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hf_ddpm.figures import grid, png_bytes, to_pil
from hf_ddpm.runtime.files import weights_sha256, write_atomically
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.sampling.sampler import FORWARD_BATCH, forward_batch_of, iter_samples, load_for_sampling, share
from hf_ddpm.sampling.schedulers import default_scheduler

FORMATS = ("png", "parquet", "npz")
GRID_IMAGES = 64
# A set is written in at most so many parts, unless that makes them large.
MAX_PARTS, MAX_PART_IMAGES = 64, 1024


def write_samples(
    model: str,
    out: Path,
    *,
    num_images: int,
    seed: int = 0,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    class_label: int | None = None,
    deterministic: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    uniform: bool = False,
    format: str = "png",
) -> None:
    """Samples a model into `out`: an image for each seed from `seed` on, and the first 64 of them as grid.png.

    Each process that was launched writes its share; what `out` holds of the same set is kept.

        format    files                                      lost when a process is killed
        png       000000.png, named by seed                  the images of a forward pass
        parquet   data/train-00000-of-00064.parquet, ...     a file; `datasets.load_dataset(out)` reads all of them
        npz       samples.npz: arr_0 (N,H,W,C), seeds        a 64th of the set, of at most 1024 images

    Args:
        model, num_inference_steps, scheduler, device, dtype, compile, uniform: as of `load_for_sampling`.
        class_label: default: each class in turn.
        deterministic, batch_size: as of `iter_samples`.
        format: a name in FORMATS.

    Raises:
        ValueError, OSError: before sampling, no such model, a setting that cannot work, or a folder of something else.
    """
    from accelerate import PartialState

    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # A process that is ready waits for the slowest.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    own: Any = state.device  # of this process, if there are several
    place = own if device in (None, own.type) else device
    pipeline, steps = load_for_sampling(model, scheduler, num_inference_steps, place, dtype, compile, uniform)
    unet = pipeline.unet
    if format != "npz" and unet.config.in_channels not in (1, 3, 4):
        raise ValueError(f"format must be 'npz' for images of {unet.config.in_channels} channels, got {format!r}")
    classes, labels = unet.config.num_class_embeds, None
    if classes is not None or class_label is not None:
        labels = [(seed + i) % (classes or 1) if class_label is None else class_label for i in range(num_images)]
    pipeline._check_inputs(1, None, "pt", ("latents",), deterministic)
    pipeline._conditions(labels and labels[:1], 1, pipeline.device)
    forward_batch = forward_batch_of(pipeline.device, batch_size)
    found = pipeline.searched(steps)
    settings = {
        "model": str(model),
        "weights_sha256": weights_sha256(Path(unet.config["_name_or_path"])),
        "scheduler": scheduler or default_scheduler(pipeline.scheduler.config, pipeline.searched_timesteps, steps),
        "num_inference_steps": steps,
        "timesteps": None if found is None else [*found.timesteps],
        "seed": seed,
        "num_images": num_images,
        "class_label": class_label,
        "deterministic": deterministic,
        "dtype": dtype or "fp32",
        "compile": compile,
        "format": format,
        "device": pipeline.device.type,
        "forward_batch": forward_batch,
    }
    samples = (
        _Pngs(out, seed, labels, num_images) if format == "png" else _Parts(out, seed, labels, num_images, format)
    )

    def claim() -> None:
        _check_folder(out, settings, samples.existing())
        write_atomically(out / "samples.json", json.dumps(settings, indent=2) + "\n")

    # By one process, before any of them writes: an image without samples.json is of something else.
    processes = Processes()
    processes.require_equal(settings, "model and settings")
    processes.on_main(claim)
    mine = share(num_images, state.process_index, state.num_processes, samples.block or forward_batch)
    missing = samples.missing(mine)
    batches = iter_samples(
        pipeline,
        [seed + i for i in missing],
        batch_size=batch_size,
        num_inference_steps=steps,
        class_labels=None if labels is None else [labels[i] for i in missing],
        deterministic=deterministic,
    )
    of_all = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    done = len(mine) - len(missing)
    with tqdm(
        total=len(mine), initial=done, unit="image", desc=f"Sampling{of_all}", disable=not state.is_main_process
    ) as bar:
        for seeds, images in batches:
            samples.add([s - seed for s in seeds], images.permute(0, 2, 3, 1).numpy())
            bar.update(len(seeds))
    state.wait_for_everyone()
    if state.is_main_process:
        first = samples.finish()
        if unet.config.in_channels in (1, 3, 4):
            write_atomically(out / "grid.png", png_bytes(grid(to_pil(np.stack(first).transpose(0, 3, 1, 2)))))
    state.destroy_process_group()


class _Pngs:
    """A set as one PNG file per image."""

    block = None

    def __init__(self, out: Path, seed: int, labels: Sequence[int] | None, count: int):
        self.out, self.count = out, count
        self.names = [f"{seed + i:06d}.png" for i in range(count)]

    def existing(self) -> list[Path]:
        there = set(os.listdir(self.out)) if self.out.is_dir() else set()
        return [self.out / name for name in ["grid.png", *self.names] if name in there]

    def missing(self, indices: Sequence[int]) -> list[int]:
        there = set(self.existing())
        return [i for i in indices if self.out / self.names[i] not in there]

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        for i, image in zip(indices, to_pil(images.transpose(0, 3, 1, 2)), strict=True):
            write_atomically(self.out / self.names[i], png_bytes(image))

    def finish(self) -> list[np.ndarray]:
        found = []
        for name in self.names[:GRID_IMAGES]:
            with Image.open(self.out / name) as image:
                found.append(np.asarray(image).reshape(image.height, image.width, -1))
        return found


class _Parts:
    """A set as files of many images: Parquet, or NumPy files that become one."""

    def __init__(self, out: Path, seed: int, labels: Sequence[int] | None, count: int, format: str):
        self.out, self.seed, self.labels, self.count, self.format = out, seed, labels, count, format
        self.block = min(MAX_PART_IMAGES, FORWARD_BATCH * -(-count // (MAX_PARTS * FORWARD_BATCH)))
        num = -(-count // self.block)
        stem = "data/train" if format == "parquet" else "parts/part"
        self.files = [out / f"{stem}-{k:05d}-of-{num:05d}.{format}" for k in range(num)]
        self.whole = out / "samples.npz"
        self.unwritten: dict[int, np.ndarray] = {}

    def existing(self) -> list[Path]:
        return [path for path in [self.out / "grid.png", self.whole, *self.files] if path.exists()]

    def missing(self, indices: Sequence[int]) -> list[int]:
        there = set(self.existing())
        return [] if self.whole in there else [i for i in indices if self.files[i // self.block] not in there]

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        self.unwritten.update(zip(indices, images, strict=True))
        for part in sorted({i // self.block for i in self.unwritten}):
            members = range(part * self.block, min((part + 1) * self.block, self.count))
            if all(i in self.unwritten for i in members):
                pixels = np.stack([self.unwritten.pop(i) for i in members])
                encode = self._parquet if self.format == "parquet" else self._npz
                write_atomically(self.files[part], encode(members, pixels))

    def _npz(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        columns = {"arr_0": pixels, "seeds": np.array([self.seed + i for i in members])}
        if self.labels is not None:
            columns["labels"] = np.array([self.labels[i] for i in members])
        content = io.BytesIO()
        np.savez(content, **columns)  # pyright: ignore[reportArgumentType]
        return content.getvalue()

    def _parquet(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        seeds = [self.seed + i for i in members]
        pictures = to_pil(pixels.transpose(0, 3, 1, 2))
        images = [{"bytes": png_bytes(p), "path": f"{s:06d}.png"} for s, p in zip(seeds, pictures, strict=True)]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {"image": pa.array(images, kind), "seed": pa.array(seeds, pa.int64())}
        integer = {"dtype": "int64", "_type": "Value"}
        features = {"image": {"_type": "Image"}, "seed": integer}
        if self.labels is not None:
            columns["label"] = pa.array([self.labels[i] for i in members], pa.int64())
            features["label"] = integer
        # As `datasets` writes it, which takes the column for an image by this alone.
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        content = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), content)
        return content.getvalue()

    def finish(self) -> list[np.ndarray]:
        if self.format == "parquet":
            import pyarrow.parquet as pq

            found: list[np.ndarray] = []
            for path in self.files[: -(-GRID_IMAGES // self.block)]:
                for image in pq.read_table(path, columns=["image"])["image"].to_pylist():
                    with Image.open(io.BytesIO(image["bytes"])) as opened:
                        found.append(np.asarray(opened).reshape(opened.height, opened.width, -1))
            return found[:GRID_IMAGES]
        if not self.whole.exists():
            parts = [np.load(path)["arr_0"] for path in self.files]
            write_atomically(self.whole, self._npz(range(self.count), np.concatenate(parts)))
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        return [*np.load(self.whole)["arr_0"][:GRID_IMAGES]]


def _check_folder(out: Path, settings: dict[str, Any], existing: Sequence[Path]) -> None:
    """Raises: ValueError if `out` holds another set, or `existing` files that are of none."""
    try:
        before = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if existing:
            raise ValueError(
                f"{existing[0]} would be overwritten: choose another folder than {str(out)!r} or another seed"
            ) from None
        return
    # A set of PNG files may grow, and what a model is called changes nothing.
    grows = settings["format"] == "png" and before.get("num_images", 0) <= settings["num_images"]
    free = {"model", "num_images"} if grows else {"model"}
    if differing := [key for key in settings if key not in free and before.get(key) != settings[key]]:
        was = ", ".join(f"{key}={before.get(key)!r}" for key in differing)
        now = ", ".join(f"{key}={settings[key]!r}" for key in differing)
        raise ValueError(f"{out} holds samples with {was}, got {now}: choose another folder, or those settings")
