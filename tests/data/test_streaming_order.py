"""Streaming: which image stands at each position, whoever reads it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ddpm.data.shard_batches import newest_block_starts
from hf_ddpm.data.shards import ImageStream, open_stream
from hf_ddpm.runtime.errors import RunError
from hf_ddpm.runtime.seeds import FLIP, IMAGE, LEFT, STEP, TOP, hashed_uniform
from tests.support.image_data import png
from tests.support.streams import (
    numbered_image,
    numbers_of,
    read_stream,
    save_parquet,
    stream_batches,
    stream_config,
)

# A machine may have fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


SOURCES = {"shards": [19, 8, 1, 15, 30], "few_shards": [31, 22], "one_shard": [40], "few_images": [2]}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SOURCES.values(), ids=list(SOURCES))
def test_epoch_of_all_substreams_holds_each_image_once(folder: Path, sizes: list[int]) -> None:
    save_parquet(folder, sizes)
    stream = open_stream(stream_config(folder))
    assert stream.num_images == sum(sizes)
    seen: dict[int, list[int]] = {}
    for substream in range(4):
        layout: dict[str, Any] = {"batch_size": 1, "chunk_size": 1, "num_processes": 4, "rank": substream}
        for batch in stream_batches(stream, **layout, num_steps=10**6):
            (start,) = batch["block_starts"]
            assert start.substream == substream
            if start.epoch >= 3:
                break
            seen.setdefault(start.epoch, []).extend(numbers_of(batch["pixels"]))
    assert {epoch: sorted(ids) for epoch, ids in seen.items()} == {e: list(range(sum(sizes))) for e in range(3)}
    assert seen[0] != seen[1] or sum(sizes) < 10


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "workers"), [([19, 8, 1, 15, 30], 2), ([31, 22], 0)], ids=["shards", "few_shards"])
def test_stream_does_not_depend_on_layout_and_interruption(folder: Path, sizes: list[int], workers: int) -> None:
    save_parquet(folder, sizes)
    stream = open_stream(stream_config(folder))
    whole, _ = read_stream(stream, 0, 192, batch_size=4, num_processes=1)
    layout = {"batch_size": 4, "num_processes": 2, "workers": workers}  # with 4 substreams and chunks of 4
    assert read_stream(stream, 0, 192, **layout)[0] == whole
    assert read_stream(stream, 0, 192, batch_size=6, num_processes=2, accumulation_steps=2)[0] == whole
    assert read_stream(stream, 0, 192, batch_size=8, num_processes=1, workers=workers // 2)[0] == whole

    for first in (16, 112):  # in the first epoch, and in a later one
        before, starts = read_stream(stream, 0, first, **layout)
        assert [start.substream for start in starts] == [0, 1, 2, 3]
        shared = {"batch_size": 5, "num_processes": 1, "workers": workers}
        for other_layout in ({"batch_size": 4, "num_processes": 2}, shared):
            fresh = open_stream(stream_config(folder))
            after, later_starts = read_stream(fresh, first, 40, **other_layout, block_starts=starts)
            assert before | after == {p: whole[p] for p in range(first + 40)}
            # Once more, from the block starts of a layout whose workers share substreams.
            resumed, _ = read_stream(fresh, first + 40, 40, batch_size=4, num_processes=1, block_starts=later_starts)
            assert resumed == {p: whole[p] for p in range(first + 40, first + 80)}
        assert read_stream(stream, first, 40, batch_size=4, num_processes=1)[0].items() <= whole.items()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[16, 16, 16, 16], [41, 23]], ids=["shards", "few_shards"])
def test_epoch_holds_each_image_once_while_the_layout_changes(folder: Path, sizes: list[int]) -> None:
    """Four substreams of one length, so that their epochs end together."""
    save_parquet(folder, sizes)
    first, content, starts = 0, {}, ()
    layouts = (24, 4, 3, 1), (30, 3, 5, 2), (37, 37, 1, 1), (37, 1, 1, 1)
    for number, batch_size, num_processes, accumulation in layouts:
        stream = open_stream(stream_config(folder))
        part, new_starts = read_stream(
            stream, first, number, batch_size, num_processes, block_starts=starts, accumulation_steps=accumulation
        )
        content |= part
        starts = tuple(newest_block_starts((*starts, *new_starts)))
        first += number
    for epoch in range(2):
        assert sorted(content[p] for p in range(64 * epoch, 64 * epoch + 64)) == list(range(64))


class Part(NamedTuple):
    """A part of a run: how many steps it takes, and how it divides the stream."""

    num_steps: int
    batch_size: int
    accumulation_steps: int
    num_processes: int
    workers: int


@pytest.fixture(scope="module")
def open_layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ImageStream]:
    """A function: sizes of files, rows per row group -> a stream of numbered images in such files."""

    @cache
    def open_once(sizes: tuple[int, ...], row_group: int) -> ImageStream:
        folder = tmp_path_factory.mktemp("layout")
        save_parquet(folder, list(sizes), group=row_group)
        return open_stream(stream_config(folder))

    return open_once


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.sampled_from([(1,), (9,), (4, 3), (3, 1, 5, 2)]),
    row_groups=st.sampled_from([(2, 9), (9, 2)]),
    rows_are_counted=st.tuples(st.booleans(), st.booleans()),
    order=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 3),
            "num_substreams": st.integers(1, 5),
            "chunk_size": st.integers(1, 4),
            "shuffle_buffer_images": st.integers(1, 6),
        }
    ),
    parts=st.lists(
        st.builds(
            Part,
            num_steps=st.integers(1, 5),
            batch_size=st.integers(1, 4),
            accumulation_steps=st.integers(1, 2),
            num_processes=st.integers(1, 2),
            workers=st.sampled_from([0, 0, 0, 0, 1, 2]),  # To start workers takes time.
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_order_of_a_stream_does_not_depend_on_its_layout(
    open_layout: Callable[..., ImageStream],
    sizes: tuple[int, ...],
    row_groups: tuple[int, int],
    rows_are_counted: tuple[bool, bool],
    order: dict[str, int],
    parts: list[Part],
) -> None:
    """Neither row groups, nor batches, processes and workers, nor interruptions between parts of a run change it."""
    whole, divided = (
        replace(stream, rows_per_shard=stream.rows_per_shard.copy() if is_counted else np.full(len(sizes), -1))
        for stream, is_counted in zip(
            [open_layout(sizes, row_group) for row_group in row_groups], rows_are_counted, strict=True
        )
    )
    first, starts, content = 0, (), {}
    for part in parts:
        number = part.num_steps * part.batch_size * part.accumulation_steps * part.num_processes
        new_content, new_starts = read_stream(
            divided,
            first,
            number,
            part.batch_size,
            part.num_processes,
            part.workers,
            accumulation_steps=part.accumulation_steps,
            block_starts=starts,
            **order,
        )
        content |= new_content
        starts = tuple(newest_block_starts((*starts, *new_starts)))
        first += number
    assert read_stream(whole, 0, first, batch_size=1, num_processes=1, **order)[0] == content


@pytest.mark.slow
def test_stream_does_not_depend_on_whether_row_counts_are_known(folder: Path) -> None:
    save_parquet(folder, [19, 8, 1, 15, 30])
    stream = open_stream(stream_config(folder))
    for num_substreams in (2, 8):
        layout: dict[str, Any] = {"batch_size": 4, "num_processes": 1, "num_substreams": num_substreams}
        whole, _ = read_stream(stream, 0, 160, **layout)
        for first in (60, 132):
            unknown = open_stream(stream_config(folder))
            unknown.rows_per_shard[:] = -1  # as for a data set on the Hub
            _, starts = read_stream(unknown, 0, first, **layout)
            for known_starts in (starts, ()):
                unknown.rows_per_shard[:] = -1
                rest, _ = read_stream(unknown, first, 28, **layout, block_starts=known_starts)
                assert rest.items() <= whole.items()


@pytest.mark.slow
def test_seed_substreams_and_buffer_decide_the_order(folder: Path) -> None:
    save_parquet(folder, [40, 40, 40, 40])
    stream = open_stream(stream_config(folder))
    variants: list[dict[str, Any]] = [{}, {"seed": 4}, {"num_substreams": 2}, {"shuffle_buffer_images": 40}]
    orders = [list(read_stream(stream, 0, 80, batch_size=4, num_processes=1, **v)[0].values()) for v in variants]
    assert len({tuple(order) for order in orders}) == len(variants)
    assert orders[0] == list(read_stream(stream, 0, 80, batch_size=4, num_processes=1)[0].values())
    unshuffled = list(read_stream(stream, 0, 40, 4, 1, num_substreams=1, shuffle_buffer_images=1)[0].values())
    assert unshuffled == list(range(unshuffled[0], unshuffled[0] + 40))  # one shard, in its own order


def test_worker_opens_only_the_shards_of_its_substream(folder: Path) -> None:
    save_parquet(folder, [30, 30, 30, 30, 30, 30, 30, 30])
    stream = open_stream(stream_config(folder))
    first, starts = read_stream(stream, 0, 40, batch_size=5, num_processes=1, num_substreams=4, chunk_size=5)
    order = np.random.default_rng((3, 11, 0)).permutation(8)
    substream = 2
    own_shards = {int(shard) for shard in order[substream::4]}
    assert {first[p] // 30 for p in first if p // 5 % 4 == substream} <= own_shards
    for i, file in enumerate(stream.files):
        if i not in own_shards:
            Path(file).unlink()
    layout: dict[str, Any] = {"num_processes": 4, "rank": substream, "batch_size": 5, "chunk_size": 5}
    ids = [n for batch in stream_batches(stream, **layout, num_steps=12) for n in numbers_of(batch["pixels"])]
    assert sorted(ids) == sorted(30 * shard + i for shard in own_shards for i in range(30))
    resumed = next(iter(stream_batches(stream, **layout, first_position=40, block_starts=starts)))
    assert numbers_of(resumed["pixels"]) == ids[10:15]
    with pytest.raises(RunError, match=r"train-0000\d\.parquet.*FileNotFoundError.*put it back as it was"):
        next(iter(stream_batches(stream, **{**layout, "rank": 1})))


def test_shards_before_the_start_are_not_opened(folder: Path) -> None:
    save_parquet(folder, [30, 30, 30, 30])
    stream = open_stream(stream_config(folder))
    batches = list(stream_batches(stream, num_substreams=1, num_steps=30))
    order = np.random.default_rng((3, 11, 0)).permutation(4)
    for shard in order[:3]:
        Path(stream.files[shard]).unlink()
    # With known numbers of rows no block start is needed; only a block may begin before the start.
    last = stream_batches(stream, num_substreams=1, first_position=100, num_steps=5)
    assert all(torch.equal(b["pixels"], a["pixels"]) for a, b in zip(batches[25:], last, strict=True))
    # Without them, the nearest of several block starts is used.
    starts = tuple(start for i in (0, 25, 10) for start in batches[i]["block_starts"])
    stream.rows_per_shard[:] = -1
    last = stream_batches(stream, num_substreams=1, first_position=104, num_steps=4, block_starts=starts)
    assert all(torch.equal(b["pixels"], a["pixels"]) for a, b in zip(batches[26:], last, strict=True))


def test_each_shuffle_block_has_its_own_permutation(folder: Path) -> None:
    save_parquet(folder, [40])
    stream = open_stream(stream_config(folder))
    orders = set()
    for num_substreams, substream in ((1, 0), (2, 0), (2, 1)):
        layout: dict[str, Any] = {
            "num_substreams": num_substreams,
            "num_processes": num_substreams,
            "rank": substream,
        }
        layout |= {"batch_size": 10, "chunk_size": 10, "shuffle_buffer_images": 10, "num_steps": 4 // num_substreams}
        for batch in stream_batches(stream, **layout):
            orders.add(tuple(np.argsort(numbers_of(batch["pixels"])).tolist()))
    assert len(orders) == 4 + 2  # those of substream 0 of 2 are the first two of substream 0 of 1


def test_row_groups_before_a_block_start_are_not_read(folder: Path) -> None:
    save_parquet(folder, [60], group=10)
    stream = open_stream(stream_config(folder))
    layout: dict[str, Any] = {"num_substreams": 1, "shuffle_buffer_images": 5, "batch_size": 5}
    whole = list(stream_batches(stream, **layout))
    content = bytearray(Path(stream.files[0]).read_bytes())
    second_group = content.index(png(numbered_image(10))[8:])
    content[4:second_group] = bytes(second_group - 4)
    Path(stream.files[0]).write_bytes(content)
    with pytest.raises(RunError, match=r"train-00000\.parquet"):
        next(iter(stream_batches(stream, **layout)))
    starts = tuple(whole[4]["block_starts"])
    resumed = next(iter(stream_batches(stream, **layout, first_position=25, block_starts=starts)))
    assert torch.equal(resumed["pixels"], whole[5]["pixels"])


@pytest.mark.slow
def test_memory_does_not_keep_what_was_read_of_a_file(folder: Path) -> None:
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / "a.parquet", schema, compression="none", use_dictionary=False) as writer:
        for _ in range(40):
            rows = [{"bytes": png(numbered_image(0)) + rng.bytes(100_000), "path": None} for _ in range(10)]
            writer.write_table(pa.table({"image": rows}, schema=schema))
    stream = open_stream(stream_config(folder))
    tracemalloc.start()
    num_rows = sum(len(table) for table in stream.tables(0, 0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 400
    assert peak < 10_000_000  # of 40 MB


def test_oblong_images_get_a_new_crop_at_each_position(folder: Path) -> None:
    values = numbered_image(0, (20, 31))
    for i in range(20):
        (folder / f"{i:02}.png").write_bytes(png(values))
    stream = open_stream(stream_config(folder, resolution=20))
    assert stream.image(0).shape == (1, 20, 31)
    batches = stream_batches(stream, batch_size=200, num_substreams=1)
    pixels = next(iter(batches))["pixels"].numpy()
    lefts = [next(left for left in range(12) if np.array_equal(p[0], values[:, left : left + 20])) for p in pixels]
    assert set(lefts) == set(range(12))
    few = next(iter(stream_batches(stream, batch_size=20, first_position=100)))["pixels"].numpy()
    assert np.array_equal(few, pixels[100:120])
    square = open_stream(stream_config(folder, resolution=20, center_crop=True))
    assert np.array_equal(square.image(0)[0], values[:, 6:26])


def test_flips_are_a_function_of_the_position(folder: Path) -> None:
    for i in range(20):
        (folder / f"{i:02}.png").write_bytes(png(numbered_image(1)))
    stream = open_stream(stream_config(folder))
    pixels = next(iter(stream_batches(stream, random_flip=True, batch_size=160)))["pixels"].numpy()[:, 0]
    flipped = (pixels == numbered_image(1)[:, ::-1]).all((1, 2))
    assert np.array_equal(flipped, ~(pixels == numbered_image(1)).all((1, 2)))
    assert 50 < flipped.sum() < 110
    few = next(iter(stream_batches(stream, random_flip=True, first_position=40, batch_size=8)))["pixels"].numpy()[:, 0]
    assert np.array_equal(few, pixels[40:48])


def test_hashed_uniform_is_uniform_and_independent() -> None:
    positions = np.arange(100_000)
    u = hashed_uniform(0, FLIP, positions)
    assert u.dtype == np.float64
    assert 0 <= u.min() < 1e-3
    assert 0.999 < u.max() < 1
    assert np.abs(np.histogram(u, 16)[0] - 6250).max() < 6 * 80
    other_draws = [hashed_uniform(0, stream, positions) for stream in (TOP, LEFT, IMAGE, STEP)]
    for other in (*other_draws, hashed_uniform(1, FLIP, positions), np.roll(u, 1)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.015
        assert np.abs(np.histogram2d(u, other, 8)[0] - 100_000 / 64).max() < 6 * 40
    assert np.array_equal(hashed_uniform(0, FLIP, positions[500:510]), u[500:510])
    assert ((u * 2**53) % 2).mean() == pytest.approx(0.5, abs=0.01)  # the last of 53 bits


def test_batch_tells_the_block_starts_of_the_substreams_that_it_was_read_from(folder: Path) -> None:
    """A run that goes on with fewer readers has many substreams, of which each batch is read from a few."""
    save_parquet(folder, [30, 30, 30, 30])
    batches = list(stream_batches(open_stream(stream_config(folder)), num_substreams=4, chunk_size=4))
    assert [[start.substream for start in batch["block_starts"]] for batch in batches] == [[k % 4] for k in range(10)]
