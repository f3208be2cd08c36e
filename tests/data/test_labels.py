"""Columns of labels: what they hold, how a cache and a stream keep them, and what a network takes for them."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from hf_ddpm import UsageError
from hf_ddpm.classes import Classes
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.labels import LabelColumn, label_list, labels_of, with_network_labels
from hf_ddpm.data.shard_batches import StreamBatches
from hf_ddpm.data.shards import open_stream
from hf_ddpm.labels import Columns, NetworkLabel, Values
from tests.support.labeled_images import labeled_images, save_labeled

COUNT = 24
LIGHT = np.linspace(40, 215, COUNT) / 255


def config_of(folder: Path, label_column: str, **settings) -> DataConfig:
    return DataConfig(
        dataset_name=str(folder), cache_dir=str(folder.parent / "cache"), label_column=label_column, **settings
    )


def test_cache_keeps_numbers_and_columns_as_the_data_have_them(tmp_path):
    whole = [i % 3 for i in range(COUNT)]
    save_labeled(tmp_path / "a", whole=whole, flag=[i < 5 for i in range(COUNT)])
    numbers = load_images(config_of(tmp_path / "a", "light"))
    assert numbers.labels is not None
    assert numbers.labels.dtype == np.float64
    assert np.allclose(numbers.labels, LIGHT)
    assert numbers.label_columns == [LabelColumn("light", None)]
    assert numbers.num_classes is None

    several = load_images(config_of(tmp_path / "a", "kind, light,whole,flag"))
    assert several.labels is not None
    assert several.labels.shape == (COUNT, 4)
    assert several.labels[:, 0].tolist() == [i % 2 for i in range(COUNT)]
    assert several.labels[:, 2].tolist() == whole
    assert several.label_columns is not None
    assert [names for _, names in several.label_columns] == [
        ["even", "odd"],
        None,
        ["0", "1", "2"],
        ["0", "1"],
    ]
    (line, *_) = describe_images(config_of(tmp_path / "a", "kind,light,whole,flag"), several)
    assert "labels kind: 2 classes, light: 0.156863 to 0.843137, whole: 3 classes, flag: 2 classes" in line

    # One column of classes is what it was, and other labels are other data.
    classes = load_images(config_of(tmp_path / "a", "kind"))
    assert classes.labels is not None
    assert (classes.labels.dtype, classes.label_columns) == (np.int64, None)
    assert (classes.class_names, classes.num_classes) == (["even", "odd"], 2)
    assert len({images.fingerprint for images in (numbers, several, classes)}) == 3
    assert load_images(config_of(tmp_path / "a", "light")).label_columns == numbers.label_columns


def test_column_whose_name_holds_a_comma_is_one(tmp_path):
    save_labeled(tmp_path / "a", **{"kind,light": [float(i) for i in range(COUNT)]})
    images = load_images(config_of(tmp_path / "a", "kind,light"))
    assert images.label_columns == [LabelColumn("kind,light", None)]


def test_network_takes_what_the_models_labels_say(tmp_path):
    save_labeled(tmp_path / "a")
    images = load_images(config_of(tmp_path / "a", "kind,light"))
    assert images.label_columns is not None
    assert images.labels is not None
    labels = labels_of(images.label_columns, images.labels, has_unconditional=True)
    assert isinstance(labels, Columns)
    encoded = with_network_labels(images, labels)
    assert (encoded.labels.dtype, encoded.label_columns) == (np.float32, None)
    asked = [labels.number_of({"kind": ("even", "odd")[i % 2], "light": float(LIGHT[i])}) for i in range(COUNT)]
    assert np.array_equal(encoded.labels, np.array(asked, np.float32))
    assert label_list(encoded, np.array([3])) == [NetworkLabel(tuple(encoded.labels[3].tolist()))]

    # Held-out images may have other columns first, fewer classes, and numbers outside of the range.
    odd = [i for i in range(COUNT) if i % 2]
    held_out = labeled_images(light=[2.0] * COUNT).select(odd)
    held_out.save_to_disk(str(tmp_path / "held_out"))
    others = with_network_labels(load_images(config_of(tmp_path / "held_out", "light,kind")), labels)
    light = labels.columns[1][1]
    assert isinstance(light, Values)
    assert np.allclose(others.labels, [1, light.encode(2.0)])


@pytest.mark.parametrize(
    ("column", "labels", "message"),
    [
        ("light", Classes(("a", "b")), "must hold what the model takes, 2 classes, got light"),
        ("light", None, "must hold what the model takes, no labels, got light"),
        ("kind", Values("light", 0, 1, (0,) * 5), "must hold what the model takes, light: 0 to 0, got one column of"),
        (
            "kind,light",
            Values("light", 0, 1, (0,) * 5),
            "must be the one that the model takes, light, got kind,",
        ),
        (
            "kind,light",
            Columns((("kind", Classes(("even", "uneven"))), ("light", Values("light", 0, 1, (0,) * 5)))),
            "must hold the model's classes in 'kind', even, uneven, got 'odd': leave its images out",
        ),
        (
            "kind,light",
            Columns((("kind", Values("kind", 0, 1, (0,) * 5)), ("light", Values("light", 0, 1, (0,) * 5)))),
            "must hold numbers in 'kind', as the model takes them",
        ),
        (
            "kind,light",
            Columns((("kind", Classes(("even", "odd"))), ("mass", Values("mass", 0, 1, (0,) * 5)))),
            "must name the columns that the model takes, kind,mass, got kind,light",
        ),
    ],
)
def test_labels_of_another_model_are_refused(column, labels, message, tmp_path):
    save_labeled(tmp_path / "a")
    with pytest.raises(UsageError, match=f"label_column {message}"):
        with_network_labels(load_images(config_of(tmp_path / "a", column)), labels)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
@pytest.mark.parametrize("column", ["light", "kind,light"])
def test_stream_has_the_labels_of_the_cache(kind, column, tmp_path):
    data = labeled_images()
    folder = tmp_path / "a"
    if kind == "saved":
        data.save_to_disk(str(folder))
    else:
        folder.mkdir()
        for part in range(2):
            data.shard(2, part, contiguous=True).to_parquet(folder / f"train-{part}.parquet")
    config = config_of(folder, column, streaming=True, shuffle_buffer_images=5)
    stream, images = open_stream(config), load_images(config_of(folder, column))
    assert stream.label_columns == images.label_columns
    assert np.array_equal(stream.labels, images.labels)
    (line, *_) = describe_images(config, stream)
    assert "light: 0.156863 to 0.843137" in line
    labels = labels_of(images.label_columns, images.labels, has_unconditional=False)
    batches = StreamBatches(
        with_network_labels(stream, labels),
        seed=0,
        random_flip=False,
        batch_size=8,
        accumulation_steps=1,
        rank=0,
        num_processes=1,
        first_position=0,
        num_steps=3,
        num_substreams=1,
        chunk_size=4,
        shuffle_buffer_images=5,
        block_starts=(),
    )
    encoded = with_network_labels(images, labels).labels
    of_pixels = {images.image(i).tobytes(): encoded[i] for i in range(COUNT)}
    for batch in batches:
        expected = np.stack([of_pixels[pixels.numpy().tobytes()] for pixels in batch["pixels"]])
        assert batch["labels"].dtype == torch.float32
        assert np.array_equal(batch["labels"].numpy(), expected)


def test_stream_of_files_that_are_not_scanned_is_refused(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    labeled_images().remove_columns("image").to_json(folder / "train.json")
    config = config_of(folder, "light", streaming=True)
    dataset = datasets.load_dataset("json", data_files=str(folder / "train.json"), streaming=True, split="train")
    from hf_ddpm.data import shard_files, shards

    opened = shard_files.Shards(dataset, np.array([shard_files.UNKNOWN]), ("",), None, None)
    with pytest.raises(UsageError, match="label_column must be one column of classes to be streamed from there, got"):
        shards._scan_labels(opened, [config.label_column or ""])
