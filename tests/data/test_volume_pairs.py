"""Volumes and the volumes that they are made from: a slice belongs to the slice of the same number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import nibabel
import numpy as np
import pytest
from PIL import Image

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.splits import open_split
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import ValueRange
from tests.data.test_array_conditions import conditions_in
from tests.support.image_data import cache_config, noise

pytestmark = pytest.mark.skipif(not hasattr(datasets, "Nifti"), reason="this version of datasets has no volumes")

NUM_SLICES = (3, 2, 4)  # of each volume


def volumes() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(-500, 500, (8, 6, count)).astype(np.int16) for count in NUM_SLICES]


def condition_of(volume: np.ndarray) -> np.ndarray:
    """Return the volume that another is made from, in other units."""
    return (volume / 8 + 3).astype(np.float32)


def save_volume(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)  # pyright: ignore[reportPrivateImportUsage]
    nibabel.save(image, path)  # pyright: ignore[reportPrivateImportUsage]
    return str(path)


def table_of(folder: Path, **columns: Any) -> datasets.Dataset:
    """Return a table of the volumes `t2`, the volumes `t1` that they are made from, and further columns."""
    paths = {
        "t2": [save_volume(folder / f"t2/{i}.nii.gz", volume) for i, volume in enumerate(volumes())],
        "t1": [save_volume(folder / f"t1/{i}.nii.gz", condition_of(volume)) for i, volume in enumerate(volumes())],
    }
    table = datasets.Dataset.from_dict({**paths, **columns})
    return table.cast_column("t1", datasets.Nifti()).cast_column("t2", datasets.Nifti())


def save_pairs(kind: str, folder: Path, **columns: Any) -> DataConfig:
    """Save the table, and return the settings that read t2 made from t1."""
    table = table_of(folder.parent / "files", **columns)
    if kind == "parquet":
        table.to_parquet(folder / "train.parquet")  # with the bytes of the volumes
    else:
        table.save_to_disk(folder)
    return cache_config(folder, condition_column="t1")


def assert_are_pairs(images: ImageCache) -> None:
    conditions = conditions_in(images)
    assert len(images) == len(conditions)
    for i in range(len(images)):
        assert np.array_equal(conditions.image(i), condition_of(images.image(i)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "saved", "passed"])
def test_slices_stay_beside_the_slices_that_they_are_made_from(folder: Path, kind: str) -> None:
    if kind == "passed":
        config, table = DataConfig(condition_column="t1", cache_dir=str(folder.parent / "cache")), table_of(folder)
    else:
        config, table = save_pairs(kind, folder), None
    images = load_images(config, dataset=table)
    assert len(images) == sum(NUM_SLICES)
    assert_are_pairs(images)
    # Along another axis they are of several sizes. Resizing keeps what relates the two, but for rounded integers.
    settings = {"stack_axis": 0, "resolution": [6, 2], "center_crop": True}
    images = load_images(replace(config, **settings), dataset=table)
    assert len(images) == 3 * 8
    pairs = [(images.image(i), conditions_in(images).image(i)) for i in range(len(images))]
    assert all(np.allclose(condition, condition_of(image), atol=0.5 / 8 + 1e-4) for image, condition in pairs)


@pytest.mark.slow
def test_each_column_has_its_own_values(folder: Path) -> None:
    config = save_pairs("parquet", folder, sex=["f", "m", "f"])
    images = load_images(replace(config, label_column="sex"))
    assert_are_pairs(images)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert [np.array_equal(images.image(3 + i)[0], volumes()[1][:, :, i]) for i in range(2)] == [True, True]
    own = [condition_of(volume) for volume in volumes()]
    low, high = min(float(each.min()) for each in own), max(float(each.max()) for each in own)
    assert conditions_in(images).value_range == ValueRange(low, high, "float32")
    assert images.value_range == ValueRange(-32768.0, 32767.0, "int16")
    said = describe_images(config, images)[0]
    assert f"made from the column t1, channels 1, values float32, {low:g} to {high:g}" in said
    turned = load_images(replace(config, image_column="t1", condition_column="t2"))
    assert np.array_equal(turned.image(4), conditions_in(images).image(4))


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, "file", "patient"])
def test_held_out_slices_have_their_conditions(folder: Path, group: str | None) -> None:
    config = save_pairs("parquet", folder, patient=["a", "b", "c"])
    config = replace(config, eval_fraction=0.3, group_column=group)
    trained = load_images(config)
    with open_split(config, "test") as held_out:
        assert len(trained) + len(held_out) == sum(NUM_SLICES)
        assert_are_pairs(trained)
        assert_are_pairs(held_out)
        if group is not None:
            assert len(held_out) in NUM_SLICES


@pytest.mark.parametrize(
    ("values", "affine", "message"),
    [
        (
            (8, 6, 4),
            np.eye(4),
            r"got \(2, 8, 6\) in 't2' and \(4, 8, 6\) in 't1' in row 1: resample one onto the grid",
        ),
        (
            (8, 7, 2),
            np.eye(4),
            r"got \(2, 8, 6\) in 't2' and \(2, 8, 7\) in 't1' in row 1: resample one onto the grid",
        ),
        ((8, 6, 2), np.diag([1, -1, 1, 1]), "axes of the same directions, got RAS in 't2' and RPS in 't1' in row 1"),
    ],
)
def test_volumes_that_are_no_pair_are_named_by_row(
    folder: Path, values: tuple[int, ...], affine: np.ndarray, message: str
) -> None:
    table = table_of(folder)
    save_volume(folder / "t1/1.nii.gz", np.zeros(values, np.float32), affine)
    config = DataConfig(condition_column="t1", cache_dir=str(folder.parent / "cache"))
    with pytest.raises(UsageError, match=message):
        load_images(config, dataset=table)
    assert not [*folder.parent.rglob("pixels.bin")]


def test_an_empty_cell_is_named(folder: Path) -> None:
    table = table_of(folder)
    paths = [cell["path"] for cell in table.cast_column("t1", datasets.Nifti(decode=False))["t1"]]
    table = table.remove_columns("t1").add_column("t1", [paths[0], None, paths[2]])
    config = DataConfig(condition_column="t1", cache_dir=str(folder.parent / "cache"))
    with pytest.raises(UsageError, match=r"every image must be readable, got row 3: the row is empty"):
        load_images(config, dataset=table.cast_column("t1", datasets.Nifti()))


@pytest.mark.slow
def test_a_volume_of_one_slice_is_an_image_beside_others(folder: Path) -> None:
    values = [volume[:, :, :1] for volume in volumes()]
    scans = [save_volume(folder / f"{i}.nii", each) for i, each in enumerate(values)]
    features = datasets.Features(scan=datasets.Value("string"), map=datasets.Array2D((8, 6), "float32"))
    features["photo"] = datasets.Image()
    rows = {
        "scan": scans,
        "map": [each[:, :, 0] / 2 for each in values],
        "photo": [Image.fromarray(noise(8, 6, 3, seed=i)) for i in range(3)],
    }
    table = datasets.Dataset.from_dict(rows, features=features).cast_column("scan", datasets.Nifti())
    for image, condition in (("scan", "map"), ("map", "scan"), ("scan", "photo"), ("photo", "scan")):
        config = DataConfig(image_column=image, condition_column=condition, cache_dir=str(folder.parent / "cache"))
        images = load_images(config, dataset=table)
        pair = {image: images, condition: conditions_in(images)}
        for i in range(3):
            assert np.array_equal(pair["scan"].image(i)[0], values[i][:, :, 0])
            if "map" in pair:
                assert np.array_equal(pair["map"].image(i)[0], values[i][:, :, 0] / 2)
            else:
                assert np.array_equal(pair["photo"].image(i), noise(8, 6, 3, seed=i).transpose(2, 0, 1))
    save_volume(folder / "1.nii", volumes()[1])
    for image, condition in (("scan", "map"), ("photo", "scan")):
        other = {image, condition} - {"scan"}
        config = DataConfig(image_column=image, condition_column=condition, cache_dir=str(folder.parent / "other"))
        message = f"got 2 slices in 'scan' and one image in '{other.pop()}' in row 1: name two columns of volumes"
        with pytest.raises(UsageError, match=message):
            load_images(config, dataset=table)


def test_a_column_of_conditions_that_is_not_there_is_named_among_volumes(folder: Path) -> None:
    config = DataConfig(image_column="t2", condition_column="flair", cache_dir=str(folder.parent / "cache"))
    with pytest.raises(UsageError, match=r"second column of images, got 'flair', none of \['t2', 't1'\]"):
        load_images(config, dataset=table_of(folder))
