"""Streaming from every kind of source, and settings that cannot work."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.shards import open_stream
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import png
from tests.support.streams import (
    numbered_image,
    numbers_of,
    read_stream,
    save_folder,
    save_parquet,
    stream_batches,
    stream_config,
)

# A machine may have fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


# Kinds of sources


@pytest.mark.slow
def test_stream_of_an_image_folder(folder: Path) -> None:
    save_folder(folder, 300)
    (folder / "notes.txt").write_text("not an image")
    stream = open_stream(stream_config(folder, label_column="label"))
    assert (stream.class_names, stream.num_classes, stream.num_images) == (["even", "odd"], 2, 300)
    assert (stream.name, stream.channels, stream.size, stream.max_value) == ("photos", 1, (4, 4), 255)
    assert np.array_equal(stream.image(0)[0], numbered_image(0))
    batches = list(stream_batches(stream, batch_size=50, num_steps=6, num_substreams=1))
    ids = [n for batch in batches for n in numbers_of(batch["pixels"])]
    assert sorted(ids) == list(range(300))
    assert [n for batch in batches for n in batch["labels"].tolist()] == [n % 2 for n in ids]


@pytest.mark.slow
def test_stream_of_a_folder_saved_by_datasets(folder: Path) -> None:
    save_parquet(folder, [150])
    saved = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), cache_dir=str(folder / "c"))
    saved["train"].to_parquet(folder / "all.parquet")
    target = folder.parent / "saved"
    datasets.DatasetDict({"train": saved["train"].select(range(10, 150))}).save_to_disk(str(target))
    stream = open_stream(stream_config(target, label_column="kind"))
    assert (stream.num_images, len(stream.files)) == (140, 2)
    content, starts = read_stream(stream, 0, 140, batch_size=5, num_processes=1, workers=2, num_substreams=1)
    assert sorted(content.values()) == list(range(10, 150))
    again, _ = read_stream(stream, 100, 40, batch_size=4, num_processes=1, num_substreams=1)
    assert again.items() <= content.items()
    assert len(starts) == 1


def test_stream_of_digits() -> None:
    stream = open_stream(DataConfig(dataset_name="digits", label_column="label", streaming=True))
    assert (stream.num_images, stream.num_classes, stream.license) == (1797, 10, "cc-by-4.0")
    batch = next(iter(stream_batches(stream, batch_size=64)))
    assert batch["pixels"].shape == (64, 1, 8, 8)
    assert set(batch["labels"].tolist()) == set(range(10))


def test_stream_of_parquet_without_metadata_and_with_binary_column(folder: Path) -> None:
    pq.write_table(
        pa.table({"pic": [png(numbered_image(n)) for n in range(8)], "year": range(8)}), folder / "a.parquet"
    )
    stream = open_stream(stream_config(folder, image_column="pic"))
    content, _ = read_stream(stream, 0, 8, batch_size=4, num_processes=1, num_substreams=1)
    assert sorted(content.values()) == list(range(8))


def test_integers_and_texts_of_files_on_this_machine_are_classes(folder: Path) -> None:
    """They are read before the first step, and numbered as in a cache."""
    columns = {"pic": [png(numbered_image(n)) for n in range(8)], "year": [2000 + n % 3 for n in range(8)]}
    pq.write_table(pa.table({**columns, "kind": [*"abcabcab"]}), folder / "a.parquet")
    for column, names in (("year", ["2000", "2001", "2002"]), ("kind", ["a", "b", "c"])):
        stream = open_stream(stream_config(folder, image_column="pic", label_column=column))
        assert stream.class_names == names
        assert [stream.label(example) for example in stream.examples()] == [n % 3 for n in range(8)]


def rows_of(parts: list[range]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from ({"image": {"bytes": png(numbered_image(n)), "path": None}, "kind": n % 2} for n in part)


@pytest.mark.slow
def test_stream_of_generated_examples(folder: Path) -> None:
    """As `datasets` streams archives from the Hub: they are no Arrow tables, and no number of rows is known."""
    save_parquet(folder, [30])
    stream = open_stream(stream_config(folder, label_column="kind"))
    parts = {"parts": [range(0, 19), range(19, 24), range(24, 24), range(24, 60)]}
    rows = datasets.IterableDataset.from_generator(rows_of, features=stream.dataset.features, gen_kwargs=parts)
    stream = replace(stream, dataset=rows.with_format("arrow"), rows_per_shard=np.full(4, -1), files=("",) * 4)
    for num_substreams in (2, 8):
        settings: dict[str, Any] = {"batch_size": 4, "num_substreams": num_substreams}
        whole, _ = read_stream(stream, 0, 160, num_processes=1, **settings)
        assert sorted(set(whole.values())) == list(range(60))
        fresh = replace(stream, rows_per_shard=np.full(4, -1))
        _, starts = read_stream(fresh, 0, 80, num_processes=2, **settings)
        fresh = replace(stream, rows_per_shard=np.full(4, -1))
        settings |= {"batch_size": 5, "block_starts": starts}
        assert read_stream(fresh, 80, 40, num_processes=1, **settings)[0].items() <= whole.items()


@pytest.mark.slow
def test_fingerprint_depends_on_files_and_settings_only(tmp_path: Path) -> None:
    def fingerprint(name: str, **settings: Any) -> str:
        return open_stream(stream_config(tmp_path / name, **settings)).fingerprint

    (tmp_path / "a").mkdir()
    save_parquet(tmp_path / "a", [12, 5])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("no image")
    first = fingerprint("a")
    assert fingerprint("b", resolution=4, channels=1, on_bad_image="skip") == first
    assert fingerprint("b", label_column="kind") != first
    assert fingerprint("b", resolution=2) != first
    save_parquet(tmp_path / "b", [12, 6])
    assert fingerprint("b") != first
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
        save_folder(tmp_path / name, 5)
    assert fingerprint("c") == fingerprint("d")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "images"])
def test_pickled_batches_read_the_same_images(folder: Path, kind: str) -> None:
    """As workers that are not forked get them."""
    if kind == "parquet":
        save_parquet(folder, [12, 5])
    else:
        save_folder(folder, 17)
    batches = stream_batches(open_stream(stream_config(folder)))
    content = pickle.dumps(batches)
    assert len(content) < 20_000
    for here, there in zip(batches, pickle.loads(content), strict=True):
        assert here.pop("block_starts") == there.pop("block_starts")
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_stream_preserves_sixteen_bits(folder: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 4)).astype(np.uint16)
    (folder / "a.png").write_bytes(png(values))
    stream = open_stream(stream_config(folder))
    batch = next(iter(stream_batches(stream, num_substreams=1)))
    assert (stream.max_value, batch["pixels"].dtype) == (65535, torch.int32)
    assert np.array_equal(batch["pixels"][0, 0].numpy(), values)
    reduced = open_stream(stream_config(folder, preserve_input_precision=False))
    assert next(iter(stream_batches(reduced)))["pixels"].dtype == torch.uint8


@pytest.mark.slow
def test_stream_rejects_images_unlike_the_first_ones(folder: Path) -> None:
    late = {
        "color": (np.zeros((4, 4, 3), np.uint8), r"channels must be given.*zz\.png\) has colors"),
        "size": (np.zeros((4, 5), np.uint8), r"resolution must be given.*zz\.png\) is 4 x 5"),
        "deep": (np.zeros((4, 4), np.uint16), r"preserve_input_precision must be off.*zz\.png.*--no_preserve"),
    }
    for name, (values, message) in late.items():
        path = folder.parent / name
        path.mkdir()
        for n in range(64):
            (path / f"{n:04}.png").write_bytes(png(numbered_image(n)))
        (path / "zz.png").write_bytes(png(values))
        stream = open_stream(stream_config(path))
        with pytest.raises(UsageError, match=message):
            list(stream_batches(stream, num_substreams=1, num_steps=17))


# Wrong settings


def test_open_stream_rejects_data_without_readable_images(folder: Path) -> None:
    save_parquet(folder, [0])
    with pytest.raises(UsageError, match="dataset_name must hold images, got 'photos' with 0 rows"):
        open_stream(stream_config(folder))
    save_parquet(folder, [3], bad=(0, 1, 2))
    with pytest.raises(UsageError, match="got 3 unreadable ones only"):
        open_stream(stream_config(folder, on_bad_image="skip"))
    with pytest.raises(UsageError, match=r"row 0 \(0\.png in .*--on_bad_image skip"):
        open_stream(stream_config(folder))


def test_open_stream_rejects_wrong_columns(folder: Path) -> None:
    save_parquet(folder, [3])
    for settings, message in (
        ({"image_column": "pic"}, r"image_column must be one of \['image'\], got 'pic'"),
        ({"image_column": "kind"}, "image_column must hold images, got 'kind'"),
        ({"label_column": "no"}, r"label_column must be one of \['image', 'kind'\], got 'no'"),
    ):
        with pytest.raises(UsageError, match=message):
            open_stream(stream_config(folder, **settings))


def test_open_stream_reports_unknown_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = DataConfig(dataset_name="nobody/nothing-at-all", streaming=True, cache_dir=str(tmp_path))
    with pytest.raises(UsageError, match="dataset_name must be `digits`, a folder or a data set on the Hub"):
        open_stream(config)
