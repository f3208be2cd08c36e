"""The order of the stream of cached images, and its micro-batches."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_ddpm.data.batches import epoch_order, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.images import load_images
from hf_ddpm.data.planes import random_crop
from tests.support.image_data import cache_config, micro_batches, noise, save_grays


@pytest.fixture
def seven_images(folder: Path) -> ImageCache:
    """Seven oblong images, so that crops, flips and the ends of epochs all take part."""
    lines = [f'{{"file_name": "{i}.png", "n": {i}}}\n' for i in range(7)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    for i in range(7):
        Image.fromarray(noise(8, 14, seed=i)).save(folder / f"{i}.png")
    return load_images(cache_config(folder, label_column="n", resolution=8))


def read_positions(images: ImageCache, num_processes: int, accumulation: int, batch_size: int, **changes: Any) -> Any:
    """Read 96 positions, or as the changes say, and put the micro-batches of all processes together by position."""
    settings = {
        "batch_size": batch_size,
        "accumulation_steps": accumulation,
        "num_processes": num_processes,
        "num_steps": 96 // (num_processes * accumulation * batch_size),
        "random_flip": True,
        **changes,
    }
    ranks = [list(micro_batches(images, rank=rank, **settings)) for rank in range(num_processes)]  # type: ignore[arg-type]
    batches = [ranks[rank][k] for k in range(len(ranks[0])) for rank in range(num_processes)]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize(
    ("num_processes", "accumulation", "batch_size"), [(2, 1, 4), (4, 2, 1), (1, 3, 16), (1, 1, 96)]
)
def test_stream_does_not_depend_on_how_it_is_cut(
    seven_images: ImageCache, num_processes: int, accumulation: int, batch_size: int
) -> None:
    wanted = read_positions(seven_images, 1, 1, 8)
    got = read_positions(seven_images, num_processes, accumulation, batch_size)
    assert torch.equal(got["positions"], torch.arange(96))
    assert all(torch.equal(got[key], wanted[key]) for key in ("pixels", "positions", "labels"))


def test_each_epoch_holds_each_image_once(seven_images: ImageCache) -> None:
    labels = read_positions(seven_images, 1, 1, 8)["labels"]
    epochs = labels[:91].reshape(13, 7)
    assert (epochs.sort(1).values == torch.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert epochs[3].tolist() == epoch_order(0, 3, 7).tolist()


def test_pixels_are_crops_of_the_image_at_the_position(seven_images: ImageCache) -> None:
    seen = read_positions(seven_images, 1, 1, 8)
    flips, lefts = [], set()
    for position, label, pixels in zip(seen["positions"], seen["labels"], seen["pixels"].numpy(), strict=True):
        i = epoch_order(0, int(position) // 7, 7)[int(position) % 7]
        assert i == label
        image = seven_images.image(int(i))
        candidates = [(left, image[:, :, left : left + 8]) for left in range(7)]
        matches = [(False, left) for left, crop in candidates if np.array_equal(pixels, crop)]
        matches += [(True, left) for left, crop in candidates if np.array_equal(pixels, crop[:, :, ::-1])]
        assert len(matches) == 1
        flips.append(matches[0][0])
        lefts.add(matches[0][1])
    assert 0.3 < np.mean(flips) < 0.7
    assert lefts == set(range(7))


def test_first_position_continues_the_stream(seven_images: ImageCache) -> None:
    whole = read_positions(seven_images, 1, 2, 4)
    rest = read_positions(seven_images, 1, 2, 4, first_position=40, num_steps=7)
    assert all(torch.equal(rest[key], whole[key][5 * 8 :]) for key in whole)


@pytest.mark.parametrize(("num_processes", "accumulation", "batch_size"), [(1, 1, 2), (2, 1, 1), (1, 2, 1)])
def test_extra_images_follow_those_of_the_step_in_its_epoch(
    seven_images: ImageCache, num_processes: int, accumulation: int, batch_size: int
) -> None:
    """They have their crops, flips and labels, are the same on all processes, and none is there twice."""
    whole = read_positions(seven_images, 1, 1, 8)
    settings = {"num_processes": num_processes, "accumulation_steps": accumulation, "batch_size": batch_size}
    for rank in range(num_processes):
        batches = micro_batches(
            seven_images, rank=rank, num_extra_images=5, random_flip=True, first_position=16, num_steps=8, **settings
        )
        for k, batch in enumerate(batches):  # type: ignore[arg-type]
            if k % accumulation:
                assert "extra_images" not in batch
                continue
            epoch, offset = divmod(16 + k // accumulation * 2, 7)
            positions = epoch * 7 + (offset + 2 + torch.arange(5)) % 7
            assert torch.equal(batch["extra_images"], whole["pixels"][positions])
            assert torch.equal(batch["extra_labels"], whole["labels"][positions])
            if offset < 6:  # a step within one epoch
                own = whole["labels"][7 * epoch + offset : 7 * epoch + offset + 2]
                assert sorted([*own.tolist(), *batch["extra_labels"].tolist()]) == list(range(7))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_change_batches(seven_images: ImageCache, method: str) -> None:
    batches = micro_batches(seven_images, random_flip=True, num_steps=5)
    loader = DataLoader(batches, batch_size=None, shuffle=False, num_workers=2, multiprocessing_context=method)
    for got, wanted in zip(loader, DataLoader(batches, batch_size=None), strict=True):
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_batches_of_square_images_follow_the_epoch_order(folder: Path) -> None:
    arrays = save_grays(folder, 5)
    images = load_images(cache_config(folder))
    assert images.is_uniform
    batch = micro_batches(images, batch_size=12)[0]
    ids = np.concatenate([epoch_order(0, epoch, 5) for epoch in range(3)])[:12]
    assert np.array_equal(batch["pixels"].numpy(), np.stack([arrays[i] for i in ids])[:, None])
    assert batch["pixels"].dtype == torch.uint8
    assert batch["positions"].dtype == torch.int64
    assert "labels" not in batch
    assert "extra_images" not in batch
    assert micro_batches(images, num_extra_images=3)[0].keys() == {"pixels", "positions", "extra_images"}


def test_order_flips_and_crops_are_those_of_a_generator_for_each_epoch(seven_images: ImageCache) -> None:
    """Positions out of the middle of epochs draw what a generator gives that draws for all images, one by one."""
    batches = micro_batches(seven_images, random_flip=True, seed=5, batch_size=11, first_position=24, num_steps=2)
    for batch in batches:  # type: ignore[arg-type]
        for position, label, pixels in zip(batch["positions"], batch["labels"], batch["pixels"].numpy(), strict=True):
            epoch, offset = divmod(int(position), 7)
            order, flip, crop = (np.random.default_rng((5, draw, epoch)) for draw in range(3))
            assert label == order.permutation(7)[offset]
            planes = random_crop(seven_images.image(int(label)), (8, 8), *crop.random((7, 2))[offset])
            assert np.array_equal(pixels, planes[:, :, ::-1] if flip.random(7)[offset] < 0.5 else planes)


@pytest.mark.parametrize("num_images", [200, 2**8, 2**16 + 1])
def test_order_in_few_bytes_is_that_of_eight(num_images: int) -> None:
    order = np.random.default_rng((3, 0, 5)).permutation(num_images)
    assert np.array_equal(epoch_order(3, 5, num_images), order)


def test_batch_of_many_images_takes_memory_for_their_order_alone(folder: Path) -> None:
    save_grays(folder, 1)
    one, count = load_images(cache_config(folder, resolution=4, random_crop=True)), 2**20
    images = replace(one, index=np.broadcast_to(one.index, (count, 3)))
    assert not images.is_uniform  # so that crops are drawn, too
    batches = micro_batches(images, random_flip=True, first_position=3 * count - 2, seed=7)
    tracemalloc.start()
    try:
        batches[0]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 2 * 4 * count < held < peak < 2.5 * 4 * count  # of two epochs, four bytes for each image


def test_epoch_order_is_a_permutation_of_its_own() -> None:
    order = epoch_order(3, 5, 1000)
    assert sorted(order) == list(range(1000))
    order[:] = 0  # the caller's own copy
    assert sorted(epoch_order(3, 5, 1000)) == list(range(1000))
    for other in (epoch_order(3, 6, 1000), epoch_order(4, 5, 1000)):
        assert not np.array_equal(other, epoch_order(3, 5, 1000))


def test_micro_batches_have_a_length(seven_images: ImageCache) -> None:
    batches = micro_batches(seven_images, accumulation_steps=3, first_position=48, num_steps=6)
    assert len(batches) == 18
    with pytest.raises(IndexError, match=r"\[0, 18\), got 18"):
        batches[18]


@pytest.mark.parametrize(("max_value", "dtype"), [(255, torch.uint8), (65535, torch.int32)])
def test_to_x_0_maps_the_range_to_minus_one_and_one(max_value: int, dtype: torch.dtype) -> None:
    x_0 = to_x_0(torch.tensor([0, max_value, max_value // 2], dtype=dtype), max_value)
    assert x_0.dtype == torch.float32
    assert x_0[:2].tolist() == [-1.0, 1.0]
    assert abs(x_0[2] + 1 / max_value) < 1e-6
