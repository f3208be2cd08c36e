"""The cache of decoded images: unreadable images, and the files on disk."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_ddpm.data import cache
from hf_ddpm.data.images import load_images
from hf_ddpm.runtime.errors import UsageError
from tests.support.forks import Process
from tests.support.image_data import cache_config, micro_batches, noise, png, save_grays

# Processes that are killed, and processes that are not


def decode(folder: Path, resolution: int) -> None:
    load_images(cache_config(folder, resolution=resolution))


def decode_and_be_killed(folder: Path) -> None:
    load_images(cache_config(folder), lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def test_what_a_killed_process_has_decoded_is_deleted_and_what_a_living_one_has_is_not(folder: Path) -> None:
    save_grays(folder, 3)
    root = folder.parent / "cache" / "hf_ddpm"
    killed = Process(decode_and_be_killed, (folder,))
    killed.start()
    killed.join()
    (abandoned,) = root.glob("*.part")

    def decode_in_another_process(*_: int) -> None:
        (mine,) = root.glob("*.part")
        assert mine != abandoned
        other = Process(decode, (folder, 4))
        other.start()
        other.join()
        assert other.exitcode == 0
        assert list(root.glob("*.part")) == [mine]

    images = load_images(cache_config(folder), decode_in_another_process)
    assert len(images) == 3
    assert not [path for path in root.rglob("*") if path.suffix in (".part", ".new") or path.name == ".lock"]


# Unreadable images


def save_unreadable_images(folder: Path) -> None:
    save_grays(folder, 3)
    whole = png(noise(64, 64))
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(noise(64, 64, 3)).save(folder / "cut.jpg")
    content = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])


def test_skip_counts_unreadable_images(folder: Path) -> None:
    save_unreadable_images(folder)
    images = load_images(cache_config(folder, on_bad_image="skip", resolution=8))
    assert (len(images), images.num_bad) == (3, 4)


def test_skip_keeps_labels_with_their_images(folder: Path) -> None:
    arrays = save_grays(folder / "a", 2) + save_grays(folder / "b", 1)
    (folder / "a" / "000.png").write_text("not an image")
    images = load_images(cache_config(folder, on_bad_image="skip", label_column="label"))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1]
    assert np.array_equal(images.image(0)[0], arrays[1])


@pytest.mark.parametrize("name", ["truncated.png", "text.png", "empty.jpg", "cut.jpg"])
def test_load_images_names_unreadable_file(folder: Path, name: str) -> None:
    save_unreadable_images(folder)
    for path in folder.iterdir():
        if path.name != name and not path.name.startswith("0"):
            path.unlink()
    with pytest.raises(UsageError, match=rf"{name}.*--on_bad_image skip"):
        load_images(cache_config(folder, resolution=8))
    assert not [path for path in (folder.parent / "cache" / "hf_ddpm").iterdir() if path.is_dir()]


def test_skip_rejects_data_without_readable_images(folder: Path) -> None:
    (folder / "a.png").write_text("no")
    with pytest.raises(UsageError, match="1 unreadable"):
        load_images(cache_config(folder, on_bad_image="skip"))
    whole = png(noise(64, 64))
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])  # whose header is fine
    with pytest.raises(UsageError, match="1 unreadable"):
        load_images(cache_config(folder, on_bad_image="skip"))


def test_load_images_names_unreadable_row(folder: Path) -> None:
    rows = [{"bytes": png(noise(8, 8)), "path": None}, None, {"bytes": b"no", "path": "note.png"}]
    rows += [{"bytes": None, "path": str(folder / "missing.png")}, {"bytes": None, "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), folder / "a.parquet")
    assert load_images(cache_config(folder, on_bad_image="skip")).num_bad == 4
    reasons = ["the row is empty", r"\(note.png\): not an image", r"No such file.*missing\.png", "the row is empty"]
    for row, reason in enumerate(reasons, 1):
        pq.write_table(pa.table({"image": pa.array([rows[0], rows[row]], kind)}), folder / "a.parquet")
        with pytest.raises(UsageError, match=rf"row 1.*{reason}.*--on_bad_image skip"):
            load_images(cache_config(folder))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
@pytest.mark.parametrize("place", ["header", "pixels"])
def test_skip_does_not_hide_transient_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    save_grays(folder, 4)
    read_bytes, calls = Path.read_bytes, []

    def fails(path: Path) -> bytes:
        calls.extend([path] if path.suffix == ".png" else [])
        if path.suffix == ".png" and len(calls) == (1 if place == "header" else 6):
            raise error
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(UsageError, match=r"every image must be readable, got .*; try again, or remove it"):
        load_images(cache_config(folder, on_bad_image="skip"))
    monkeypatch.undo()
    assert len(load_images(cache_config(folder, on_bad_image="skip"))) == 4


# Files of the cache


def test_second_call_opens_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 3)
    first = load_images(cache_config(folder))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    monkeypatch.setattr(cache, "open_dataset", lambda *_: pytest.fail("the data set was opened"))
    second = load_images(cache_config(folder))
    assert isinstance(second.pixels, np.memmap)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.fingerprint == second.fingerprint


def test_changed_files_and_settings_make_a_new_cache(folder: Path) -> None:
    save_grays(folder, 3)
    old = load_images(cache_config(folder))
    assert load_images(cache_config(folder, resolution=4)).size == (4, 4)
    Image.fromarray(noise(8, 8, seed=9)).save(folder / "001.png")
    new = load_images(cache_config(folder))
    assert np.array_equal(new.image(1)[0], noise(8, 8, seed=9))
    assert new.fingerprint != old.fingerprint


def test_fingerprint_depends_on_content_only(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_grays(tmp_path / name, 3)
    changed = noise(8, 8, seed=1)
    changed[0, 0] ^= 1
    Image.fromarray(changed).save(tmp_path / "c" / "001.png")
    prints = [load_images(cache_config(tmp_path / name)).fingerprint for name in ("a", "b", "c")]
    assert prints[0] == prints[1] != prints[2]


def test_decided_settings_find_the_same_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 1)
    images = load_images(cache_config(folder))
    monkeypatch.setattr(cache, "open_dataset", lambda *_: pytest.fail("the data set was opened"))
    again = load_images(cache_config(folder, resolution=images.size[0], channels=images.channels))
    assert again.fingerprint == images.fingerprint


def test_load_images_uses_cache_of_a_faster_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 3)
    rename = Path.rename

    def rename_as_second(self: Path, target: Path) -> Path:
        if not target.exists() and not target.suffix:  # the one that makes it whole
            shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_as_second)
    assert len(load_images(cache_config(folder))) == 3
    caches = [path for path in (folder.parent / "cache" / "hf_ddpm").iterdir() if not path.is_symlink()]
    assert len(caches) == 1


def test_deleted_cache_is_written_again(folder: Path) -> None:
    save_grays(folder, 2)
    images = load_images(cache_config(folder))
    decided = cache_config(folder, resolution=images.size[0], channels=images.channels)
    (first,) = (p for p in (folder.parent / "cache/hf_ddpm").iterdir() if not p.is_symlink())
    shutil.rmtree(first)
    assert len(load_images(decided)) == 2
    assert len(load_images(cache_config(folder))) == 2


def test_full_disk_is_reported_and_leaves_no_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match=r"do not fit on the disk .*--cache_dir, a smaller --resolution"):
        load_images(cache_config(folder))
    assert list((folder.parent / "cache/hf_ddpm").iterdir()) == []


def test_load_images_names_damaged_cache(folder: Path) -> None:
    save_grays(folder, 3)
    pixels = Path(str(load_images(cache_config(folder)).pixels.filename))  # pyright: ignore[reportAttributeAccessIssue]
    pixels.write_bytes(b"short")
    with pytest.raises(UsageError, match=r"damaged.*delete it"):
        load_images(cache_config(folder))


def test_load_images_rejects_cache_dir_that_is_a_file(folder: Path) -> None:
    save_grays(folder, 1)
    config = cache_config(folder)
    (folder.parent / "cache").mkdir()
    (folder.parent / "cache" / "hf_ddpm").write_text("")
    with pytest.raises(UsageError, match="cache_dir must be a folder"):
        load_images(config)


def test_pickle_of_cache_holds_no_pixels(folder: Path) -> None:
    save_grays(folder, 4, size=64)
    images = load_images(cache_config(folder))
    content = pickle.dumps(micro_batches(images))
    assert len(content) < 3000 < images.pixels.size
    assert np.array_equal(pickle.loads(content).images.image(2), images.image(2))


def test_process_holds_and_sends_nothing_of_each_image(folder: Path) -> None:
    """Places and labels of the images are mapped from their files, as the pixels are, and pickled as these."""
    lines = [f'{{"file_name": "{i:03}.png", "n": {i}}}\n' for i in range(40)]
    save_grays(folder, 40)
    (folder / "metadata.jsonl").write_text("".join(lines))
    images = load_images(cache_config(folder, label_column="n"))
    assert isinstance(images.index.base, mmap)
    assert images.labels is not None
    assert isinstance(images.labels.base, mmap)
    copy = pickle.loads(pickle.dumps(images))
    assert np.array_equal(copy.index, images.index)
    assert np.array_equal(copy.labels, images.labels)
    few, many = (replace(images, index=images.index[:n], labels=images.labels[:n]) for n in (2, 39))
    assert len(pickle.dumps(images)) < len(pickle.dumps(many))  # a part of them is sent with its values
    copy = pickle.loads(pickle.dumps(few))
    assert np.array_equal(copy.index, images.index[:2])
    assert np.array_equal(copy.labels, images.labels[:2])
