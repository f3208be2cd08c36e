"""Images that `eval_fraction` holds out: which ones, in which groups, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pytest
from PIL import Image

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.held_out import divide, require_share
from hf_ddpm.data.images import load_images
from hf_ddpm.data.sources import check_source, find_source
from hf_ddpm.data.splits import check_groups, check_split, describe_split, image_names, open_split
from hf_ddpm.data.tables import divide_training, open_dataset
from hf_ddpm.runtime.errors import MissingSplitError, UsageError
from tests.support.image_data import cache_config, noise, png, save_grays


def contents(images: ImageCache) -> set[bytes]:
    return {images.image(i).tobytes() for i in range(len(images))}


def save_patients(folder: Path, num_patients: int = 8, num_slices: int = 3) -> None:
    """Save slices of several patients, with metadata of whose they are and how heavy they are."""
    save_grays(folder, num_patients * num_slices)
    rows = [f"{i:03}.png,p{i % num_patients},{i}.5" for i in range(num_patients * num_slices)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,patient,mass", *rows]) + "\n")


def save_source(kind: str, folder: Path) -> dict[str, Any]:
    """Save 20 images as a source of a kind, and return the settings that name it."""
    arrays = save_grays(folder / "images", 20)
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(values), "path": None} for values in arrays]})
    if kind == "parquet":
        (folder / "files").mkdir()
        table.cast_column("image", datasets.Image()).to_parquet(folder / "files" / "train.parquet")
    if kind == "saved":
        table.cast_column("image", datasets.Image()).save_to_disk(folder / "files")
    if kind == "digits":
        return {"dataset_name": "digits"}
    return {"dataset_name": str(folder / ("images" if kind == "images" else "files"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "parquet", "saved", "digits"])
def test_training_and_held_out_images_are_all_and_none_is_both(folder: Path, kind: str) -> None:
    whole = DataConfig(**save_source(kind, folder), cache_dir=str(folder / "cache"))
    config = DataConfig(**save_source(kind, folder / "again"), cache_dir=str(folder / "cache"), eval_fraction=0.25)
    trained = load_images(config)
    with open_split(config, "test") as held_out:
        assert len(held_out) == round(len(load_images(whole)) / 4)
        assert contents(trained) | contents(held_out) == contents(load_images(whole))
        assert not contents(trained) & contents(held_out)
        assert describe_split(config, "test", held_out)[0].startswith(f"split test of {find_source(config).name}: ")
        assert len(image_names(config, "test", held_out)) == len(held_out)
    with open_split(config, "train") as images:
        assert contents(images) == contents(trained)
    said = describe_images(config, trained)[0]
    assert f"; {len(held_out)} more held out as the split 'test'" in said


def test_order_and_number_of_images_decide_little(folder: Path) -> None:
    """Images that are held out stay so in another order, and when others come: their share grows alike."""
    rows = [{"bytes": png(noise(8, 8, seed=i)), "path": None} for i in range(40)]
    config = DataConfig(eval_fraction=0.2)

    def held_out(indices: list[int]) -> set[int]:
        table = datasets.Dataset.from_dict({"image": [rows[i] for i in indices]}).cast_column(
            "image", datasets.Image()
        )
        return {indices[row] for row in divide(table, None, config).held_out}

    assert held_out([*range(40)]) == held_out([*range(39, -1, -1)])
    assert len(held_out([*range(40)])) == 8
    twice = held_out([*range(40), *range(40)])
    assert len(twice) == 8  # copies of an image stay together
    before, after = held_out([*range(20)]), held_out([*range(40)])
    assert len(before & after) >= len(before) - 2


def test_groups_are_held_out_as_a_whole(folder: Path) -> None:
    save_patients(folder)
    config = cache_config(folder, eval_fraction=0.25, group_column="patient")
    trained, held_out = (open_dataset(config, split)["image"] for split in ("train", "test"))
    patients = [{int(Path(row["path"]).stem) % 8 for row in rows} for rows in (trained, held_out)]
    assert not patients[0] & patients[1]
    assert len(held_out) == 6
    said = describe_images(config, load_images(config))[0]
    assert "6 more in 2 groups of 'patient' held out as the split 'test', 25.0% of all" in said


@pytest.mark.parametrize("sizes", [(19, 1, 1, 1), (1, 1, 19, 1), (1, 19, 1, 1)])
def test_large_group_is_not_held_out_for_a_few_images(folder: Path, sizes: tuple[int, ...]) -> None:
    for name, size in zip("abcd", sizes, strict=True):
        save_grays(folder / name, size)
    held_out = open_dataset(cache_config(folder, eval_fraction=0.1, group_column="folder"), "test")
    assert 1 <= len(held_out) <= 2


def test_groups_that_would_hold_out_far_more_are_refused_with_their_sizes(folder: Path) -> None:
    for name, size in (("a", 12), ("b", 9)):
        save_grays(folder / name, size)
    assert len(open_dataset(cache_config(folder, eval_fraction=0.1, group_column="folder"), "test")) == 9
    save_grays(folder / "b", 13)
    more = cache_config(folder, eval_fraction=0.4, group_column="folder")
    with pytest.raises(UsageError, match=r"got 0\.4 of 2 with 12 to 13 of 25 images, of which 52% would be held out"):
        require_share(divide_training(more), more)
    assert len(open_dataset(cache_config(folder, eval_fraction=0.51, group_column="folder"), "test")) == 13


def test_empty_cell_is_divided_as_other_rows_are(folder: Path) -> None:
    """It is named, or left out, when it is decoded."""
    rows = [*[{"bytes": None, "path": str(folder / f"{i}.png")} for i in range(9)], None]
    table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    parts = divide(table, folder, DataConfig(eval_fraction=0.5))
    assert sorted([*parts.trained, *parts.held_out]) == [*range(10)]


def test_missing_image_of_the_held_out_ones_is_one_line(folder: Path) -> None:
    save_grays(folder, 6)
    (folder / "metadata.csv").write_text("\n".join(["file_name", *[f"{i:03}.png" for i in range(12)]]) + "\n")
    config = cache_config(folder, eval_fraction=0.9, on_bad_image="skip")
    with (
        pytest.raises(UsageError, match=r"test_split must hold images that are there, got .*\.png.*: remove its row"),
        open_split(config, "test", "test_split"),
    ):
        pass


def test_classes_are_compared_by_their_names(folder: Path) -> None:
    for name in ("train/a", "train/b", "test/c", "test/d"):
        save_grays(folder / name, 1)
    check_groups(cache_config(folder, group_column="label"), "test")


def test_condition_that_changes_is_decoded_again(folder: Path) -> None:
    for i in range(8):
        Image.fromarray(noise(8, 8, seed=i)).save(folder / f"{i}.png")
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(folder / f"from-{i}.png")
    rows = [f"{i}.png,from-{i}.png" for i in range(8)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,mask_file_name", *rows]) + "\n")
    config = cache_config(folder, eval_fraction=0.25, condition_column="mask")
    first = load_images(config)
    for i in range(8):
        Image.fromarray(np.full((8, 8), 200, np.uint8)).save(folder / f"from-{i}.png")
    again = load_images(config)
    assert first.conditions is not None
    assert again.conditions is not None
    assert (again.conditions.image(0) == 200).all()
    assert again.fingerprint != first.fingerprint


def save_tables(kind: str, folder: Path, splits: dict[str, int]) -> None:
    """Save splits of so many images as tables of a kind."""
    tables = {}
    for split, count in splits.items():
        images = [noise(8, 8, seed=i) for i in range(count)]
        rows = [{"bytes": png(image), "path": None} for image in images]
        tables[split] = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
        if kind == "parquet":
            tables[split].to_parquet(folder / f"{split}.parquet")
        if kind == "hdf5":
            with h5py.File(folder / f"{split}.h5", "w") as file:
                file["image"] = np.stack(images)
        if kind == "tar":
            with tarfile.open(folder / f"{split}-0.tar", "w") as file:
                for i, row in enumerate(rows):
                    member = tarfile.TarInfo(f"{i}.png")
                    member.size = len(row["bytes"])
                    file.addfile(member, io.BytesIO(row["bytes"]))
    if kind == "saved":
        datasets.DatasetDict(tables).save_to_disk(folder)


@pytest.mark.parametrize("kind", ["parquet", "tar", "hdf5", "saved"])
def test_split_of_tables_is_not_shadowed(folder: Path, kind: str) -> None:
    save_tables(kind, folder, {"train": 12, "test": 5})
    with pytest.raises(UsageError, match=r"must be left out where there is a split 'test', got 0.25 and .*'photos'"):
        load_images(cache_config(folder, eval_fraction=0.25))


def test_no_bar_of_datasets_is_seen_when_a_split_is_opened(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tables("saved", folder, {"train": 4})
    datasets.enable_progress_bars()
    capsys.readouterr()
    with open_split(cache_config(folder, eval_fraction=0.5), "test") as images:
        assert len(images) == 2
    assert capsys.readouterr().err == ""
    assert not datasets.utils.are_progress_bars_disabled()


def test_folder_of_each_image_may_be_its_group(folder: Path) -> None:
    for name in ("scan-1/a", "scan-1/b", "scan-2/a", "scan-3/a"):
        save_grays(folder / name, 2)
    config = cache_config(folder, eval_fraction=0.1, group_column="folder")
    held_out = open_dataset(config, "test")["image"]
    assert len({Path(row["path"]).parent for row in held_out}) == 1
    assert len(held_out) == 2


def test_labels_and_conditions_stay_with_their_images(folder: Path) -> None:
    """One image is made from several others, and none of them may be on both sides."""
    images = [noise(8, 8, seed=i // 2) for i in range(12)]
    for i, values in enumerate(images):
        Image.fromarray(values).save(folder / f"{i}.png")
        Image.fromarray(255 - values).save(folder / f"from-{i}.png")
    rows = [f"{i}.png,from-{i}.png,{i}.5" for i in range(12)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,mask_file_name,k", *rows]) + "\n")
    config = cache_config(folder, eval_fraction=0.25, condition_column="mask", label_column="k")
    with open_split(config, "test") as held_out:
        for part, count in ((load_images(config), 9), (held_out, 3)):
            assert len(part) == count
            assert part.conditions is not None
            assert part.labels is not None
            for i in range(count):
                assert (part.image(i) == 255 - part.conditions.image(i)).all()
                assert (part.image(i) == images[int(part.labels[i] - 0.5)]).all()


def test_conditions_decide_not_which_images_are_held_out(folder: Path) -> None:
    save_grays(folder, 10)
    rows = [f"{i:03}.png,{9 - i:03}.png" for i in range(10)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,mask_file_name", *rows]) + "\n")
    config = cache_config(folder, eval_fraction=0.3, condition_column="mask")
    images = load_images(config)
    assert images.conditions is not None
    for i, row in enumerate(open_dataset(config)["image"]):
        other = 9 - int(Path(row["path"]).stem)
        assert (images.conditions.image(i)[0] == noise(8, 8, seed=other)).all()


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_group_in_training_and_in_a_split_is_named(folder: Path, kind: str) -> None:
    tables = {}
    for split, patients in (("train", "abc"), ("test", "cd")):
        images = [{"bytes": png(noise(8, 8, seed=i)), "path": None} for i in range(len(patients))]
        columns = {"image": images, "patient": [*patients]}
        tables[split] = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        if kind == "parquet":
            tables[split].to_parquet(folder / f"{split}.parquet")
        if kind == "images":
            save_grays(folder / split, len(patients))
            rows = [f"{i:03}.png,{patient}" for i, patient in enumerate(patients)]
            (folder / split / "metadata.csv").write_text("\n".join(["file_name,patient", *rows]) + "\n")
    if kind == "saved":
        datasets.DatasetDict(tables).save_to_disk(folder)
    with open_split(cache_config(folder), "test"):
        pass
    message = r"test_split must share no group of 'patient' with training, got 'test' with 1 that do, 'c'"
    with (
        pytest.raises(UsageError, match=message),
        open_split(cache_config(folder, group_column="patient"), "test", "test_split"),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_fraction": 0.99}, "must leave images to train on, got 0.99 of 24"),
        ({"eval_fraction": 0.95, "group_column": "patient"}, "must leave groups of 'patient' .* got 0.95 of 8"),
        (
            {"eval_fraction": 0.1, "group_column": "name"},
            r"group_column must be one of \[.*\], or 'folder' or 'file', .* got 'name'",
        ),
    ],
)
def test_what_holds_out_all_or_nothing_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    save_patients(folder)
    with pytest.raises(UsageError, match=message):
        load_images(cache_config(folder, **settings))


def test_empty_cell_of_groups_is_named(folder: Path) -> None:
    save_grays(folder, 2)
    (folder / "metadata.csv").write_text("file_name,patient\n000.png,a\n001.png,\n")
    with pytest.raises(UsageError, match="an empty cell in row 1 of 'patient'"):
        load_images(cache_config(folder, eval_fraction=0.5, group_column="patient"))


def test_split_that_is_there_is_not_held_out_again(folder: Path) -> None:
    for split in ("train", "test", "val"):
        save_grays(folder / split, 2)
    with pytest.raises(UsageError, match=r"left out where there is a split 'test', got 0.5 and 'test' of 'photos'"):
        check_source(cache_config(folder, eval_fraction=0.5))
    check_source(cache_config(folder / "train", eval_fraction=0.5))
    with pytest.raises(MissingSplitError):
        check_split(cache_config(folder / "train", eval_fraction=0.5), "val", "eval_split")


def test_other_fraction_makes_another_cache(folder: Path) -> None:
    save_grays(folder, 10)
    prints = {load_images(cache_config(folder, eval_fraction=f)).fingerprint for f in (None, 0.1, 0.2)}
    assert len(prints) == 3
