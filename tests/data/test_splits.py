"""Splits of every kind of source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images, describe_unread
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.data.sources import check_source
from hf_ddpm.data.splits import describe_split, open_split
from hf_ddpm.runtime.errors import MissingSplitError, UsageError
from tests.support.image_data import cache_config, noise, save_grays

COUNTS = {"train": 4, "test": 3}


def save_splits(folder: Path, kind: str) -> None:
    """Save `train` and `test` as a folder of images, as parquet files or by `datasets`."""
    if kind == "images":
        for split, count in COUNTS.items():
            save_grays(folder / split, count)
        return
    splits = {}
    for split, count in COUNTS.items():
        columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(count)], "kind": range(count)}
        splits[split] = datasets.Dataset.from_dict(columns)
    if kind == "saved":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    else:
        for split, content in splits.items():
            content.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_open_split_gives_the_images_of_the_split(folder: Path, kind: str) -> None:
    save_splits(folder, kind)
    label_column = None if kind == "images" else "kind"
    for split, count in COUNTS.items():
        save_grays(folder.parent / f"{split} alone", count)
        alone = load_images(cache_config(folder.parent / f"{split} alone"))
        with open_split(cache_config(folder, label_column=label_column), split) as images:
            assert (images.pixels == alone.pixels).all()
            assert images.labels is None or images.labels.tolist() == list(range(count))


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_describe_split_counts_what_is_read_and_what_is_not(folder: Path, kind: str) -> None:
    save_splits(folder, kind)
    if kind == "images":
        (folder / "test/more.npy").touch()
    config = cache_config(folder)
    unread = "; not read: 1 .npy" if kind == "images" else ""
    with open_split(config, "test") as images:
        assert describe_split(config, "test", images) == [
            f"split test of {folder.name}: 3 images, 8 x 8, channels 1{unread}"
        ]
    with open_split(config, "train") as images:
        assert describe_split(config, "train", images) == [
            f"split train of {folder.name}: 4 images, 8 x 8, channels 1"
        ]


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_open_split_rejects_unknown_splits(folder: Path, kind: str) -> None:
    save_splits(folder, kind)
    with (
        pytest.raises(UsageError, match=r"eval_split must be .*dataset_name.* got 'dev'"),
        open_split(cache_config(folder), "dev", "eval_split"),
    ):
        pass


@pytest.mark.parametrize(
    ("trained", "held_out", "split"),
    [
        ("Train", "Test", "test"),
        ("training", "testing", "test"),
        ("train", "holdout", "validation"),
        ("images/train", "images/val", "validation"),
        ("TRAINING", "Dev", "Dev"),
    ],
)
def test_folders_named_like_splits_are_not_trained_on(folder: Path, trained: str, held_out: str, split: str) -> None:
    save_grays(folder / trained, 3)
    save_grays(folder / held_out, 2)
    config = cache_config(folder)
    assert len(load_images(config)) == 3
    assert open_stream(replace(config, streaming=True)).num_images == 3
    assert describe_unread(config) == f"not read: the folder '{Path(held_out).name}'"
    for name in (split, Path(held_out).name):
        with open_split(config, name, "eval_split") as images:
            assert len(images) == 2


def test_folder_beside_classes_is_a_class(folder: Path) -> None:
    for name, count in {"train": 1, "car": 2, "plane": 3}.items():
        save_grays(folder / name, count)
    images = load_images(cache_config(folder, label_column="label"))
    assert images.class_names == ["car", "plane", "train"]
    assert len(images) == 6


def test_folders_without_images_beside_splits_say_nothing(folder: Path) -> None:
    save_grays(folder / "train", 3)
    save_grays(folder / "test", 2)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "all.json").write_text("{}")
    assert len(load_images(cache_config(folder))) == 3
    assert describe_unread(cache_config(folder)) == "not read: the folder 'test'"


def test_other_folders_beside_splits_are_not_trained_on(folder: Path) -> None:
    for name, count in {"train": 3, "test": 2, "more": 1}.items():
        save_grays(folder / name, count)
    for config in (cache_config(folder), cache_config(folder, train_split="train")):
        assert len(load_images(config)) == 3
        assert describe_unread(config) == "not read: the folder 'more', the folder 'test'"
        for split, count in (("test", 2), ("more", 1)):
            with open_split(config, split, "eval_split") as images:
                assert len(images) == count


def test_what_lies_beside_splits_is_counted(folder: Path) -> None:
    save_grays(folder / "images" / "train", 3)
    save_grays(folder / "images" / "val", 2)
    save_grays(folder, 4)
    (folder / "metadata.csv").write_text("file_name,kind\n")
    said = describe_unread(cache_config(folder))
    assert said == "not read: the folder 'val', 4 images beside the splits, metadata.csv beside the splits"


def test_output_dir_beside_splits_is_refused(folder: Path) -> None:
    """Its pictures would make another folder of images, on which no run could be resumed."""
    save_grays(folder / "train", 1)
    save_grays(folder / "test", 1)
    with pytest.raises(UsageError, match="output_dir must not be in the folder of images"):
        check_source(cache_config(folder), str(folder / "run"))
    check_source(cache_config(folder), str(folder.parent / "run"))


def test_held_out_split_is_not_the_one_that_is_trained_on(folder: Path) -> None:
    save_splits(folder, "saved")
    config = cache_config(folder, train_split="test")
    for option in ("eval_split", "test_split"):
        message = f"{option} must be held out, got 'test', which is trained on"
        with pytest.raises(MissingSplitError, match=message), open_split(config, "test", option):
            pass


def test_names_of_files_and_parts_of_names_are_no_splits(folder: Path) -> None:
    save_grays(folder, 2)
    (folder / "000.png").rename(folder / "test_tube_1.png")
    save_grays(folder / "training set", 1)
    save_grays(folder / "my test", 1)
    assert len(load_images(cache_config(folder))) == 4


def test_splits_without_one_to_train_on_are_refused(folder: Path) -> None:
    save_grays(folder / "test", 1)
    save_grays(folder / "val", 2)
    with pytest.raises(
        UsageError, match=r"one folder to train on .* got \['test', 'val'\] .* give --train_split NAME"
    ):
        load_images(cache_config(folder))
    assert len(load_images(cache_config(folder, train_split="val"))) == 2


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
@pytest.mark.parametrize("read", [load_images, open_stream])
def test_train_split_names_what_is_trained_on(folder: Path, kind: str, read: Any) -> None:
    save_splits(folder, kind)
    config = cache_config(folder, train_split="test", streaming=read is open_stream)
    assert read(config).num_images == COUNTS["test"]
    if read is load_images:
        with open_split(config, "train") as images:
            assert len(images) == COUNTS["test"]  # the split of training, whatever its name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("images", "train_split must be a folder in .*, got 'first', which is none"),
        ("parquet", "must be loadable with a split `first` \\(--train_split\\)"),
        ("saved", "must hold a split `first`, got .* give --train_split"),
        ("../photos/train", "train_split must be a name such as train or test, got '../photos/train'"),
        ("", "train_split must be a name such as train or test, got ''"),
        ("digits", "train_split must be train, which is all that digits has, got 'first'"),
    ],
)
def test_train_split_that_is_not_there_is_named(folder: Path, kind: str, message: str) -> None:
    config = cache_config(folder, train_split="first")
    if kind in ("", "../photos/train"):
        config, kind = cache_config(folder, train_split=kind), "images"
    if kind == "digits":
        config = DataConfig(dataset_name="digits", train_split="first")
    else:
        save_splits(folder, kind)
    with pytest.raises(UsageError, match=message):
        load_images(config)


def test_open_split_rejects_a_split_that_is_trained_on(folder: Path) -> None:
    save_grays(folder / "test", 2)
    with open_split(cache_config(folder), "test") as images:
        assert len(images) == 2
    with (
        pytest.raises(UsageError, match="eval_split must be held out, got 'test' of 'photos', all of which"),
        open_split(cache_config(folder), "test", "eval_split"),
    ):
        pass


def test_open_split_checks_the_name_of_the_split(folder: Path) -> None:
    save_grays(folder / "train", 1)
    with pytest.raises(UsageError, match="split must be a name"), open_split(cache_config(folder), "../test"):
        pass
    with (
        pytest.raises(UsageError, match="split must be train, which is all that digits has, got 'test'"),
        open_split(DataConfig(dataset_name="digits"), "test"),
    ):
        pass


def test_splits_in_each_folder_of_a_class_are_refused(folder: Path) -> None:
    """All images would be trained on, and the classes be `test` and `train`."""
    for name in ("cat/train", "cat/test", "dog/train", "dog/test"):
        save_grays(folder / name, 1)
    with pytest.raises(UsageError, match=r"splits above those of classes, got 'dog/train' .* to train/dog"):
        load_images(cache_config(folder))


def test_folder_that_is_named_as_a_split_and_read_with_others_is_said(folder: Path) -> None:
    for name in ("train", "test-set"):
        save_grays(folder / name, 2)
    config = cache_config(folder)
    assert describe_images(config, load_images(config))[1:] == [
        "read with all folders beside it: the folder 'train'; --train_split train reads it alone"
    ]
