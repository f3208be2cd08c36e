"""Metadata of a folder of images: what rows say of images, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from hf_ddpm.data.columns import choose_columns
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.image_folder import list_images, open_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.splits import open_split
from hf_ddpm.data.tables import open_dataset
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, noise, save_grays
from tests.support.streams import stream_config


def write_csv(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.csv").write_text(text, encoding="utf-8")


def write_rows(folder: Path, rows: list[dict[str, Any]], kind: str) -> None:
    """Write rows as a metadata file of a kind."""
    names = [*rows[0]]
    if kind == "csv":
        write_csv(folder, "\n".join([",".join(names), *(",".join(str(row[n]) for n in names) for row in rows)]) + "\n")
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def column(folder: Path, name: str) -> list[Any]:
    return open_images(list_images(folder), DataConfig())[:][name]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_are_those_of_datasets(folder: Path, kind: str) -> None:
    """One metadata file of values that no reader could take for others gives the table of `imagefolder`."""
    save_grays(folder, 3)
    save_grays(folder / "more", 2)
    names = ["002.png", "more/001.png", "000.png", "001.png"]
    rows = [
        {
            "file_name": name,
            "kind": "ab"[i % 2],
            "count": 3 * i,
            "mass": 0.1 * i,
            "is_new": i > 1,
            "mask_file_name": name,
        }
        for i, name in enumerate(names)
    ]
    write_rows(folder, rows, kind)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder / "../c"))
    ours = open_images(list_images(folder), DataConfig())
    assert {*ours.column_names} == {*theirs.column_names}  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("image", "mask"):
        ours, theirs = (table.cast_column(name, datasets.Image(decode=False)) for table in (ours, theirs))  # pyright: ignore
    for name in ours.column_names:
        assert ours[:][name] == theirs[:][name], name  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert str(ours.features["count"]) == str(theirs.features["count"])  # pyright: ignore


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "2", "10"], [1, 2, 10]),
        (["1", "2.5", "1e3"], [1.0, 2.5, 1000.0]),
        (["1", "", "3"], [1, None, 3]),
        (["1.5", "NA", "nan"], [1.5, None, None]),
        (["NA", "SA", "EU"], ["NA", "SA", "EU"]),
        (["None", "scratch", "null"], ["None", "scratch", "null"]),
        (["007", "07", "7"], ["007", "07", "7"]),
        (["0.5", "0", "-1"], [0.5, 0.0, -1.0]),
        (["True", "false", "TRUE"], [True, False, True]),
        (["True", "0", "1"], ["True", "0", "1"]),
        (["2020-01-01", "1_000", "12345678901234567890"], ["2020-01-01", "1_000", "12345678901234567890"]),
        (["x", " y", '"a, b"'], ["x", "y", "a, b"]),
    ],
)
def test_column_of_csv_holds_what_all_its_cells_are(folder: Path, cells: list[str], values: list[Any]) -> None:
    save_grays(folder, 3)
    write_csv(folder, "file_name, k\n" + "".join(f"{i:03}.png,{cell}\n" for i, cell in enumerate(cells)))
    assert column(folder, "k") == values
    assert [*map(type, column(folder, "k"))] == [*map(type, values)]


def test_column_of_several_files_has_one_type(folder: Path) -> None:
    """`datasets` takes the type from the first file, and makes 0.5 a 0."""
    for name, value in (("a", "1"), ("b", "0.5")):
        save_grays(folder / name, 1)
        write_csv(folder / name, f"file_name,k\n000.png,{value}\n")
    assert column(folder, "k") == [1.0, 0.5]
    images = load_images(cache_config(folder, label_column="k"))
    assert images.labels is not None
    assert images.labels.tolist() == [1.0, 0.5]


def test_byte_order_mark_and_carriage_returns_are_no_text(folder: Path) -> None:
    save_grays(folder, 2)
    (folder / "metadata.csv").write_bytes("\ufefffile_name,k\r\n000.png,x\r\n\r\n001.png,y\r\n".encode())
    assert column(folder, "k") == ["x", "y"]


@pytest.mark.parametrize(
    "spell",
    [
        lambda folder, name: name,
        lambda folder, name: unicodedata.normalize("NFD", name),
        lambda folder, name: f"./{name}",
        lambda folder, name: f"{folder}/{name}",
        lambda folder, name: name.replace("/", "\\"),
    ],
)
def test_path_may_be_spelled_otherwise(folder: Path, spell: Any) -> None:
    names = [unicodedata.normalize("NFC", "ü/é 1.png"), "a/zip::[x]{1..2}.png"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(8, 8, seed=i)).save(folder / name)
    write_csv(folder, "file_name,k\n" + "".join(f"{spell(folder, name)},{i}\n" for i, name in enumerate(names)))
    images = load_images(cache_config(folder, label_column="k"))
    assert [images.image(i).tolist() for i in range(2)] == [[noise(8, 8, seed=i).tolist()] for i in range(2)]


def test_metadata_beside_splits_count_for_each(folder: Path) -> None:
    for name in ("train", "test"):
        save_grays(folder / name, 2)
    write_csv(folder, "file_name,k\ntrain/001.png,5\ntest/000.png,6\ntrain/000.png,7\n")
    config = cache_config(folder, label_column="k")
    assert open_dataset(config)[:]["k"] == [5, 7]
    images = load_images(config)
    with open_split(config, "test") as test:
        assert test.class_names == ["6"]
        assert len(test) == 1
    [said] = describe_images(config, images)
    assert said.endswith("not read: the folder 'test'")
    write_csv(folder, "file_name,k\ntrain/001.png,5\ntrain/000.png,8\n")
    assert load_images(config).class_names == ["5", "8"]  # and no older cache


def test_metadata_beside_splits_that_name_nothing_in_them_are_not_read(folder: Path) -> None:
    for name in ("train", "test"):
        save_grays(folder / name, 2)
    write_csv(folder, "file_name,k\nother.png,5\n")
    config = cache_config(folder)
    assert len(load_images(config)) == 2
    assert "metadata.csv beside the splits" in describe_images(config, load_images(config))[0]


def test_folders_are_classes_beside_columns_of_metadata(folder: Path) -> None:
    for name in ("cat", "dog"):
        save_grays(folder / name, 1)
    write_csv(folder, "file_name,k\ndog/000.png,0.5\ncat/000.png,1.5\n")
    images = load_images(cache_config(folder, label_column="label,k"))
    assert images.labels is not None
    assert images.labels.tolist() == [[1.0, 0.5], [0.0, 1.5]]


def test_rows_and_images_that_are_left_out_or_repeated_are_counted(folder: Path) -> None:
    save_grays(folder, 4)
    write_csv(folder, "file_name,mask_file_name,split\n000.png,001.png,train\n000.png,001.png,test\n")
    config = cache_config(folder, image_column="image")
    [said] = describe_images(config, load_images(config))
    assert said.endswith(
        "1 rows name an image again; not read: 1 images of the column 'mask', 2 images that no row of the metadata "
        "names, the column 'split' of the metadata (splits are folders)"
    )
    config = cache_config(folder, condition_column="mask")
    assert "of the column" not in describe_images(config, load_images(config))[0]


@pytest.mark.parametrize("read", [load_images, open_stream])
def test_missing_file_is_named_or_left_out(folder: Path, read: Any) -> None:
    save_grays(folder / "images", 2)
    write_csv(folder, "file_name,k\nimages/000.png,1.5\n001.png,2.5\n")
    make = stream_config if read is open_stream else cache_config
    with pytest.raises(UsageError, match=r"1 that do not, as '.*photos/001.png', where there is 'images/001.png': "):
        read(make(folder))
    if read is load_images:
        assert load_images(make(folder, on_bad_image="skip")).num_bad == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.csv": b"file_name;k\n000.png;1\n"}, "separate the columns by commas"),
        ({"metadata.csv": b"image,k\n000.png,1\n"}, r"a column `file_name` .* got \['image', 'k'\]"),
        ({"metadata.csv": b""}, "must have a header"),
        ({"metadata.csv": b"file_name,k\n"}, "0 rows"),
        ({"metadata.csv": b"file_name,k\n000.png,1,2\n"}, "2 cells in each row, as in the header, got 3 in line 2"),
        ({"metadata.csv": b"file_name,k,k\n000.png,1,2\n"}, "each column once"),
        ({"metadata.csv": b"file_name,k\n,1\n"}, "got an empty cell in row 2"),
        ({"metadata.csv": b'file_name,k\n"000.png,1\n'}, "must be readable"),
        ({"metadata.csv": "file_name,k\n000.png,\xe9\n".encode("latin-1")}, "save it as CSV in UTF-8"),
        ({"metadata.csv": b"file_name,k\n../../x.png,1\n"}, "in the folder of images, .*, got '../../x.png' in row 2"),
        ({"metadata.csv": b"file_name,image\n000.png,1\n"}, "one column 'image'"),
        ({"metadata.jsonl": b""}, "must have rows"),
        ({"metadata.jsonl": b'{"file_name": "000.png"}\n{"file_name":\n'}, "see line 2"),
        ({"metadata.jsonl": b"[1]\n"}, "a JSON object in each line"),
        ({"metadata.jsonl": b'{"file_name": 3}\n'}, "must hold paths, got 3 in row 1"),
        ({"metadata.jsonl": b'{"file_name": "000.png", "k": 1}\n{"file_name": "000.png", "k": "a"}\n'}, "int and str"),
        ({"metadata.parquet": b"no parquet"}, "save it again"),
        ({"metadata.csv": b"file_name\n000.png\n", "metadata.jsonl": b'{"file_name": "000.png"}\n'}, "keep one"),
    ],
)
def test_metadata_that_cannot_be_meant_are_refused(folder: Path, files: dict[str, bytes], message: str) -> None:
    save_grays(folder, 1)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        load_images(cache_config(folder))
    assert "\n" not in str(raised.value)


def test_empty_cell_beside_numbers_is_an_error_of_labels(folder: Path) -> None:
    save_grays(folder, 2)
    write_csv(folder, "file_name,k\n000.png,1.5\n001.png,NA\n")
    with pytest.raises(UsageError, match="an empty cell in row 1 of 'k'"):
        load_images(cache_config(folder, label_column="k"))


def test_columns_of_metadata_choose_as_those_of_any_table(folder: Path) -> None:
    save_grays(folder, 2)
    write_csv(folder, "file_name,mask_file_name\n000.png,001.png\n")
    config = cache_config(folder, condition_column="mask")
    table = choose_columns(
        open_images(list_images(find_source(config).folder or folder), config), config, with_conditions=True
    )
    assert table.column_names == ["image", "mask"]
