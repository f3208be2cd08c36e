"""hf_ddpm.data.cache on real files of every kind it accepts."""

from __future__ import annotations

import errno
import gc
import io
import pickle
import socket
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_ddpm.data import cache, decoding
from hf_ddpm.data.batches import MicroBatches, epoch_order, to_x_0
from hf_ddpm.data.cache import load_images, open_dataset
from hf_ddpm.data.sources import check_source
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig

pytestmark = pytest.mark.usefixtures("quiet")
FASHION_MNIST = Path(__file__).parents[3] / "shared" / "data" / "fashion_mnist"


@pytest.fixture
def quiet() -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


def noise(height: int, width: int, channels: int = 0, seed: int = 0, high: int = 256) -> np.ndarray:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint16 if high > 256 else np.uint8)


def save_grays(folder: Path, count: int, size: int = 8) -> list[np.ndarray]:
    arrays = [noise(size, size, seed=i) for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for i, values in enumerate(arrays):
        Image.fromarray(values).save(folder / f"{i:03}.png")
    return arrays


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def config_of(path: Path | None, /, **settings: Any) -> TrainingConfig:
    if path is not None:
        settings = {"dataset_name": str(path), "cache_dir": str(path.parent / "cache"), **settings}
    return TrainingConfig(**settings)


def load_one(folder: Path, image: Image.Image, suffix: str = "png", /, **settings: Any) -> np.ndarray:
    image.save(folder / f"a.{suffix}", **settings.pop("save", {}))
    images = load_images(config_of(folder, **settings))
    assert len(images) == 1
    assert images.channels == images.image(0).shape[0]
    return images.image(0)


def batches_of(images: cache.ImageCache, **settings: Any) -> MicroBatches:
    defaults = {"seed": 0, "random_flip": False, "batch_size": 4, "accumulation_steps": 1, "rank": 0}
    return MicroBatches(images, **{**defaults, "num_processes": 1, "first_position": 0, "num_steps": 10, **settings})


# Modes of images


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_opaque_modes_keep_their_values(folder: Path, mode: str, channels: int | None) -> None:
    gray = noise(8, 8)
    source = {
        "1": Image.fromarray(gray > 127),
        "L": Image.fromarray(gray),
        "RGB": Image.fromarray(noise(8, 8, 3)),
        "P": Image.fromarray(noise(8, 8, 3)).quantize(64),
    }[mode]
    assert source.mode == mode
    values = load_one(folder, source, channels=channels)
    wanted_channels = channels or (1 if mode in ("1", "L") else 3)
    wanted = np.asarray(source.convert("RGB").convert("L" if wanted_channels == 1 else "RGB"))
    assert np.array_equal(values, wanted[None] if wanted_channels == 1 else wanted.transpose(2, 0, 1))


def test_transparency_of_gray_is_composited_over_white(folder: Path) -> None:
    values = np.array([[[100, 255], [100, 0]], [[0, 51], [200, 255]]], np.uint8)
    assert load_one(folder, Image.fromarray(values)).tolist() == [[[100, 255], [204, 200]]]


def test_transparency_of_color_is_composited_over_white(folder: Path) -> None:
    values = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]], [[0, 100, 255, 51], [1, 2, 3, 255]]], np.uint8)
    planes = load_one(folder, Image.fromarray(values))
    assert planes.transpose(1, 2, 0).tolist() == [[[10, 20, 30], [255, 255, 255]], [[204, 224, 255], [1, 2, 3]]]


def test_four_channels_keep_transparency(folder: Path) -> None:
    values = noise(4, 4, 4)
    assert np.array_equal(load_one(folder, Image.fromarray(values), channels=4), values.transpose(2, 0, 1))


def test_four_channels_of_opaque_images_are_opaque(folder: Path) -> None:
    Image.fromarray(noise(4, 4)).save(folder / "a.png")
    Image.fromarray(noise(4, 4, high=65536)).save(folder / "b.png")
    images = load_images(config_of(folder, channels=4))
    assert (images.image(0)[3] == 65535).all()
    assert (images.image(1)[3] == 65535).all()


def test_transparent_palette_is_composited_over_white(folder: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    planes = load_one(folder, image, save={"transparency": 1})
    assert planes.transpose(1, 2, 0).tolist() == [[[255, 0, 0], [255] * 3], [[0, 0, 255], [255] * 3]]


def test_transparent_gray_level_is_composited_over_white(folder: Path) -> None:
    image = Image.fromarray(np.array([[7, 8], [9, 8]], np.uint8))
    assert load_one(folder, image, save={"transparency": 8}).tolist() == [[[7, 255], [9, 255]]]


def test_cmyk_becomes_rgb(folder: Path) -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(load_one(folder, image, "tif").astype(int)[:, 0, 0] - [0, 255, 255]).max() == 0


def test_gray_is_repeated_among_colors(folder: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(folder / "a.png")
    Image.fromarray(noise(8, 8)).save(folder / "b.png")
    images = load_images(config_of(folder))
    assert np.array_equal(images.image(1), np.repeat(noise(8, 8)[None], 3, axis=0))


def test_exif_orientation_is_applied(folder: Path) -> None:
    values = np.zeros((8, 16), np.uint8)
    values[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half comes to the top
    planes = load_one(folder, Image.fromarray(values), save={"exif": exif}, resolution=8)
    assert planes.shape == (1, 16, 8)
    assert (planes[0, :8] == 255).all()
    assert (planes[0, 8:] == 0).all()


# 16 bits


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_preserved(folder: Path, suffix: str) -> None:
    values = noise(8, 8, high=65536)
    images = load_one(folder, Image.fromarray(values), suffix)
    assert images.dtype == np.uint16
    assert np.array_equal(images[0], values)


def test_sixteen_bits_are_resized_to_within_one_level(folder: Path) -> None:
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint16) * 4001, (16, 16))
    planes = load_one(folder, Image.fromarray(np.ascontiguousarray(ramp)), resolution=8)
    # inside, halving a linear ramp by a symmetric kernel gives the mean of each pair
    wanted = ramp[0].astype(float).reshape(8, 2).mean(1)[1:-1]
    assert np.abs(planes[0, 3, 1:-1] - wanted).max() <= 1


def test_sixteen_bits_become_eight_by_value(folder: Path) -> None:
    values = np.array([[0, 128, 129, 255], [256, 32767, 32768, 65535]] * 2, np.uint16)
    planes = load_one(folder, Image.fromarray(values), preserve_input_precision=False)
    assert planes.dtype == np.uint8
    assert planes[0, :2].tolist() == [[0, 0, 1, 1], [1, 127, 128, 255]]


def test_sixteen_bits_win_even_after_many_of_eight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "NUM_HEADERS", 2)
    grays = save_grays(folder, 5)
    Image.fromarray(noise(8, 8, high=65536)).save(folder / "z.png")
    images = load_images(config_of(folder))
    assert images.max_value == 65535
    assert np.array_equal(images.image(3)[0], grays[3].astype(int) * 257)
    assert np.array_equal(images.image(5)[0], noise(8, 8, high=65536))
    assert batches_of(images)[0]["pixels"].dtype == torch.int32


def test_transparent_level_of_sixteen_bits_becomes_white(folder: Path) -> None:
    values = np.array([[7000, 8000], [9000, 8000]], np.uint16)
    content = png(values)
    chunk = b"tRNS" + (8000).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    place = content.index(b"IDAT") - 4
    (folder / "a.png").write_bytes(content[:place] + chunk + content[place:])
    assert load_images(config_of(folder)).image(0)[0].tolist() == [[7000, 65535], [9000, 65535]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [(np.full((4, 4), 0.5, np.float32), "32-bit floats"), (np.full((4, 4), 70000, np.int32), "70000")],
)
def test_pixels_of_unknown_range_are_refused(folder: Path, values: np.ndarray, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load_one(folder, Image.fromarray(values), "tif")


# Sizes


def test_shorter_side_becomes_the_resolution_and_crops_are_random(folder: Path) -> None:
    image = Image.fromarray(noise(20, 31, 3))
    planes = load_one(folder, image, resolution=10)
    wanted = image.resize((15, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(planes, np.asarray(wanted).transpose(2, 0, 1))
    batches = batches_of(load_images(config_of(folder, resolution=10)), batch_size=64)
    offsets = set()
    for pixels in batches[0]["pixels"].numpy():
        matches = [left for left in range(6) if np.array_equal(pixels, planes[:, :, left : left + 10])]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert offsets == {0, 1, 2, 3, 4, 5}


def test_center_crop_is_square_and_central(folder: Path) -> None:
    image = Image.fromarray(noise(31, 20))
    planes = load_one(folder, image, resolution=10, center_crop=True)
    tall = np.asarray(image.resize((10, 15), Image.Resampling.BILINEAR))
    assert np.array_equal(planes[0], tall[2:12])
    image = Image.fromarray(noise(20, 31))
    planes = load_one(folder, image, resolution=10, center_crop=True)
    wide = np.asarray(image.resize((15, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(planes[0], wide[:, 2:12])


def test_open_resolution_is_that_of_the_data(folder: Path) -> None:
    save_grays(folder, 3, size=12)
    assert load_images(config_of(folder)).resolution == 12


@pytest.mark.parametrize("num_headers", [1, 64])
def test_open_resolution_needs_one_square_size(
    folder: Path, num_headers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "NUM_HEADERS", num_headers)
    save_grays(folder, 2)
    Image.fromarray(noise(8, 9)).save(folder / "odd.png")
    with pytest.raises(UsageError, match=r"odd\.png.* 9x8.*--resolution"):
        load_images(config_of(folder))


def test_color_after_gray_is_refused_when_channels_are_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "NUM_HEADERS", 1)
    save_grays(folder, 2)
    Image.fromarray(noise(8, 8, 3)).save(folder / "red.png")
    with pytest.raises(UsageError, match=r"red\.png.*--channels 3"):
        load_images(config_of(folder))
    luma = np.asarray(Image.fromarray(noise(8, 8, 3)).convert("L"))
    assert np.array_equal(load_images(config_of(folder, channels=1)).image(2)[0], luma)


def test_absurd_shape_is_unreadable(folder: Path) -> None:
    with pytest.raises(UsageError, match="1x101 pixels is too oblong"):
        load_one(folder, Image.fromarray(noise(101, 1)), resolution=4)


# Unreadable images


def spoil(folder: Path) -> None:
    save_grays(folder, 3)
    whole = png(noise(64, 64))
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(noise(64, 64, 3)).save(folder / "cut.jpg")
    content = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])


def test_unreadable_images_are_skipped_and_counted(folder: Path) -> None:
    spoil(folder)
    images = load_images(config_of(folder, on_bad_image="skip", resolution=8))
    assert (len(images), images.num_bad) == (3, 4)


def test_labels_stay_with_their_images(folder: Path) -> None:
    arrays = save_grays(folder / "a", 2) + save_grays(folder / "b", 1)
    (folder / "a" / "000.png").write_text("not an image")
    images = load_images(config_of(folder, on_bad_image="skip", label_column="label"))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1]
    assert np.array_equal(images.image(0)[0], arrays[1])


@pytest.mark.parametrize("name", ["truncated.png", "text.png", "empty.jpg", "cut.jpg"])
def test_unreadable_image_is_named(folder: Path, name: str) -> None:
    spoil(folder)
    for path in folder.iterdir():
        if path.name != name and not path.name.startswith("0"):
            path.unlink()
    with pytest.raises(UsageError, match=rf"{name}.*--on_bad_image skip"):
        load_images(config_of(folder, resolution=8))
    assert not [path for path in (folder.parent / "cache" / "hf_ddpm").iterdir() if path.is_dir()]


def test_all_unreadable_is_an_error(folder: Path) -> None:
    (folder / "a.png").write_text("no")
    with pytest.raises(UsageError, match="1 unreadable"):
        load_images(config_of(folder, on_bad_image="skip"))
    whole = png(noise(64, 64))
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])  # whose header is fine
    with pytest.raises(UsageError, match="1 unreadable"):
        load_images(config_of(folder, on_bad_image="skip"))


def test_unreadable_row_is_named(folder: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": png(noise(8, 8)), "path": None}, None, {"bytes": b"no", "path": "note.png"}]
    rows += [{"bytes": None, "path": str(folder / "missing.png")}, {"bytes": None, "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), folder / "a.parquet")
    assert load_images(config_of(folder, on_bad_image="skip")).num_bad == 4
    reasons = ["the row is empty", r"\(note.png\): not an image", r"No such file.*missing\.png", "the row is empty"]
    for row, reason in enumerate(reasons, 1):
        pq.write_table(pa.table({"image": pa.array([rows[0], rows[row]], kind)}), folder / "a.parquet")
        with pytest.raises(UsageError, match=rf"row 1.*{reason}.*--on_bad_image skip"):
            load_images(config_of(folder))


# The cache


def test_second_call_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 3)
    first = load_images(config_of(folder))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    monkeypatch.setattr(cache, "open_dataset", lambda *_: pytest.fail("the data set was opened"))
    second = load_images(config_of(folder))
    assert isinstance(second.pixels, np.memmap)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.fingerprint == second.fingerprint


def test_changed_files_and_settings_get_a_new_cache(folder: Path) -> None:
    save_grays(folder, 3)
    old = load_images(config_of(folder))
    assert load_images(config_of(folder, resolution=4)).resolution == 4
    Image.fromarray(noise(8, 8, seed=9)).save(folder / "001.png")
    new = load_images(config_of(folder))
    assert np.array_equal(new.image(1)[0], noise(8, 8, seed=9))
    assert new.fingerprint != old.fingerprint


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_grays(tmp_path / name, 3)
    changed = noise(8, 8, seed=1)
    changed[0, 0] ^= 1
    Image.fromarray(changed).save(tmp_path / "c" / "001.png")
    prints = [load_images(config_of(tmp_path / name)).fingerprint for name in ("a", "b", "c")]
    assert prints[0] == prints[1] != prints[2]


def test_what_a_run_wrote_into_its_config_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 1)
    images = load_images(config_of(folder))
    monkeypatch.setattr(cache, "open_dataset", lambda *_: pytest.fail("the data set was opened"))
    again = load_images(config_of(folder, resolution=images.resolution, channels=images.channels))
    assert again.fingerprint == images.fingerprint


def test_loser_of_a_race_uses_the_winners_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 3)
    rename = Path.rename

    def rename_as_second(self: Path, target: Path) -> Path:
        if not target.exists():
            cache.shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_as_second)
    assert len(load_images(config_of(folder))) == 3
    caches = [path for path in (folder.parent / "cache" / "hf_ddpm").iterdir() if not path.is_symlink()]
    assert len(caches) == 1


def test_a_cache_that_somebody_has_deleted_is_made_again(folder: Path) -> None:
    save_grays(folder, 2)
    images = load_images(config_of(folder))
    decided = config_of(folder, resolution=images.resolution, channels=images.channels)
    (first,) = (p for p in (folder.parent / "cache/hf_ddpm").iterdir() if not p.is_symlink())
    cache.shutil.rmtree(first)
    assert len(load_images(decided)) == 2
    assert len(load_images(config_of(folder))) == 2


def test_a_full_disk_is_said_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder, 2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match=r"do not fit on the disk .*--cache_dir, a smaller --resolution"):
        load_images(config_of(folder))
    assert list((folder.parent / "cache/hf_ddpm").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
@pytest.mark.parametrize("place", ["header", "pixels"])
def test_an_image_that_a_disk_may_give_later_is_not_skipped(
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
        load_images(config_of(folder, on_bad_image="skip"))
    monkeypatch.undo()
    assert len(load_images(config_of(folder, on_bad_image="skip"))) == 4


def test_damaged_cache_is_named(folder: Path) -> None:
    save_grays(folder, 3)
    pixels = Path(str(load_images(config_of(folder)).pixels.filename))  # pyright: ignore[reportAttributeAccessIssue]
    pixels.write_bytes(b"short")
    with pytest.raises(UsageError, match=r"damaged.*delete it"):
        load_images(config_of(folder))


def test_cache_dir_that_is_a_file(folder: Path) -> None:
    save_grays(folder, 1)
    config = config_of(folder)
    open_dataset(config)
    (folder.parent / "cache" / "hf_ddpm").write_text("")
    with pytest.raises(UsageError, match="cache_dir must be a folder"):
        load_images(config)


def test_pickle_holds_no_pixels(folder: Path) -> None:
    save_grays(folder, 4, size=64)
    images = load_images(config_of(folder))
    content = pickle.dumps(batches_of(images))
    assert len(content) < 2000 < images.pixels.size
    assert np.array_equal(pickle.loads(content).images.image(2), images.image(2))


# Sources


def test_digits(tmp_path: Path) -> None:
    images = load_images(config_of(None, dataset_name="digits", label_column="label", cache_dir=str(tmp_path)))
    assert (len(images), images.resolution, images.channels, images.max_value) == (1797, 8, 1, 255)
    assert (images.class_names, images.num_classes) == (list("0123456789"), 10)
    assert (images.license, images.name) == ("cc-by-4.0", "digits")
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first = [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert images.image(0)[0, :2].tolist() == [[round(v * 255 / 16) for v in row] for row in first]


def test_class_folders(folder: Path) -> None:
    save_grays(folder / "dogs", 2)
    save_grays(folder / "cats", 3)
    (folder / "notes.txt").write_text("not an image")
    images = load_images(
        config_of(None, train_data_dir=str(folder), label_column="label", cache_dir=str(folder / "c"))
    )
    assert (images.class_names, images.name) == (["cats", "dogs"], "photos")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # `datasets` leaves the csv file open
def test_metadata_file(folder: Path) -> None:
    save_grays(folder, 3)
    (folder / "metadata.csv").write_text("file_name,kind\n000.png,b\n001.png,a\n002.png,b\n")
    images = load_images(config_of(folder, label_column="kind"))
    assert images.class_names == ["a", "b"]
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0, 1]
    gc.collect()


def test_local_data_need_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", False)
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: calls.append(_))
    save_grays(folder, 1)
    load_images(config_of(folder))
    load_images(config_of(None, dataset_name="digits", cache_dir=str(folder)))
    assert calls == []


def test_splits_of_an_image_folder(folder: Path) -> None:
    save_grays(folder / "train", 3)
    save_grays(folder / "test", 2)
    assert len(load_images(config_of(folder))) == 3
    # as in diffusers' script, whose `datasets` finds the splits
    by_folder = config_of(None, train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"))
    assert len(load_images(by_folder)) == 3
    loaded = pytest.importorskip("datasets").load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert len(loaded) == 3
    save_grays(folder.parent / "test and more" / "test", 2)
    save_grays(folder.parent / "test and more", 1)
    assert len(load_images(config_of(folder.parent / "test and more"))) == 3


def test_folder_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    save_grays(tmp_path / "my [best] photos*", 2)
    assert len(load_images(config_of(tmp_path / "my [best] photos*"))) == 2


def test_images_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    save_grays(tmp_path / "in", 2)
    archive = cache.shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "in")
    load = datasets.load_dataset
    options = {"data_files": {"train": archive}, "split": "train", "cache_dir": str(tmp_path)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load("imagefolder", **options))
    images = load_images(config_of(None, dataset_name="me/photos", cache_dir=str(tmp_path)))
    assert np.array_equal(images.image(1)[0], noise(8, 8, seed=1))


@pytest.mark.parametrize("has_metadata", [True, False])
def test_parquet(folder: Path, has_metadata: bool) -> None:
    datasets = pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    features = datasets.Features(pic=datasets.Image(), kind=datasets.ClassLabel(names=["x", "y"]))
    arrays = [noise(8, 8, seed=i) for i in range(4)]
    columns = {"pic": [Image.fromarray(values) for values in arrays], "kind": [0, 1, 1, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "some name.parquet")
    if not has_metadata:
        table = pq.read_table(folder / "some name.parquet").replace_schema_metadata(None)
        pq.write_table(table, folder / "some name.parquet")
    images = load_images(config_of(folder, label_column="kind"))
    assert all(np.array_equal(images.image(i)[0], arrays[i]) for i in range(4))
    assert images.class_names == (["x", "y"] if has_metadata else None)
    assert images.num_classes == 2
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1, 1]


def test_parquet_splits(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for split, count in (("train", 3), ("test", 2)):
        columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(count)]}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    assert len(load_images(config_of(folder))) == 3
    (folder / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UsageError, match=r"split `train`.* got 'photos'.*test"):
        load_images(config_of(folder))


def test_configurations_of_a_parquet_folder(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for name, count in (("few", 2), ("many", 4)):
        columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(count)]}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    configs = [f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("few", "many")]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    assert len(load_images(config_of(folder, dataset_config_name="few"))) == 2
    assert len(load_images(config_of(folder, dataset_config_name="many"))) == 4
    with pytest.raises(UsageError, match=r"(?s)--dataset_config_name.*got 'photos'.*few.*many"):
        load_images(config_of(folder))


@pytest.mark.parametrize("in_dict", [True, False])
def test_saved_by_datasets(folder: Path, in_dict: bool) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(3)], "year": [1999, 1990, 1999]}
    saved = datasets.Dataset.from_dict(columns)
    saved = datasets.DatasetDict({"train": saved, "test": saved.select([0])}) if in_dict else saved
    saved.save_to_disk(str(folder))
    images = load_images(config_of(folder, label_column="year"))
    assert images.class_names == ["1990", "1999"]
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0, 1]
    assert np.array_equal(images.image(2)[0], noise(8, 8, seed=2))


def test_fashion_mnist(tmp_path: Path) -> None:
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs ../shared/data/fashion_mnist")
    dataset = open_dataset(config_of(None, dataset_name=str(FASHION_MNIST), cache_dir=str(tmp_path)))
    assert len(dataset) == 60000
    assert set(dataset[0]["image"]) == {"bytes", "path"}


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
        ({"dataset_name": __file__}, "must be a folder, got .*test_data.py"),
        ({"dataset_name": "digits", "dataset_config_name": "big"}, "'big': leave it out"),
    ],
)
def test_sources_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_source(TrainingConfig(**settings))


def test_folders_without_images(folder: Path) -> None:
    (folder / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"folder of images or parquet files, got .*photos"):
        check_source(config_of(folder), config_of(folder).output_dir)
    (folder / "a.parquet").write_text("")
    check_source(config_of(folder), config_of(folder).output_dir)
    with pytest.raises(UsageError, match=r"folder of images \(parquet files: --dataset_name\), got .*photos"):
        check_source(config_of(None, train_data_dir=str(folder)))
    save_grays(folder, 1)
    with pytest.raises(UsageError, match=r"got both in .*photos.*name a sub-folder"):
        check_source(config_of(folder), config_of(folder).output_dir)


def test_saved_dict_without_train(folder: Path) -> None:
    (folder / "dataset_dict.json").write_text('{"splits": ["dev"]}')
    with pytest.raises(UsageError, match=r"split `train`, got .*photos' with \['dev'\]"):
        check_source(config_of(folder), config_of(folder).output_dir)


def test_unknown_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cache.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = TrainingConfig(dataset_name="nobody/nothing-at-all", cache_dir=str(tmp_path))
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
        ({"image_column": "back", "label_column": "weight"}, "strings, got 'weight' of .*float64.*--label_column"),
        ({"image_column": "back", "label_column": "front"}, "strings, got 'front'.*--label_column"),
        ({"image_column": "back", "label_column": "hole"}, "label_column must .*, got None in row 1 of 'hole'"),
    ],
)
def test_wrong_columns(folder: Path, settings: dict[str, Any], message: str) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(noise(8, 8))] * 2
    columns = {"front": pictures, "back": pictures, "weight": [0.5, 1.5], "hole": ["a", None]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    with pytest.raises(UsageError, match=message):
        load_images(config_of(folder, **settings))
    assert load_images(config_of(folder, image_column="back")).labels is None


def test_no_image_column_and_no_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UsageError, match=r"no column of images among \['text'\].*--image_column"):
        load_images(config_of(tmp_path / "text"))
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": []}, features=features).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="dataset_name must hold images, got 'none' with 0 rows"):
        load_images(config_of(tmp_path / "none"))


def test_class_label_without_class(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    columns = {"image": [Image.fromarray(noise(8, 8))] * 2, "label": [1, -1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    with pytest.raises(UsageError, match="got -1 in row 1 of 'label'"):
        load_images(config_of(folder, label_column="label"))


# The order


@pytest.fixture
def seven(folder: Path) -> cache.ImageCache:
    """Seven oblong images, so that crops, flips and the ends of epochs all take part."""
    lines = [f'{{"file_name": "{i}.png", "n": {i}}}\n' for i in range(7)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    for i in range(7):
        Image.fromarray(noise(8, 14, seed=i)).save(folder / f"{i}.png")
    return load_images(config_of(folder, label_column="n", resolution=8))


def stream(images: cache.ImageCache, num_processes: int, accumulation: int, batch_size: int, **settings: Any) -> Any:
    """All processes' micro-batches, put together by position."""
    settings = {
        "batch_size": batch_size,
        "accumulation_steps": accumulation,
        "num_processes": num_processes,
    } | settings
    settings = {"num_steps": 96 // (num_processes * accumulation * batch_size), "random_flip": True} | settings
    ranks = [list(batches_of(images, rank=rank, **settings)) for rank in range(num_processes)]  # type: ignore[arg-type]
    flat = [ranks[rank][k] for k in range(len(ranks[0])) for rank in range(num_processes)]
    return {key: torch.cat([batch[key] for batch in flat]) for key in flat[0]}


@pytest.mark.parametrize(
    ("num_processes", "accumulation", "batch_size"), [(2, 1, 4), (4, 2, 1), (1, 3, 16), (1, 1, 96)]
)
def test_stream_does_not_depend_on_how_it_is_cut(
    seven: cache.ImageCache, num_processes: int, accumulation: int, batch_size: int
) -> None:
    wanted = stream(seven, 1, 1, 8)
    got = stream(seven, num_processes, accumulation, batch_size)
    assert torch.equal(got["positions"], torch.arange(96))
    assert all(torch.equal(got[key], wanted[key]) for key in ("pixels", "positions", "labels"))


def test_each_epoch_sees_each_image_once(seven: cache.ImageCache) -> None:
    labels = stream(seven, 1, 1, 8)["labels"]
    epochs = labels[:91].reshape(13, 7)
    assert (epochs.sort(1).values == torch.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert epochs[3].tolist() == epoch_order(0, 3, 7).tolist()


def test_pixels_are_crops_of_the_image_at_the_position(seven: cache.ImageCache) -> None:
    seen = stream(seven, 1, 1, 8)
    flips, lefts = [], set()
    for position, label, pixels in zip(seen["positions"], seen["labels"], seen["pixels"].numpy(), strict=True):
        i = epoch_order(0, int(position) // 7, 7)[int(position) % 7]
        assert i == label
        image = seven.image(int(i))
        candidates = [(left, image[:, :, left : left + 8]) for left in range(7)]
        matches = [(False, left) for left, crop in candidates if np.array_equal(pixels, crop)]
        matches += [(True, left) for left, crop in candidates if np.array_equal(pixels, crop[:, :, ::-1])]
        assert len(matches) == 1
        flips.append(matches[0][0])
        lefts.add(matches[0][1])
    assert 0.3 < np.mean(flips) < 0.7
    assert lefts == set(range(7))


def test_resuming_continues_the_stream(seven: cache.ImageCache) -> None:
    whole = stream(seven, 1, 2, 4)
    rest = stream(seven, 1, 2, 4, first_position=40, num_steps=7)
    assert all(torch.equal(rest[key], whole[key][5 * 8 :]) for key in whole)


@pytest.mark.parametrize(("num_processes", "accumulation", "batch_size"), [(1, 1, 2), (2, 1, 1), (1, 2, 1)])
def test_others_are_the_images_after_the_step_in_its_epoch(
    seven: cache.ImageCache, num_processes: int, accumulation: int, batch_size: int
) -> None:
    """With their crops, flips and labels; alike on all processes, and none of them twice."""
    whole = stream(seven, 1, 1, 8)
    settings = {"num_processes": num_processes, "accumulation_steps": accumulation, "batch_size": batch_size}
    for rank in range(num_processes):
        batches = batches_of(
            seven, rank=rank, num_others=5, random_flip=True, first_position=16, num_steps=8, **settings
        )
        for k, batch in enumerate(batches):  # type: ignore[arg-type]
            if k % accumulation:
                assert "others" not in batch
                continue
            epoch, place = divmod(16 + k // accumulation * 2, 7)
            positions = epoch * 7 + (place + 2 + torch.arange(5)) % 7
            assert torch.equal(batch["others"], whole["pixels"][positions])
            assert torch.equal(batch["other_labels"], whole["labels"][positions])
            if place < 6:  # a step within one epoch
                own = whole["labels"][7 * epoch + place : 7 * epoch + place + 2]
                assert sorted([*own.tolist(), *batch["other_labels"].tolist()]) == list(range(7))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_nothing(seven: cache.ImageCache, method: str) -> None:
    batches = batches_of(seven, random_flip=True, num_steps=5)
    loader = DataLoader(batches, batch_size=None, shuffle=False, num_workers=2, multiprocessing_context=method)
    for got, wanted in zip(loader, DataLoader(batches, batch_size=None), strict=True):
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_square_images_take_the_same_way_as_oblong_ones(folder: Path) -> None:
    arrays = save_grays(folder, 5)
    images = load_images(config_of(folder))
    assert images.is_uniform
    batch = batches_of(images, batch_size=12)[0]
    ids = np.concatenate([epoch_order(0, epoch, 5) for epoch in range(3)])[:12]
    assert np.array_equal(batch["pixels"].numpy(), np.stack([arrays[i] for i in ids])[:, None])
    assert batch["pixels"].dtype == torch.uint8
    assert batch["positions"].dtype == torch.int64
    assert "labels" not in batch
    assert "others" not in batch
    assert batches_of(images, num_others=3)[0].keys() == {"pixels", "positions", "others"}


def test_epoch_order() -> None:
    order = epoch_order(3, 5, 1000)
    assert sorted(order) == list(range(1000))
    order[:] = 0  # the caller's own copy
    assert sorted(epoch_order(3, 5, 1000)) == list(range(1000))
    for other in (epoch_order(3, 6, 1000), epoch_order(4, 5, 1000)):
        assert not np.array_equal(other, epoch_order(3, 5, 1000))


def test_length(seven: cache.ImageCache) -> None:
    batches = batches_of(seven, accumulation_steps=3, first_position=48, num_steps=6)
    assert len(batches) == 18
    with pytest.raises(IndexError, match=r"\[0, 18\), got 18"):
        batches[18]


@pytest.mark.parametrize(("max_value", "dtype"), [(255, torch.uint8), (65535, torch.int32)])
def test_to_x_0(max_value: int, dtype: torch.dtype) -> None:
    x_0 = to_x_0(torch.tensor([0, max_value, max_value // 2], dtype=dtype), max_value)
    assert x_0.dtype == torch.float32
    assert x_0[:2].tolist() == [-1.0, 1.0]
    assert abs(x_0[2] + 1 / max_value) < 1e-6
