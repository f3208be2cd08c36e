"""WebDataset shards: as a cache and as a stream, with the labels beside each image."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.data.sources import check_source
from hf_ddpm.data.splits import open_split
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.parsing import load_config
from tests.support.image_data import cache_config, png
from tests.support.streams import numbered_image, read_stream, stream_config


def save_shards(folder: Path, sizes: list[int], split: str = "train", has_labels: bool = True) -> None:
    """Save numbered images in tar files, each with a class and an object of JSON beside it."""
    folder.mkdir(exist_ok=True)
    number = 0
    for i, size in enumerate(sizes):
        with tarfile.open(folder / f"{split}-{i:03}.tar", "w") as shard:
            for n in range(number, number + size):
                files = {"png": png(numbered_image(n))}
                if has_labels:
                    described = {"mass": n / 2, "kind": "ab"[n % 2]}
                    files |= {"cls": str(n % 3).encode(), "json": json.dumps(described).encode()}
                for field, content in files.items():
                    info = tarfile.TarInfo(f"some.dir/{n:04}.{field}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
        number += size


@pytest.mark.parametrize("column", ["cls", "json.mass", "json.kind", "cls,json.mass"])
def test_cache_and_stream_of_shards_have_the_labels_of_their_images(folder: Path, column: str) -> None:
    save_shards(folder, [9, 4, 7])
    images = load_images(cache_config(folder, label_column=column))
    stream = open_stream(stream_config(folder, label_column=column))
    assert len(images) == stream.num_images == 20
    assert images.labels is not None
    for i, example in enumerate(stream.examples()):
        decoded = stream.decode(example)
        assert decoded is not None
        assert (images.image(i) == numbered_image(i)).all()
        assert (decoded.planes == numbered_image(i)).all()
        assert (stream.label(example) == images.labels[i]).all()
    wanted = {"cls": 2, "json.mass": 8.5, "json.kind": 1, "cls,json.mass": [2, 8.5]}[column]
    assert images.labels[17].tolist() == wanted
    assert stream.class_names in (images.class_names, ["0", "1", "2"])


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "label_column"), [([19, 8, 1, 15, 30], None), ([41, 32], "json.mass")])
def test_stream_of_shards_does_not_depend_on_processes_workers_and_interruption(
    folder: Path, sizes: list[int], label_column: str | None
) -> None:
    save_shards(folder, sizes)
    stream = open_stream(stream_config(folder, label_column=label_column))
    whole, _ = read_stream(stream, 0, 32, batch_size=4, num_processes=1)
    _, starts = read_stream(stream, 0, 16, batch_size=4, num_processes=1)
    assert read_stream(stream, 0, 32, batch_size=4, num_processes=2)[0] == whole
    assert read_stream(stream, 0, 32, batch_size=2, num_processes=1, workers=2)[0] == whole
    later, _ = read_stream(stream, 16, 16, batch_size=4, num_processes=2, block_starts=starts)
    assert later == {position: number for position, number in whole.items() if position >= 16}


def test_number_of_images_is_read_with_labels_only(folder: Path) -> None:
    """Without labels, no shard is passed over before the first step."""
    save_shards(folder, [5, 3])
    assert open_stream(stream_config(folder)).num_images is None
    assert open_stream(stream_config(folder, label_column="cls")).rows_per_shard.tolist() == [5, 3]


def test_shards_are_named_as_splits(folder: Path) -> None:
    save_shards(folder, [5])
    save_shards(folder, [3], "test")
    assert len(load_images(cache_config(folder))) == 5
    with open_split(cache_config(folder), "test") as images:
        assert len(images) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "json"}, "label_column must "),
        ({"label_column": "json.age"}, r"label_column must be one of \[.*'json.mass'.*\], got 'json.age'"),
        ({"label_column": "txt"}, r"label_column must be one of \[.*'cls'.*\], got 'txt'"),
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_column_that_shards_do_not_have_is_named(
    folder: Path, settings: dict[str, Any], message: str, is_stream: bool
) -> None:
    save_shards(folder, [5])
    with pytest.raises(UsageError, match=message):
        (open_stream if is_stream else load_images)((stream_config if is_stream else cache_config)(folder, **settings))


def test_damaged_shard_is_named(folder: Path) -> None:
    save_shards(folder, [5, 5])
    content = (folder / "train-001.tar").read_bytes()
    (folder / "train-001.tar").write_bytes(content[:4000])
    with pytest.raises(UsageError, match=r"whole tar files, got '.*train-001.tar'"):
        open_stream(stream_config(folder, label_column="cls"))


@pytest.mark.parametrize("given", ["shards/{000..003}.tar", "shards.tar", "photos/000.tar"])
def test_names_of_archives_are_no_names_of_data(given: str) -> None:
    with pytest.raises(UsageError, match=r"must be a folder, got .*: name the folder of shards \(.tar\)"):
        check_source(load_config(dataset_name=given))


def test_shards_in_place_of_images_say_which_setting_names_them(folder: Path) -> None:
    save_shards(folder, [2])
    with pytest.raises(UsageError, match=r"shards, .tar: --dataset_name.*but 1 .tar"):
        check_source(load_config(train_data_dir=str(folder)))
