"""Columns of volumes in tables: their slices are read as those of files in a folder are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import nibabel
import numpy as np
import pytest

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.held_out import divide, groups_of
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.data.splits import open_split
from hf_ddpm.data.volumes import with_slices
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config

pytestmark = pytest.mark.skipif(not hasattr(datasets, "Nifti"), reason="this version of datasets has no volumes")

VOLUMES = np.random.default_rng(0).integers(-500, 500, (4, 8, 6, 3)).astype(np.int16)


def save_volumes(folder: Path, suffix: str = "nii.gz") -> list[str]:
    """Save VOLUMES as NIfTI files, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, values in enumerate(VOLUMES):
        image = nibabel.Nifti1Image(values, np.eye(4))  # pyright: ignore[reportPrivateImportUsage]
        nibabel.save(image, folder / f"{i}.{suffix}")  # pyright: ignore[reportPrivateImportUsage]
    return [str(path) for path in sorted(folder.iterdir())]


def table_of(paths: list[str], **columns: Any) -> datasets.Dataset:
    table = datasets.Dataset.from_dict({**columns, "scan": paths})
    return table.cast_column("scan", datasets.Nifti())


def save_table(kind: str, folder: Path, suffix: str = "nii.gz", **columns: Any) -> DataConfig:
    """Save VOLUMES in a table, and return the settings that read it."""
    table = table_of(save_volumes(folder.parent / "files", suffix), **columns)
    if kind == "parquet":
        table.to_parquet(folder / "train.parquet")  # with their bytes
    else:
        table.save_to_disk(folder)
    return cache_config(folder)


def loaded(config: DataConfig) -> np.ndarray:
    images = load_images(config)
    return np.stack([images.image(i) for i in range(len(images))])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_slices_of_a_column_are_those_of_the_files(folder: Path, kind: str, suffix: str) -> None:
    config = save_table(kind, folder, suffix)
    files = DataConfig(train_data_dir=str(folder.parent / "files"), cache_dir=config.cache_dir)
    for axis in (None, 0, -1):
        settings = {**vars(config), "stack_axis": axis}
        expected = loaded(DataConfig(**{**vars(files), "stack_axis": axis}))
        assert (loaded(DataConfig(**settings)) == expected).all()
        assert expected.shape == ((32, 1, 6, 3) if axis == 0 else (12, 1, 8, 6))
    assert load_images(config).value_range == load_images(files).value_range


def test_labels_are_those_of_the_volume_and_other_files_are_left_out(folder: Path) -> None:
    paths = save_volumes(folder.parent / "files")
    config = save_table("parquet", folder, sex=["f", "m", "f", "m"], age=[1.5, 2.5, 3.5, 4.5], mask=[b"x"] * 4)
    images = load_images(DataConfig(**{**vars(config), "label_column": "sex"}))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    table = table_of(paths, age=[1.5, 2.5, 3.5, 4.5])
    given = load_images(DataConfig(cache_dir=config.cache_dir, label_column="age"), dataset=table)
    assert given.labels is not None
    assert np.unique(given.labels, return_counts=True)[1].tolist() == [3, 3, 3, 3]
    assert (given.image(4) == images.image(4)).all()


@pytest.mark.slow
@pytest.mark.parametrize("group", ["file", "patient"])
def test_volumes_are_held_out_as_a_whole(folder: Path, group: str) -> None:
    config = save_table("parquet", folder, patient=["a", "b", "c", "d"])
    config = DataConfig(**{**vars(config), "eval_fraction": 0.25, "group_column": group})
    of_volume = [{values[:, :, k].tobytes() for k in range(3)} for values in VOLUMES]
    with open_split(config, "test") as held_out:
        parts = [{part.image(i).tobytes() for i in range(len(part))} for part in (load_images(config), held_out)]
    assert [len(part) for part in parts] == [9, 3]
    assert all(volume <= parts[0] or volume <= parts[1] for volume in map(set, of_volume))


def test_slices_without_a_group_are_divided_one_by_one_and_alike_in_each_cache(folder: Path) -> None:
    config = DataConfig(**{**vars(save_table("parquet", folder)), "eval_fraction": 0.25})
    first = loaded(config)
    assert len(first) == 9
    assert (loaded(DataConfig(**{**vars(config), "cache_dir": str(folder.parent / "other")})) == first).all()


def test_volumes_of_one_name_in_folders_of_one_name_are_two_groups_wherever_the_data_lie(folder: Path) -> None:
    held_out = []
    for place in ("here", "there"):
        root = folder.parent / place
        paths = [path for site in "ab" for path in save_volumes(root / site / "anat")]
        rows = [{"bytes": None, "path": path} for path in paths]
        table = datasets.Dataset.from_dict({"scan": rows}).cast_column("scan", datasets.Nifti(decode=False))
        config = DataConfig(dataset_name=str(root), eval_fraction=0.25, group_column="file")
        sliced = with_slices(table, config)
        assert [*dict.fromkeys(groups_of(sliced, None, config))] == [
            f"{site}/anat/{i}.nii.gz" for site in "ab" for i in range(4)
        ]
        parts = divide(sliced, None, config)
        assert (parts.num_groups, len(parts.held_out)) == (2, 6)
        held_out.append(parts.held_out)
    assert held_out[0] == held_out[1]
    elsewhere = DataConfig(dataset_name=str(folder), cache_dir=str(folder), group_column="file")
    assert groups_of(sliced, None, elsewhere)[0] == paths[0]


def test_what_cannot_be_read_is_one_line(folder: Path) -> None:
    config = save_table("parquet", folder)
    with pytest.raises(UsageError, match="streaming must be off for a column of volumes, got 'scan'"):
        open_stream(DataConfig(**{**vars(config), "streaming": True}))
    two = datasets.Dataset.from_dict({"a": ["x.nii"], "b": ["y.nii"]})
    two = two.cast_column("a", datasets.Nifti()).cast_column("b", datasets.Nifti())
    with pytest.raises(UsageError, match=r"image_column must name the volumes, got None: .* \['a', 'b'\]"):
        load_images(DataConfig(cache_dir=config.cache_dir), dataset=two)
    damaged = table_of([str(folder.parent / "damaged.nii")])
    (folder.parent / "damaged.nii").write_bytes(b"no volume")
    with pytest.raises(UsageError, match=r"each file must be readable, got damaged\.nii"):
        load_images(DataConfig(cache_dir=config.cache_dir), dataset=damaged)
