"""What is wrong with data is blamed on what is wrong, and what can be read is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.data.splits import open_split
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, load_one, noise, png, save_grays


def test_damaged_exif_text_leaves_the_pixels_as_they_are(folder: Path) -> None:
    values = noise(8, 8)
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n    10\nno hex digits")
    assert (load_one(folder, Image.fromarray(values), save={"pnginfo": text}) == values).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_image_beyond_the_limit_of_pixels_names_limit_and_setting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    (values,) = save_grays(folder, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    load = open_stream if streaming else load_images
    with pytest.raises(UsageError, match=r"64 pixels\) exceeds limit of 40 pixels.* give --max_image_pixels"):
        load(cache_config(folder, streaming=streaming))
    with pytest.raises(UsageError, match=r"got row 0 .*: 64 pixels, more than 63; if it .* give --max_image_pixels"):
        load(cache_config(folder, streaming=streaming, max_image_pixels=63))
    images = load(cache_config(folder, streaming=streaming, max_image_pixels=64))
    assert images.size == (8, 8)
    if not streaming:
        assert (np.asarray(images.pixels).reshape(8, 8) == values).all()  # pyright: ignore[reportAttributeAccessIssue]
    assert Image.MAX_IMAGE_PIXELS == 20


@pytest.mark.parametrize("streaming", [False, True])
def test_array_beyond_the_limit_of_pixels_is_named_as_an_image_is(folder: Path, streaming: bool) -> None:
    np.save(folder / "a.npy", noise(8, 9, 5).transpose(2, 0, 1))
    load = open_stream if streaming else load_images
    with pytest.raises(UsageError, match=r"got row 0 \(.*a\.npy\): 72 pixels, more than 71; .* --max_image_pixels"):
        load(cache_config(folder, streaming=streaming, max_image_pixels=71))
    assert load(cache_config(folder, streaming=streaming, max_image_pixels=72)).channels == 5
    np.save(folder / "b.npy", noise(9, 9, 5).transpose(2, 0, 1))
    skipping = cache_config(folder, max_image_pixels=72, on_bad_image="skip", resolution=8)
    assert (len(load_images(skipping)), load_images(skipping).num_bad) == (1, 1)


def test_skipped_image_is_decoded_when_the_limit_allows_it(folder: Path) -> None:
    save_grays(folder, 1)
    Image.fromarray(noise(8, 9)).save(folder / "b.png")
    config = {"on_bad_image": "skip", "resolution": 8}
    assert len(load_images(cache_config(folder, **config, max_image_pixels=64))) == 1
    assert len(load_images(cache_config(folder, **config, max_image_pixels=72))) == 2


# `datasets` leaves the file of metadata to be closed by the garbage collection.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_empty_cell_of_labels_is_named(folder: Path) -> None:
    save_grays(folder, 3)
    for labels, kind in (((1, 2, ""), "whole numbers"), (("a", "b", ""), "texts")):
        rows = [f"{i:03}.png,{label}" for i, label in enumerate(labels)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")
        with pytest.raises(UsageError, match=r"must give each image a class.*, got an empty cell in row 2"):
            load_images(cache_config(folder, label_column="label", cache_dir=str(folder.parent / kind)))


def test_folder_of_the_cache_is_blamed_for_what_is_its_own(tmp_path: Path) -> None:
    """A file in the place of a folder refuses every user, as a folder without permission refuses all but one."""
    images = [{"bytes": png(noise(8, 8)), "path": None}]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"image": images}).to_parquet(tmp_path / "data" / "a.parquet")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data").write_text("")
    with pytest.raises(UsageError, match=r"^cache_dir must be a folder that can be written, got .*/cache': "):
        load_images(cache_config(tmp_path / "data"))


def test_first_cause_of_what_datasets_raises_is_told(tmp_path: Path) -> None:
    file = tmp_path / "data" / "a.parquet"
    file.parent.mkdir()
    columns = {"image": [{"bytes": bytes(1000), "path": None}], "kind": ["a"]}
    datasets.Dataset.from_dict(columns).to_parquet(file)
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"?" * 60 + content[64:])  # whole at its end, where a reader begins
    with pytest.raises(UsageError) as error:
        load_images(cache_config(tmp_path / "data"))
    assert "dataset_name must be loadable" in str(error.value)
    assert "An error occurred while generating" not in str(error.value)


def test_remedy_for_a_split_that_is_trained_on_is_not_yet_done(tmp_path: Path) -> None:
    for name in ("train", "mine"):
        save_grays(tmp_path / "data" / name, 2)
    config = cache_config(tmp_path / "data")
    message = "eval_split must be held out, got 'mine' of 'data', all of which is trained on: give --train_split train"
    with pytest.raises(UsageError, match=message), open_split(config, "mine", "eval_split"):
        pass
    shutil.rmtree(tmp_path / "data" / "train")
    save_grays(tmp_path / "data" / "other", 2)
    with (
        pytest.raises(UsageError, match="put the others in a folder `train` beside it"),
        open_split(config, "mine", "eval_split"),
    ):
        pass


def test_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    for name in ("train", "holdout"):
        save_grays(tmp_path / "data" / name, 2)
    with (
        pytest.raises(UsageError, match="got 'test' of 'data', which has holdout, train"),
        open_split(cache_config(tmp_path / "data"), "test", "eval_split"),
    ):
        pass


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def test_classes_of_images_in_one_folder_are_asked_for(folder: Path) -> None:
    save_grays(folder, 2)
    with pytest.raises(UsageError, match=r"got 'label', and there is none: in a folder of images, put each class"):
        load_images(cache_config(folder, label_column="label"))


def test_data_have_the_name_of_the_link_to_them(folder: Path) -> None:
    save_grays(folder, 1)
    link = folder.with_name("a link to them")
    link.symlink_to(folder, target_is_directory=True)
    assert load_images(cache_config(link)).name == "a link to them"


def test_error_has_one_line_whatever_the_name_of_an_image_holds(folder: Path) -> None:
    save_grays(folder, 1)
    (folder / "new\nline é.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"new\\nline é.png") as raised:
        load_images(cache_config(folder))
    assert "\n" not in str(raised.value)
