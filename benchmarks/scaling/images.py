"""The cost of many images: their order, crops, flips and draws; listing, dividing and decoding them."""

from __future__ import annotations

import io
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import disable_progress_bars
from huggingface_hub import utils as hub_bars
from PIL import Image
from pyarrow import parquet

from benchmarks.scaling.apart import MIB, held_bytes, peak_of_memory, processor_seconds
from hf_ddpm.data.batches import MicroBatches
from hf_ddpm.data.cache import read_cache
from hf_ddpm.data.image_folder import list_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.tables import divide_training, open_table
from hf_ddpm.runtime.seeds import image_draws
from hf_ddpm.training.config import TrainingConfig

BATCH, NUM_BATCHES, FILES_PER_FOLDER = 32, 200, 100
HEIGHT, WIDTH, RESOLUTION = 4, 5, 4


def write_cache(folder: Path, num_images: int) -> None:
    """Write the cache of black images, whose pixels and labels take no room on the disk."""
    folder.mkdir()
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", "<i8", (num_images, 3))
    index[:, 0] = np.arange(num_images) * HEIGHT * WIDTH
    index[:, 1:] = HEIGHT, WIDTH
    np.lib.format.open_memmap(folder / "labels.npy", "w+", "<i8", (num_images,))
    size = num_images * HEIGHT * WIDTH
    with open(folder / "pixels.bin", "wb") as file:
        file.truncate(size)
    meta = {"channels": 1, "max_value": 255, "resolution": RESOLUTION, "random_crop": True, "class_names": None}
    meta |= {"label_columns": None, "num_bad": 0, "losses": {}, "limits": [0, 0], "file_max": 255}
    meta |= {"fingerprint": "", "dtype": "|u1", "size": size, "license": None}
    (folder / "meta.json").write_text(json.dumps(meta))


def measure_order(folder: str, num_images: int, num_processes: int) -> dict[str, Any]:
    """Measure the micro-batches of the last of some processes: the first ones of two epochs, and others."""
    before = held_bytes()
    images = read_cache(Path(folder), "images")
    settings: dict[str, Any] = {"seed": 0, "random_flip": True, "batch_size": BATCH, "accumulation_steps": 1}
    settings |= {"rank": num_processes - 1, "num_processes": num_processes, "num_steps": NUM_BATCHES + 1}
    new = MicroBatches(images, first_position=0, **settings)
    seconds = [processor_seconds(lambda k=k: new[k]) for k in range(NUM_BATCHES)]
    resumed = MicroBatches(images, first_position=9 * num_images + num_images // 2, **settings)
    resumed_seconds = processor_seconds(lambda: resumed[0])
    return {
        "first_seconds": seconds[0],
        "seconds": statistics.median(seconds[1:]),
        "resumed_seconds": resumed_seconds,
        "bytes": held_bytes() - before,
    }


def measure_draws(position: int) -> float:
    """Return the median seconds of t and eps of a batch of 32x32 colors, from a position of the stream on."""
    positions = torch.arange(BATCH) + position
    draws = [processor_seconds(lambda: image_draws(0, positions, (3, 32, 32), "cpu")) for _ in range(20)]
    return statistics.median(draws)


def png_bytes(number: int) -> bytes:
    """Return an image of which no two are alike: its pixels spell a number."""
    buffer = io.BytesIO()
    pixels = np.array([number, number], ">u8").view(np.uint8).reshape(4, 4)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_folder(folder: Path, num_images: int) -> None:
    """Write images into folders of a hundred each."""
    for first in range(0, num_images, FILES_PER_FOLDER):
        (folder / f"{first:08}").mkdir(parents=True)
        for number in range(first, min(num_images, first + FILES_PER_FOLDER)):
            (folder / f"{first:08}" / f"{number:08}.png").write_bytes(png_bytes(number))


def write_parquet(folder: Path, num_images: int) -> None:
    """Write images into one parquet file, with a column of groups of a hundred."""
    folder.mkdir()
    numbers = range(num_images)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array(({"bytes": png_bytes(n), "path": None} for n in numbers), kind)
    table = pa.table({"image": cells, "group": pa.array(f"{n // 100}" for n in numbers)})
    parquet.write_table(table, folder / "train.parquet", row_group_size=1000)


WRITERS = {"files": write_folder, "parquet": write_parquet}


def works_of(kind: str, is_decoded: bool) -> list[str]:
    """Return what is done with the images of a kind of data before the first step."""
    first = "listed" if kind == "files" else "opened by `datasets`"
    return [
        first,
        "divided by groups",
        "divided by images",
        *(["decoded", "found in the cache"] if is_decoded else []),
    ]


def measure_start(folder: str, kind: str, work: str) -> dict[str, float]:
    """Measure one work of `works_of`, by its seconds and memory; those before it have been done."""
    disable_progress_bars()
    hub_bars.disable_progress_bars()
    source: Any = {"train_data_dir": folder} if kind == "files" else {"dataset_name": folder}
    config = TrainingConfig(**source, cache_dir=f"{folder}-cache", resolution=RESOLUTION)
    groups = "folder" if kind == "files" else "group"
    works = {
        "listed": lambda: list_images(Path(folder)),
        "opened by `datasets`": lambda: open_table(config),
        "divided by groups": lambda: divide_training(replace(config, eval_fraction=0.1, group_column=groups)),
        "divided by images": lambda: divide_training(replace(config, eval_fraction=0.1)),
        "decoded": lambda: load_images(config),
        "found in the cache": lambda: load_images(config),
    }
    with peak_of_memory() as peak:
        seconds = processor_seconds(works[work])
    return {"seconds": seconds, "MiB": peak.added / MIB}
