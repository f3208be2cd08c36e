"""Images that tell their number, on disk in every form that can be streamed, and what is read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.shard_batches import BlockStart, StreamBatches, newest_block_starts
from hf_ddpm.data.shards import ImageStream
from tests.support.image_data import png


def numbered_image(number: int, size: tuple[int, int] = (4, 4)) -> np.ndarray:
    """Return noise whose first two pixels tell a number below 65,536."""
    values = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
    values[0, :2] = divmod(number, 256)
    return values


def numbers_of(pixels: torch.Tensor) -> list[int]:
    """Return the numbers of a batch of numbered images, (B, C, R, R)."""
    values = pixels[:, 0, 0, :2].numpy().astype(int)
    return (values[:, 0] * 256 + values[:, 1]).tolist()


def save_parquet(folder: Path, sizes: list[int], group: int = 10, bad: tuple[int, ...] = ()) -> None:
    """Save numbered images in parquet files.

    Args:
        folder: Where to save them.
        sizes: The number of images in each file.
        group: The number of images in a row group.
        bad: The numbers of the images that cannot be decoded.
    """
    features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=["even", "odd"]))
    start = 0
    for i, size in enumerate(sizes):
        ids = range(start, start + size)
        encoded = [{"bytes": b"no image" if n in bad else png(numbered_image(n)), "path": f"{n}.png"} for n in ids]
        columns = {"image": encoded, "kind": [n % 2 for n in ids]}
        shard = datasets.Dataset.from_dict(columns, features=features)
        shard.to_parquet(folder / f"train-{i:05}.parquet", batch_size=group)
        start += size


def save_folder(folder: Path, count: int) -> None:
    """Save numbered images as PNG files in the folders `even` and `odd`."""
    for n in range(count):
        path = folder / ("odd" if n % 2 else "even") / f"{n:04}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(numbered_image(n)))


def stream_config(path: Path, **settings: Any) -> DataConfig:
    """Return settings to stream a folder, with a cache beside it; further settings override them."""
    defaults = {"dataset_name": str(path), "cache_dir": str(path.parent / "cache"), "streaming": True}
    return DataConfig(**{**defaults, "shuffle_buffer_images": 7, **settings})


def stream_batches(stream: ImageStream, **settings: Any) -> StreamBatches:
    """Return 10 micro-batches of 4 images on one process, from 4 substreams; settings override that."""
    defaults = {"seed": 3, "random_flip": False, "batch_size": 4, "accumulation_steps": 1, "rank": 0}
    defaults |= {"num_processes": 1, "first_position": 0, "num_steps": 10, "num_substreams": 4, "chunk_size": 4}
    return StreamBatches(stream, **{**defaults, "shuffle_buffer_images": 7, **settings})


def read_stream(
    stream: ImageStream,
    first: int,
    number: int,
    batch_size: int,
    num_processes: int,
    workers: int = 0,
    **settings: Any,
) -> tuple[dict[int, int], tuple[BlockStart, ...]]:
    """Read positions [first, first + number) of a stream of numbered images on several processes, one after another.

    Returns:
        The number of the image at each position, and the newest block start of each substream.
    """
    accumulation = settings.get("accumulation_steps", 1)
    content: dict[int, int] = {}
    block_starts: list[BlockStart] = []
    for rank in range(num_processes):
        dataset = stream_batches(
            stream,
            **settings,
            batch_size=batch_size,
            rank=rank,
            num_processes=num_processes,
            first_position=first,
            num_steps=number // (batch_size * num_processes * accumulation),
        )
        for batch in DataLoader(dataset, batch_size=None, num_workers=workers):
            content.update(zip(batch["positions"].tolist(), numbers_of(batch["pixels"]), strict=True))
            block_starts += batch["block_starts"]
    assert sorted(content) == list(range(first, first + number))
    return content, tuple(newest_block_starts(block_starts))
