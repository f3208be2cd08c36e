"""Every kind of source, and settings that name none."""

from __future__ import annotations

import gc
import shutil
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import files_below
from hf_ddpm.data.images import load_images
from hf_ddpm.data.sources import check_source
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, noise, save_grays

# Kinds of sources


def test_digits_are_those_of_the_test_set(tmp_path: Path) -> None:
    images = load_images(cache_config(None, dataset_name="digits", label_column="label", cache_dir=str(tmp_path)))
    assert (len(images), images.size, images.channels, images.max_value) == (1797, (8, 8), 1, 255)
    assert (images.class_names, images.num_classes) == (list("0123456789"), 10)
    assert (images.license, images.name) == ("cc-by-4.0", "digits")
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first = [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert images.image(0)[0, :2].tolist() == [[round(v * 255 / 16) for v in row] for row in first]


def test_class_folders_give_labels(folder: Path) -> None:
    save_grays(folder / "dogs", 2)
    save_grays(folder / "cats", 3)
    (folder / "notes.txt").write_text("not an image")
    images = load_images(
        cache_config(None, train_data_dir=str(folder), label_column="label", cache_dir=str(folder / "c"))
    )
    assert (images.class_names, images.name) == (["cats", "dogs"], "photos")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # `datasets` leaves the csv file open
def test_metadata_file_gives_labels(folder: Path) -> None:
    save_grays(folder, 3)
    (folder / "metadata.csv").write_text("file_name,kind\n000.png,b\n001.png,a\n002.png,b\n")
    images = load_images(cache_config(folder, label_column="kind"))
    assert images.class_names == ["a", "b"]
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0, 1]
    gc.collect()


@pytest.mark.slow
def test_local_data_use_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: calls.append(_))
    save_grays(folder, 1)
    load_images(cache_config(folder))
    load_images(cache_config(None, dataset_name="digits", cache_dir=str(folder)))
    assert calls == []


def test_image_folder_with_splits_means_train(folder: Path) -> None:
    save_grays(folder / "train", 3)
    save_grays(folder / "test", 2)
    assert len(load_images(cache_config(folder))) == 3
    # as in diffusers' script, whose `datasets` finds the splits
    by_folder = cache_config(None, train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"))
    assert len(load_images(by_folder)) == 3
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert len(loaded) == 3
    save_grays(folder.parent / "test and more" / "test", 2)
    save_grays(folder.parent / "test and more", 1)
    assert len(load_images(cache_config(folder.parent / "test and more"))) == 3


def test_folder_name_may_look_like_a_pattern(tmp_path: Path) -> None:
    save_grays(tmp_path / "my [best] photos*", 2)
    assert len(load_images(cache_config(tmp_path / "my [best] photos*"))) == 2


def test_images_are_read_from_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(tmp_path / "in", 2)
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "in")
    load = datasets.load_dataset
    options = {"data_files": {"train": archive}, "split": "train", "cache_dir": str(tmp_path)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load("imagefolder", **options))
    images = load_images(cache_config(None, dataset_name="me/photos", cache_dir=str(tmp_path)))
    assert np.array_equal(images.image(1)[0], noise(8, 8, seed=1))


@pytest.mark.parametrize("has_metadata", [True, False])
def test_parquet_folder_gives_images_and_labels(folder: Path, has_metadata: bool) -> None:
    features = datasets.Features(pic=datasets.Image(), kind=datasets.ClassLabel(names=["x", "y"]))
    arrays = [noise(8, 8, seed=i) for i in range(4)]
    columns = {"pic": [Image.fromarray(values) for values in arrays], "kind": [0, 1, 1, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "some name.parquet")
    if not has_metadata:
        table = pq.read_table(folder / "some name.parquet").replace_schema_metadata(None)
        pq.write_table(table, folder / "some name.parquet")
    images = load_images(cache_config(folder, label_column="kind"))
    assert all(np.array_equal(images.image(i)[0], arrays[i]) for i in range(4))
    assert images.class_names == (["x", "y"] if has_metadata else None)
    assert images.num_classes == 2
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1, 1]


def test_parquet_folder_needs_a_train_split(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(count)]}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    assert len(load_images(cache_config(folder))) == 3
    (folder / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UsageError, match=r"split `train`.* got 'photos'.*test"):
        load_images(cache_config(folder))


def test_parquet_folder_of_several_configurations_needs_a_name(folder: Path) -> None:
    for name, count in (("few", 2), ("many", 4)):
        columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(count)]}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    configs = [f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("few", "many")]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    assert len(load_images(cache_config(folder, dataset_config_name="few"))) == 2
    assert len(load_images(cache_config(folder, dataset_config_name="many"))) == 4
    with pytest.raises(UsageError, match=r"(?s)--dataset_config_name.*got 'photos'.*few.*many"):
        load_images(cache_config(folder))


@pytest.mark.parametrize("in_dict", [True, False])
def test_folder_saved_by_datasets_gives_images_and_labels(folder: Path, in_dict: bool) -> None:
    columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(3)], "year": [1999, 1990, 1999]}
    saved = datasets.Dataset.from_dict(columns)
    saved = datasets.DatasetDict({"train": saved, "test": saved.select([0])}) if in_dict else saved
    saved.save_to_disk(str(folder))
    images = load_images(cache_config(folder, label_column="year"))
    assert images.class_names == ["1990", "1999"]
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0, 1]
    assert np.array_equal(images.image(2)[0], noise(8, 8, seed=2))


# Wrong settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": ""}, "got ''.*--dataset_name digits"),
        ({"dataset_name": "digits", "train_data_dir": "photos"}, "'digits' and 'photos': give only one"),
        ({"dataset_name": "./missing"}, "'./missing': there is no folder"),
        ({"dataset_name": "~/missing/photos"}, "'~/missing/photos': there is no folder"),
        ({"dataset_name": "a/b/c"}, "'a/b/c': there is no folder"),
        ({"train_data_dir": "missing"}, "train_data_dir must be a folder, got 'missing'"),
        ({"dataset_name": __file__}, "must be a folder, got .*test_sources.py"),
        ({"dataset_name": "digits", "dataset_config_name": "big"}, "'big': leave it out"),
    ],
)
def test_check_source_rejects_impossible_sources(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_source(DataConfig(**settings))


def test_links_to_a_folder_above_lead_in_no_circle(folder: Path) -> None:
    """Each of 40 levels would double the paths."""
    save_grays(folder / "a", 2)
    save_grays(folder / "b", 1)
    for name in ("up", "above"):
        (folder / "a" / name).symlink_to(folder, target_is_directory=True)
    (folder / "b" / "other").symlink_to(folder / "a", target_is_directory=True)
    assert [path.relative_to(folder).as_posix() for path in files_below(folder)] == [
        "a/000.png",
        "a/001.png",
        "b/000.png",
    ]
    assert len(load_images(cache_config(folder))) == 3


def test_check_source_rejects_folders_without_images(folder: Path) -> None:
    (folder / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"folder of images, parquet files or shards \(.tar\), got .*photos"):
        check_source(cache_config(folder))
    (folder / "a.parquet").write_text("")
    check_source(cache_config(folder))
    with pytest.raises(UsageError, match=r"folder of images \(parquet files and shards, .tar: --dataset_name\), got"):
        check_source(cache_config(None, train_data_dir=str(folder)))
    save_grays(folder, 1)
    with pytest.raises(UsageError, match=r"got both in .*photos.*name a sub-folder"):
        check_source(cache_config(folder))


def test_check_source_rejects_output_dir_in_the_folder_of_images(folder: Path) -> None:
    save_grays(folder, 1)
    check_source(cache_config(folder), str(folder.parent / "run"))
    with pytest.raises(UsageError, match=r"output_dir must not be in the folder of images.*photos/run.*--output_dir"):
        check_source(cache_config(folder), str(folder / "run"))


def test_check_source_rejects_saved_folder_without_train(folder: Path) -> None:
    (folder / "dataset_dict.json").write_text('{"splits": ["dev"]}')
    with pytest.raises(UsageError, match=r"split `train`, got .*photos' with \['dev'\]"):
        check_source(cache_config(folder))
    for damaged in ('{"splits', "{}", "[]"):
        (folder / "dataset_dict.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"dataset_dict\.json cannot be read: .*save the data set again"):
            check_source(cache_config(folder))


def test_load_images_reports_unknown_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = DataConfig(dataset_name="nobody/nothing-at-all", cache_dir=str(tmp_path))
    check_source(config)
    with pytest.raises(UsageError, match=r"'nobody/nothing-at-all'.*neither a folder here nor reachable on the Hub"):
        load_images(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"several columns of images, \['front', 'back'\].*--image_column"),
        ({"image_column": "side"}, r"one of \['front', 'back'\], got 'side'.*--image_column"),
        ({"image_column": "weight"}, "must hold images, got 'weight'.*float64.*--image_column"),
        ({"image_column": "back", "label_column": "kind"}, "one of .*'weight'.*, got 'kind'.*--label_column"),
        ({"image_column": "back", "label_column": "front"}, "strings, got 'front'.*--label_column"),
        (
            {"image_column": "back", "label_column": "hole"},
            "label_column must .*, got an empty cell in row 1 of 'hole'",
        ),
    ],
)
def test_load_images_rejects_wrong_columns(folder: Path, settings: dict[str, Any], message: str) -> None:
    pictures = [Image.fromarray(noise(8, 8))] * 2
    columns = {"front": pictures, "back": pictures, "weight": [0.5, 1.5], "hole": ["a", None]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    with pytest.raises(UsageError, match=message):
        load_images(cache_config(folder, **settings))
    assert load_images(cache_config(folder, image_column="back")).labels is None


def test_load_images_rejects_data_without_image_column_or_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UsageError, match=r"no column of images among \['text'\].*--image_column"):
        load_images(cache_config(tmp_path / "text"))
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": []}, features=features).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="dataset_name must hold images, got 'none' with 0 rows"):
        load_images(cache_config(tmp_path / "none"))


def test_load_images_rejects_rows_without_class(folder: Path) -> None:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    columns = {"image": [Image.fromarray(noise(8, 8))] * 2, "label": [1, -1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    with pytest.raises(UsageError, match="got -1 in row 1 of 'label'"):
        load_images(cache_config(folder, label_column="label"))
