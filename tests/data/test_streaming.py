"""Streaming: what is at each position, however it is read, of every kind of source; damage."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from hf_ddpm.data.shard_batches import NUM_PLACE_COLUMNS, StreamBatches
from hf_ddpm.data.shards import ImageStream, open_stream
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.seeds import FLIP, IMAGE, LEFT, STEP, TOP, hashed_uniform
from hf_ddpm.training.checkpoint import verify
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.runs import differences

datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.usefixtures("quiet"),
    # on a machine with fewer cores than the workers of a test
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
NO_PLACES = np.empty((0, NUM_PLACE_COLUMNS), np.int64)


@pytest.fixture
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


def picture(number: int, size: tuple[int, int] = (4, 4)) -> np.ndarray:
    """An image that says its number."""
    values = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
    values[0, :2] = divmod(number, 256)
    return values


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(pixels: torch.Tensor) -> list[int]:
    values = pixels[:, 0, 0, :2].numpy().astype(int)
    return (values[:, 0] * 256 + values[:, 1]).tolist()


def save_parquet(folder: Path, sizes: list[int], group: int = 10, bad: tuple[int, ...] = ()) -> None:
    features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=["even", "odd"]))
    start = 0
    for i, size in enumerate(sizes):
        ids = range(start, start + size)
        cells = [{"bytes": b"no image" if n in bad else png(picture(n)), "path": f"{n}.png"} for n in ids]
        columns = {"image": cells, "kind": [n % 2 for n in ids]}
        shard = datasets.Dataset.from_dict(columns, features=features)
        shard.to_parquet(folder / f"train-{i:05}.parquet", batch_size=group)
        start += size


def save_folder(folder: Path, count: int) -> None:
    for n in range(count):
        path = folder / ("odd" if n % 2 else "even") / f"{n:04}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(picture(n)))


def config_of(path: Path, **settings: Any) -> TrainingConfig:
    defaults = {"dataset_name": str(path), "cache_dir": str(path.parent / "cache"), "streaming": True}
    return TrainingConfig(**{**defaults, "shuffle_buffer_images": 7, **settings})


def batches_of(stream: ImageStream, **settings: Any) -> StreamBatches:
    defaults = {"seed": 3, "random_flip": False, "batch_size": 4, "accumulation_steps": 1, "rank": 0}
    defaults |= {"num_processes": 1, "first_position": 0, "num_steps": 10, "num_lanes": 4, "chunk_size": 4}
    return StreamBatches(stream, **{**defaults, "shuffle_buffer_images": 7, "places": NO_PLACES, **settings})


def read(
    stream: ImageStream,
    first: int,
    number: int,
    batch_size: int,
    num_processes: int,
    workers: int = 0,
    **settings: Any,
) -> tuple[dict[int, int], np.ndarray]:
    """Position -> number of its image, over all processes, and the places that their batches told."""
    accumulation = settings.get("accumulation_steps", 1)
    content: dict[int, int] = {}
    places: dict[int, list[int]] = {}
    for rank in range(num_processes):
        dataset = batches_of(
            stream,
            **settings,
            batch_size=batch_size,
            rank=rank,
            num_processes=num_processes,
            first_position=first,
            num_steps=number // (batch_size * num_processes * accumulation),
        )
        for batch in DataLoader(dataset, batch_size=None, num_workers=workers):
            content.update(zip(batch["positions"].tolist(), numbers(batch["pixels"]), strict=True))
            for place in batch["places"].tolist():
                places[place[0]] = max(places.get(place[0], place), place, key=lambda p: p[1])
    assert sorted(content) == list(range(first, first + number))
    return content, np.array(list(places.values()))


# The order of the stream


SOURCES = {"shards": [19, 8, 1, 15, 30], "few_shards": [31, 22], "one_shard": [40], "few_images": [2]}


@pytest.mark.parametrize("sizes", SOURCES.values(), ids=list(SOURCES))
def test_each_epoch_of_all_lanes_holds_each_image_once(folder: Path, sizes: list[int]) -> None:
    save_parquet(folder, sizes)
    stream = open_stream(config_of(folder))
    assert stream.num_images == sum(sizes)
    seen: dict[int, list[int]] = {}
    for lane in range(4):
        settings: dict[str, Any] = {"batch_size": 1, "chunk_size": 1, "num_processes": 4, "rank": lane}
        for batch in batches_of(stream, **settings, num_steps=10**6):
            (place,) = batch["places"].tolist()
            assert place[0] == lane
            if place[2] >= 3:
                break
            seen.setdefault(place[2], []).extend(numbers(batch["pixels"]))
    assert {epoch: sorted(ids) for epoch, ids in seen.items()} == {e: list(range(sum(sizes))) for e in range(3)}
    assert seen[0] != seen[1] or sum(sizes) < 10


@pytest.mark.parametrize(("sizes", "workers"), [([19, 8, 1, 15, 30], 2), ([31, 22], 0)], ids=["shards", "few_shards"])
def test_layout_and_interruption_do_not_change_the_stream(folder: Path, sizes: list[int], workers: int) -> None:
    save_parquet(folder, sizes)
    stream = open_stream(config_of(folder))
    whole, _ = read(stream, 0, 192, batch_size=4, num_processes=1)
    layout = {"batch_size": 4, "num_processes": 2, "workers": workers}  # with 4 lanes of chunks of 4
    assert read(stream, 0, 192, **layout)[0] == whole
    assert read(stream, 0, 192, batch_size=6, num_processes=2, accumulation_steps=2)[0] == whole
    assert read(stream, 0, 192, batch_size=8, num_processes=1, workers=workers // 2)[0] == whole

    for first in (16, 112):  # in the first epoch, and in a later one
        before, places = read(stream, 0, first, **layout)
        assert {row[0] for row in places.tolist()} == {0, 1, 2, 3}
        shared = {"batch_size": 5, "num_processes": 1, "workers": workers}
        for other in ({"batch_size": 4, "num_processes": 2}, shared):
            fresh = open_stream(config_of(folder))
            after, more = read(fresh, first, 40, **other, places=places)
            assert before | after == {p: whole[p] for p in range(first + 40)}
            # once more, from places of a layout whose workers share lanes
            assert read(fresh, first + 40, 40, batch_size=4, num_processes=1, places=more)[0] == {
                p: whole[p] for p in range(first + 40, first + 80)
            }
        assert read(stream, first, 40, batch_size=4, num_processes=1)[0].items() <= whole.items()


@pytest.mark.parametrize("sizes", [[16, 16, 16, 16], [41, 23]], ids=["shards", "few_shards"])
def test_each_epoch_holds_each_image_once_though_the_layout_changes(folder: Path, sizes: list[int]) -> None:
    """Four lanes of one length, so that their epochs end together."""
    save_parquet(folder, sizes)
    first, content, places = 0, {}, {}
    layouts = (24, 4, 3, 1), (30, 3, 5, 2), (37, 37, 1, 1), (37, 1, 1, 1)
    for number, batch_size, num_processes, accumulation in layouts:
        given = np.array(list(places.values())).reshape(-1, NUM_PLACE_COLUMNS)
        stream, settings = open_stream(config_of(folder)), {"places": given, "accumulation_steps": accumulation}
        more, where = read(stream, first, number, batch_size, num_processes, **settings)
        content |= more
        places |= {place[0]: place for place in where.tolist()}
        first += number
    for epoch in range(2):
        assert sorted(content[p] for p in range(64 * epoch, 64 * epoch + 64)) == list(range(64))


def test_stream_does_not_depend_on_whether_row_counts_are_known(folder: Path) -> None:
    save_parquet(folder, [19, 8, 1, 15, 30])
    stream = open_stream(config_of(folder))
    for num_lanes in (2, 8):
        whole, _ = read(stream, 0, 160, batch_size=4, num_processes=1, num_lanes=num_lanes)
        for first in (60, 132):
            unknown = open_stream(config_of(folder))
            unknown.counts[:] = -1  # as of a data set on the Hub
            _, places = read(unknown, 0, first, batch_size=4, num_processes=1, num_lanes=num_lanes)
            for given in (places, NO_PLACES):
                unknown.counts[:] = -1
                rest = read(unknown, first, 28, batch_size=4, num_processes=1, num_lanes=num_lanes, places=given)[0]
                assert rest.items() <= whole.items()


def test_seed_lanes_and_block_decide_the_order(folder: Path) -> None:
    save_parquet(folder, [40, 40, 40, 40])
    stream = open_stream(config_of(folder))
    variants: list[dict[str, Any]] = [{}, {"seed": 4}, {"num_lanes": 2}, {"shuffle_buffer_images": 40}]
    orders = [list(read(stream, 0, 80, batch_size=4, num_processes=1, **v)[0].values()) for v in variants]
    assert len({tuple(order) for order in orders}) == len(variants)
    assert orders[0] == list(read(stream, 0, 80, batch_size=4, num_processes=1)[0].values())
    unshuffled = list(read(stream, 0, 40, 4, 1, num_lanes=1, shuffle_buffer_images=1)[0].values())
    assert unshuffled == list(range(unshuffled[0], unshuffled[0] + 40))  # one shard, in its order


def test_a_worker_opens_only_the_shards_of_its_lane(folder: Path) -> None:
    save_parquet(folder, [30, 30, 30, 30, 30, 30, 30, 30])
    stream = open_stream(config_of(folder))
    first, places = read(stream, 0, 40, batch_size=5, num_processes=1, num_lanes=4, chunk_size=5)
    order = np.random.default_rng((3, 11, 0)).permutation(8)
    lane = 2
    mine = {int(shard) for shard in order[lane::4]}
    assert {first[p] // 30 for p in first if p // 5 % 4 == lane} <= mine
    for i, file in enumerate(stream.files):
        if i not in mine:
            Path(file).unlink()
    settings: dict[str, Any] = {"num_processes": 4, "rank": lane, "batch_size": 5, "chunk_size": 5}
    ids = [n for batch in batches_of(stream, **settings, num_steps=12) for n in numbers(batch["pixels"])]
    assert sorted(ids) == sorted(30 * shard + i for shard in mine for i in range(30))
    resumed = next(iter(batches_of(stream, **settings, first_position=40, places=places)))
    assert numbers(resumed["pixels"]) == ids[10:15]
    with pytest.raises(RunError, match=r"train-0000\d\.parquet.*FileNotFoundError.*put it back as it was"):
        next(iter(batches_of(stream, **{**settings, "rank": 1})))


def test_what_comes_before_the_start_is_not_opened(folder: Path) -> None:
    save_parquet(folder, [30, 30, 30, 30])
    stream = open_stream(config_of(folder))
    batches = list(batches_of(stream, num_lanes=1, num_steps=30))
    order = np.random.default_rng((3, 11, 0)).permutation(4)
    for shard in order[:3]:
        Path(stream.files[shard]).unlink()
    # with known numbers of rows no place is needed, only a block may begin before the start
    last = batches_of(stream, num_lanes=1, first_position=100, num_steps=5)
    assert all(torch.equal(b["pixels"], a["pixels"]) for a, b in zip(batches[25:], last, strict=True))
    # without, the nearest of several places
    places = torch.cat([batches[i]["places"] for i in (0, 25, 10)]).numpy()
    stream.counts[:] = -1
    last = batches_of(stream, num_lanes=1, first_position=104, num_steps=4, places=places)
    assert all(torch.equal(b["pixels"], a["pixels"]) for a, b in zip(batches[26:], last, strict=True))


def test_blocks_and_lanes_are_permuted_differently(folder: Path) -> None:
    save_parquet(folder, [40])
    stream = open_stream(config_of(folder))
    orders = set()
    for num_lanes, lane in ((1, 0), (2, 0), (2, 1)):
        settings: dict[str, Any] = {"num_lanes": num_lanes, "num_processes": num_lanes, "rank": lane}
        settings |= {"batch_size": 10, "chunk_size": 10, "shuffle_buffer_images": 10, "num_steps": 4 // num_lanes}
        for batch in batches_of(stream, **settings):
            orders.add(tuple(np.argsort(numbers(batch["pixels"])).tolist()))
    assert len(orders) == 4 + 2  # those of lane 0 of 2 are the first two of lane 0 of 1


def test_row_groups_before_a_place_are_not_read(folder: Path) -> None:
    save_parquet(folder, [60], group=10)
    stream = open_stream(config_of(folder))
    settings: dict[str, Any] = {"num_lanes": 1, "shuffle_buffer_images": 5, "batch_size": 5}
    whole = list(batches_of(stream, **settings))
    content = bytearray(Path(stream.files[0]).read_bytes())
    content[4 : content.index(png(picture(10))[8:])] = bytes(content.index(png(picture(10))[8:]) - 4)
    Path(stream.files[0]).write_bytes(content)
    with pytest.raises(RunError, match=r"train-00000\.parquet"):
        next(iter(batches_of(stream, **settings)))
    resumed = next(iter(batches_of(stream, **settings, first_position=25, places=whole[4]["places"].numpy())))
    assert torch.equal(resumed["pixels"], whole[5]["pixels"])


def test_what_was_read_of_a_file_is_not_kept(folder: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / "a.parquet", schema, compression="none", use_dictionary=False) as writer:
        for _ in range(40):
            cells = [{"bytes": png(picture(0)) + rng.bytes(100_000), "path": None} for _ in range(10)]
            writer.write_table(pa.table({"image": cells}, schema=schema))
    stream = open_stream(config_of(folder))
    tracemalloc.start()
    num_rows = sum(len(table) for table in stream.tables(0, 0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 400
    assert peak < 10_000_000  # of 40 MB


# Kinds of sources


def test_image_folder(folder: Path) -> None:
    save_folder(folder, 300)
    (folder / "notes.txt").write_text("not an image")
    stream = open_stream(config_of(folder, label_column="label"))
    assert (stream.class_names, stream.num_classes, stream.num_images) == (["even", "odd"], 2, 300)
    assert (stream.name, stream.channels, stream.resolution, stream.max_value) == ("photos", 1, 4, 255)
    assert np.array_equal(stream.image(0)[0], picture(0))
    batches = list(batches_of(stream, batch_size=50, num_steps=6, num_lanes=1))
    ids = [n for batch in batches for n in numbers(batch["pixels"])]
    assert sorted(ids) == list(range(300))
    assert [n for batch in batches for n in batch["labels"].tolist()] == [n % 2 for n in ids]


def test_saved_by_datasets(folder: Path) -> None:
    save_parquet(folder, [150])
    saved = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), cache_dir=str(folder / "c"))
    saved["train"].to_parquet(folder / "all.parquet")
    target = folder.parent / "saved"
    datasets.DatasetDict({"train": saved["train"].select(range(10, 150))}).save_to_disk(str(target))
    stream = open_stream(config_of(target, label_column="kind"))
    assert (stream.num_images, len(stream.files)) == (140, 2)
    content, places = read(stream, 0, 140, batch_size=5, num_processes=1, workers=2, num_lanes=1)
    assert sorted(content.values()) == list(range(10, 150))
    again, _ = read(stream, 100, 40, batch_size=4, num_processes=1, num_lanes=1)
    assert again.items() <= content.items()
    assert len(places) == 1


def test_digits() -> None:
    stream = open_stream(TrainingConfig(dataset_name="digits", label_column="label", streaming=True))
    assert (stream.num_images, stream.num_classes, stream.license) == (1797, 10, "cc-by-4.0")
    batch = next(iter(batches_of(stream, batch_size=64)))
    assert batch["pixels"].shape == (64, 1, 8, 8)
    assert set(batch["labels"].tolist()) == set(range(10))


def test_parquet_without_metadata_and_with_binary_column(folder: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"pic": [png(picture(n)) for n in range(8)], "year": range(8)}), folder / "a.parquet")
    stream = open_stream(config_of(folder, image_column="pic"))
    content, _ = read(stream, 0, 8, batch_size=4, num_processes=1, num_lanes=1)
    assert sorted(content.values()) == list(range(8))
    with pytest.raises(UsageError, match=r"label_column must be a ClassLabel.*'year'.*leave out --streaming"):
        open_stream(config_of(folder, image_column="pic", label_column="year"))


def rows_of(parts: list[range]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from ({"image": {"bytes": png(picture(n)), "path": None}, "kind": n % 2} for n in part)


def test_examples_that_are_no_arrow_tables(folder: Path) -> None:
    """As `datasets` streams archives from the Hub: nothing is known but what is read."""
    save_parquet(folder, [30])
    stream = open_stream(config_of(folder, label_column="kind"))
    parts = {"parts": [range(0, 19), range(19, 24), range(24, 24), range(24, 60)]}
    rows = datasets.IterableDataset.from_generator(rows_of, features=stream.dataset.features, gen_kwargs=parts)
    stream = replace(stream, dataset=rows.with_format("arrow"), counts=np.full(4, -1), files=("",) * 4)
    for num_lanes in (2, 8):
        whole, _ = read(stream, 0, 160, batch_size=4, num_processes=1, num_lanes=num_lanes)
        assert sorted(set(whole.values())) == list(range(60))
        fresh = replace(stream, counts=np.full(4, -1))
        places = read(fresh, 0, 80, batch_size=4, num_processes=2, num_lanes=num_lanes)[1]
        fresh = replace(stream, counts=np.full(4, -1))
        assert read(fresh, 80, 40, 5, 1, num_lanes=num_lanes, places=places)[0].items() <= whole.items()


def test_fingerprint_is_of_files_and_settings_not_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_parquet(tmp_path / "a", [12, 5])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("beside")
    first = open_stream(config_of(tmp_path / "a")).fingerprint
    assert open_stream(config_of(tmp_path / "b", resolution=4, channels=1, on_bad_image="skip")).fingerprint == first
    assert open_stream(config_of(tmp_path / "b", label_column="kind")).fingerprint != first
    assert open_stream(config_of(tmp_path / "b", resolution=2)).fingerprint != first
    save_parquet(tmp_path / "b", [12, 6])
    assert open_stream(config_of(tmp_path / "b")).fingerprint != first
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
        save_folder(tmp_path / name, 5)
    assert open_stream(config_of(tmp_path / "c")).fingerprint == open_stream(config_of(tmp_path / "d")).fingerprint


@pytest.mark.parametrize("kind", ["parquet", "images"])
def test_pickle(folder: Path, kind: str) -> None:
    """What workers get that are not forked."""
    if kind == "parquet":
        save_parquet(folder, [12, 5])
    else:
        save_folder(folder, 17)
    batches = batches_of(open_stream(config_of(folder)))
    content = pickle.dumps(batches)
    assert len(content) < 20_000
    for here, there in zip(batches, pickle.loads(content), strict=True):
        assert all(torch.equal(here[name], there[name]) for name in here)


# Values


def test_uniform_numbers_are_uniform_and_independent() -> None:
    positions = np.arange(100_000)
    u = hashed_uniform(0, FLIP, positions)
    assert u.dtype == np.float64
    assert 0 <= u.min() < 1e-3
    assert 0.999 < u.max() < 1
    assert np.abs(np.histogram(u, 16)[0] - 6250).max() < 6 * 80
    others = [hashed_uniform(0, stream, positions) for stream in (TOP, LEFT, IMAGE, STEP)]
    for other in (*others, hashed_uniform(1, FLIP, positions), np.roll(u, 1)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.015
        assert np.abs(np.histogram2d(u, other, 8)[0] - 100_000 / 64).max() < 6 * 40
    assert np.array_equal(hashed_uniform(0, FLIP, positions[500:510]), u[500:510])
    assert ((u * 2**53) % 2).mean() == pytest.approx(0.5, abs=0.01)  # the last of 53 bits


def test_oblong_images_are_cropped_anew_each_time(folder: Path) -> None:
    values = picture(0, (20, 31))
    (folder / "a.png").write_bytes(png(values))
    stream = open_stream(config_of(folder, resolution=20))
    assert stream.image(0).shape == (1, 20, 31)
    batches = batches_of(stream, batch_size=200, num_lanes=1)
    pixels = next(iter(batches))["pixels"].numpy()
    lefts = [next(left for left in range(12) if np.array_equal(p[0], values[:, left : left + 20])) for p in pixels]
    assert set(lefts) == set(range(12))
    few = next(iter(batches_of(stream, batch_size=20, first_position=100)))["pixels"].numpy()
    assert np.array_equal(few, pixels[100:120])
    square = open_stream(config_of(folder, resolution=20, center_crop=True))
    assert np.array_equal(square.image(0)[0], values[:, 6:26])


def test_flips_are_a_function_of_the_position(folder: Path) -> None:
    (folder / "a.png").write_bytes(png(picture(1)))
    stream = open_stream(config_of(folder))
    pixels = next(iter(batches_of(stream, random_flip=True, batch_size=160)))["pixels"].numpy()[:, 0]
    flipped = (pixels == picture(1)[:, ::-1]).all((1, 2))
    assert np.array_equal(flipped, ~(pixels == picture(1)).all((1, 2)))
    assert 50 < flipped.sum() < 110
    few = next(iter(batches_of(stream, random_flip=True, first_position=40, batch_size=8)))["pixels"].numpy()[:, 0]
    assert np.array_equal(few, pixels[40:48])


def test_sixteen_bits(folder: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 4)).astype(np.uint16)
    (folder / "a.png").write_bytes(png(values))
    stream = open_stream(config_of(folder))
    batch = next(iter(batches_of(stream, num_lanes=1)))
    assert (stream.max_value, batch["pixels"].dtype) == (65535, torch.int32)
    assert np.array_equal(batch["pixels"][0, 0].numpy(), values)
    reduced = open_stream(config_of(folder, preserve_input_precision=False))
    assert next(iter(batches_of(reduced)))["pixels"].dtype == torch.uint8


def test_forms_that_come_after_the_first_headers(folder: Path) -> None:
    late = {
        "color": (np.zeros((4, 4, 3), np.uint8), r"channels must be given.*zz\.png\) has colors"),
        "size": (np.zeros((4, 5), np.uint8), r"resolution must be given.*zz\.png\) is 5x4"),
        "deep": (np.zeros((4, 4), np.uint16), r"preserve_input_precision must be off.*zz\.png.*--no_preserve"),
    }
    for name, (values, message) in late.items():
        path = folder.parent / name
        path.mkdir()
        for n in range(64):
            (path / f"{n:04}.png").write_bytes(png(picture(n)))
        (path / "zz.png").write_bytes(png(values))
        stream = open_stream(config_of(path))
        with pytest.raises(UsageError, match=message):
            list(batches_of(stream, num_lanes=1, num_steps=17))


# Damage


def test_unreadable_image_is_replaced_by_its_neighbor(folder: Path) -> None:
    bad = (0, 5, 6, 20, 29, 30)
    save_parquet(folder, [30, 20], bad=bad)
    stream = open_stream(config_of(folder, on_bad_image="skip", label_column="kind"))
    good, _ = read(stream, 0, 96, batch_size=4, num_processes=1)
    assert read(stream, 0, 96, batch_size=6, num_processes=2, workers=2)[0] == good
    assert not set(good.values()) & set(bad)
    batches = list(batches_of(stream, num_lanes=1, batch_size=50, chunk_size=50, num_steps=2))
    assert [int(batch["num_bad"]) for batch in batches] == [6, 6]
    assert all(batch["labels"].tolist() == [n % 2 for n in numbers(batch["pixels"])] for batch in batches)
    assert np.array_equal(stream.image(0)[0], picture(1))


def test_unreadable_image_is_named(folder: Path) -> None:
    save_parquet(folder, [70, 20], bad=(81,))
    stream = open_stream(config_of(folder))
    with pytest.raises(UsageError, match=r"row 11 \(81\.png in .*train-00001\.parquet\).*--on_bad_image skip"):
        list(batches_of(stream, num_steps=30))


def test_many_unreadable_images_in_a_row(folder: Path) -> None:
    save_parquet(folder, [64, 9, 120], bad=tuple(range(64, 73)))
    stream = open_stream(config_of(folder, on_bad_image="skip"))
    content, _ = read(stream, 0, 386, batch_size=1, num_processes=1, num_lanes=1)
    assert not set(content.values()) & set(range(64, 73))
    assert read(stream, 200, 180, batch_size=1, num_processes=1, num_lanes=1)[0].items() <= content.items()
    few, _ = read(stream, 0, 193, batch_size=1, num_processes=1, num_lanes=1, shuffle_buffer_images=3)
    assert sorted(set(few.values())) == [*range(64), *range(73, 193)]
    save_parquet(folder, [64, 9, 120], bad=tuple(range(64, 193)))
    stream = open_stream(config_of(folder, on_bad_image="skip"))
    with pytest.raises(UsageError, match=r"got \d+ unreadable ones in a row, up to row \d+ .*train-0000"):
        list(batches_of(stream, num_steps=48, num_lanes=1))


def test_vanished_image(folder: Path) -> None:
    save_folder(folder, 20)
    stream = open_stream(config_of(folder))
    (folder / "odd" / "0007.png").unlink()
    message = r"odd/0007\.png.*put it back as it was; with --on_bad_image skip"
    with pytest.raises(RunError, match=message):
        list(batches_of(stream, num_lanes=1))
    (folder / "odd" / "0007.png").write_bytes(png(picture(7)))
    stream = open_stream(config_of(folder, on_bad_image="skip"))
    (folder / "odd" / "0007.png").unlink()
    batch = next(iter(batches_of(stream, num_lanes=1, batch_size=20)))
    assert int(batch["num_bad"]) == 1


def test_too_little_memory_says_nothing_of_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(folder, 20)
    stream = open_stream(config_of(folder, on_bad_image="skip"))

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("hf_ddpm.data.decoding.to_planes", fails)
    with pytest.raises(UsageError, match=r"every image must be readable, got .*: MemoryError; try again"):
        stream.decode(next(stream.examples()))


def test_what_a_disk_fails_to_give_is_not_replaced(folder: Path) -> None:
    save_folder(folder, 20)
    stream = open_stream(config_of(folder, on_bad_image="skip"))
    (folder / "odd" / "0007.png").unlink()
    (folder / "odd" / "0007.png").mkdir()
    with pytest.raises(RunError, match=r"odd/0007\.png.*IsADirectoryError"):
        list(batches_of(stream, num_lanes=1))


def test_truncated_parquet(folder: Path) -> None:
    save_parquet(folder, [30, 20])
    stream = open_stream(config_of(folder))
    content = Path(stream.files[1]).read_bytes()
    Path(stream.files[1]).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"train-00001\.parquet cannot be read any more.*put it back"):
        list(batches_of(stream, num_lanes=1, num_steps=13))
    with pytest.raises(UsageError, match=r"must hold whole parquet files, got '.*train-00001\.parquet"):
        open_stream(config_of(folder))


def test_shard_that_got_shorter_is_not_a_shorter_epoch(folder: Path) -> None:
    save_parquet(folder, [30, 20])
    stream = open_stream(config_of(folder))
    place = np.array([[0, 0, 0, 0, 25]])
    save_parquet(folder, [12, 20])
    with pytest.raises(RunError, match=r"train-00000\.parquet.*has 12 rows and had 30"):
        list(batches_of(stream, num_lanes=1, num_steps=13))
    # where the number of rows was not known, what was read once, or a place in it, tells
    stream.counts[:] = -1
    batches = batches_of(stream, num_lanes=1, num_steps=100)
    iterator = iter(batches)
    for _ in range(12):  # more than an epoch, less than two
        next(iterator)
    save_parquet(folder, [12, 15])
    with pytest.raises(RunError, match=r"train-00001\.parquet.*has 15 rows and had 20"):
        list(iterator)
    stream.counts[:] = -1
    with pytest.raises(RunError, match="rows and had 26"):
        list(batches_of(stream, num_lanes=1, places=place))


@pytest.fixture
def run_config(tiny_settings: dict[str, Any], folder: Path) -> TrainingConfig:
    changes = {"train_data_dir": None, "dataset_name": str(folder), "cache_dir": str(folder.parent / "cache")}
    changes |= {"streaming": True, "shuffle_buffer_images": 4, "resolution": 8, "max_train_steps": 6}
    return TrainingConfig(**{**tiny_settings, **changes, "random_flip": True, "checkpointing_steps": 100})


def train_and_harm(config: TrainingConfig, harm: Callable[[], object], step: int) -> None:
    numbers = iter(range(1, 1000))
    hook = register_optimizer_step_post_hook(lambda *_: harm() if next(numbers) == step else None)
    try:
        train(config)
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["parquet", "images"])
def test_run_whose_data_are_harmed_goes_on_when_they_are_put_back(
    folder: Path, run_config: TrainingConfig, kind: str, tmp_path: Path
) -> None:
    """To the last bit as the run to whose data nothing happened."""
    if kind == "parquet":
        save_parquet(folder, [4, 4, 4, 4])
        path = folder / f"train-{np.random.default_rng((run_config.seed, 11, 0)).permutation(4)[3]:05}.parquet"
        content = path.read_bytes()
        harm = lambda: path.write_bytes(content[: len(content) // 2])  # noqa: E731
    else:
        save_folder(folder, 16)
        path = folder / "odd" / "0007.png"
        content, harm = path.read_bytes(), path.unlink
    train(replace(run_config, output_dir=str(tmp_path / "whole")))
    message = rf"{re.escape(str(path))}.* cannot be read any more: .*; put it back as it was"
    with pytest.raises(RunError, match=message) as raised:
        train_and_harm(run_config, harm, 1)
    said = str(raised.value)
    assert "\n" not in said
    step = re.search(r"ends after step (\d); the same command .*--resume_from_checkpoint latest goes on", said)[1]
    assert verify(Path(run_config.output_dir) / f"checkpoint-{step}") is None
    resumed = replace(run_config, resume_from_checkpoint="latest")
    with pytest.raises(UsageError, match="whole parquet files" if kind == "parquet" else "trained on other images"):
        train(resumed)
    path.write_bytes(content)
    train(resumed)
    assert not differences(tmp_path / "whole", Path(run_config.output_dir))


def test_run_passes_over_images_that_vanish(folder: Path, run_config: TrainingConfig) -> None:
    save_folder(folder, 16)
    vanished = [folder / "odd" / "0007.png", folder / "even" / "0012.png"]
    config = replace(run_config, on_bad_image="skip", max_train_steps=8)
    train_and_harm(config, lambda: [path.unlink() for path in vanished], 4)
    facts = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert facts["data"]["num_images"] == 16
    assert facts["data"]["num_bad_images"] == 2


# Wrong settings


def test_nothing_to_train_on(folder: Path) -> None:
    save_parquet(folder, [0])
    with pytest.raises(UsageError, match="dataset_name must hold images, got 'photos' with 0 rows"):
        open_stream(config_of(folder))
    save_parquet(folder, [3], bad=(0, 1, 2))
    with pytest.raises(UsageError, match="got 3 unreadable ones only"):
        open_stream(config_of(folder, on_bad_image="skip"))
    with pytest.raises(UsageError, match=r"row 0 \(0\.png in .*--on_bad_image skip"):
        open_stream(config_of(folder))


def test_data_that_become_empty_do_not_loop(folder: Path) -> None:
    save_parquet(folder, [20, 20])
    stream = open_stream(config_of(folder))
    save_parquet(folder, [0, 0])
    stream.counts[:] = -1
    with pytest.raises(RunError, match="has no images any more"):
        next(iter(batches_of(stream)))


def test_columns(folder: Path) -> None:
    save_parquet(folder, [3])
    for settings, message in (
        ({"image_column": "pic"}, r"image_column must be one of \['image'\], got 'pic'"),
        ({"image_column": "kind"}, "image_column must hold images, got 'kind'"),
        ({"label_column": "no"}, r"label_column must be one of \['image', 'kind'\], got 'no'"),
    ):
        with pytest.raises(UsageError, match=message):
            open_stream(config_of(folder, **settings))


def test_data_set_on_the_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = TrainingConfig(dataset_name="nobody/nothing-at-all", streaming=True, cache_dir=str(tmp_path))
    with pytest.raises(UsageError, match="dataset_name must be `digits`, a folder or a data set on the Hub"):
        open_stream(config)


def test_label_that_is_missing(folder: Path) -> None:
    features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=["a"]))
    cells = [{"bytes": png(picture(n)), "path": None} for n in range(3)]
    shard = datasets.Dataset.from_dict({"image": cells, "kind": [0, 0, None]}, features=features)
    shard.to_parquet(folder / "a.parquet")
    stream = open_stream(config_of(folder, label_column="kind"))
    with pytest.raises(UsageError, match=r"each image a class, got None in row 2 \(.*a\.parquet\) of 'kind'"):
        list(batches_of(stream))
