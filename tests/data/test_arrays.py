"""Arrays: any number of channels, in the types and from the files that people keep them in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import h5py
import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_ddpm.data.array_files import open_arrays
from hf_ddpm.data.batches import as_tensor, to_x_0
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import ValueRange
from tests.support.image_data import cache_config, micro_batches, png, save_grays

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 4000, (3, 5, 8, 8)).astype(np.uint16)
FIELDS = RNG.standard_normal((3, 8, 8)).astype(np.float32)


def files_config(folder: Path, **settings: Any) -> DataConfig:
    """Return settings for a folder of files of arrays, with a cache beside it."""
    return cache_config(None, train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), **settings)


def loaded(folder: Path, **settings: Any) -> np.ndarray:
    """Return all arrays of a folder as the cache has them, (N, C, H, W)."""
    images = load_images(files_config(folder, **settings))
    return np.stack([images.image(i) for i in range(len(images))])


def save_each(folder: Path, arrays: Any, save: Any, suffix: str) -> None:
    for i, values in enumerate(arrays):
        save(folder / f"{i}.{suffix}", values)


def save_tiff(**options: Any) -> Any:
    return lambda path, values: tifffile.imwrite(path, values, **options)


def save_hdf5(path: Path, values: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["group/field"], file["time"] = values, np.arange(3)


def save_nifti(path: Path, values: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)  # pyright: ignore[reportPrivateImportUsage]


PLANES = {"photometric": "minisblack", "planarconfig": "separate"}
WRITERS = {
    "npy": (np.save, "npy"),
    "npz": (lambda path, values: np.savez(path, x=values), "npz"),
    "hdf5": (save_hdf5, "h5"),
    "planes of a TIFF file": (save_tiff(**PLANES), "tif"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_channels_come_first_in_files_of_every_kind(folder: Path, writer: str) -> None:
    save_each(folder, BANDS, *WRITERS[writer])
    values = loaded(folder)
    assert values.dtype == np.uint16
    assert (values == BANDS).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32"])
@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_each_type_is_kept_to_the_last_bit(folder: Path, dtype: str, suffix: str) -> None:
    arrays = (100 * RNG.standard_normal((2, 2, 4, 4))).astype(dtype)
    save_each(folder, arrays, np.save if suffix == "npy" else save_tiff(**PLANES), suffix)
    values = loaded(folder, value_quantiles=[0.0, 1.0])
    assert values.dtype == dtype
    assert values.tobytes() == arrays.tobytes()


def test_types_that_others_hold_are_converted_and_what_is_lost_is_said(folder: Path) -> None:
    np.save(folder / "a.npy", FIELDS[0].astype(">f8"))
    config = files_config(folder)
    images = load_images(config)
    assert (images.image(0)[0] == FIELDS[0]).all()
    assert any("float64" in line for line in describe_images(config, images))


def test_axes_of_channels_and_images_can_be_named(folder: Path) -> None:
    np.save(folder / "a.npy", np.moveaxis(BANDS, 1, -1))  # (N, H, W, C)
    assert (loaded(folder, channel_axis=-1) == BANDS).all()
    np.save(folder / "a.npy", np.moveaxis(BANDS, 0, -1))  # (C, H, W, N)
    assert (loaded(folder, stack_axis=3) == BANDS).all()
    np.save(folder / "a.npy", FIELDS)
    assert (loaded(folder, stack_axis=0)[:, 0] == FIELDS).all()
    assert (loaded(folder)[0] == FIELDS).all()  # the same file, as one image of three channels


def test_pages_of_a_tiff_file_are_channels_or_images(folder: Path) -> None:
    tifffile.imwrite(folder / "a.tif", BANDS[0])
    config = files_config(folder)
    assert any("--stack_axis 0" in line for line in describe_images(config, load_images(config)))
    assert (loaded(folder, stack_axis=0)[:, 0] == BANDS[0]).all()
    assert (loaded(folder, channel_axis=0)[0] == BANDS[0]).all()


def test_slices_of_a_volume_are_images(folder: Path) -> None:
    volume = RNG.integers(-1000, 3000, (6, 6, 4)).astype(np.int16)
    save_nifti(folder / "a.nii.gz", volume)
    assert (loaded(folder)[:, 0] == volume.transpose(2, 0, 1)).all()


def test_several_arrays_of_a_file_become_channels(folder: Path) -> None:
    np.savez(folder / "a.npz", real=FIELDS[0], imag=FIELDS[1])
    assert (loaded(folder, array_key="imag,real")[0] == FIELDS[[1, 0]]).all()
    with pytest.raises(UsageError, match=r"array_key must name arrays of each file, got none .* real, imag"):
        loaded(folder)


def test_colors_of_16_bits_are_kept_if_that_is_asked_for(folder: Path) -> None:
    colors = RNG.integers(0, 65536, (2, 4, 4, 3)).astype(np.uint16)
    save_each(folder, colors, save_tiff(photometric="rgb"), "tif")
    assert loaded(folder).dtype == np.uint8  # as Pillow reads them
    assert (loaded(folder, preserve_input_precision=True) == colors.transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_colors_of_16_bits_in_png_files_are_kept_if_that_is_asked_for(folder: Path, channels: int) -> None:
    colors = RNG.integers(0, 65536, (2, 4, 4, channels)).astype(np.uint16)
    for i, values in enumerate(colors):
        (folder / f"{i}.png").write_bytes(imagecodecs.png_encode(values))
    images = load_images(files_config(folder))
    assert (images.max_value, images.channels) == (255, 3)  # as Pillow reads them
    if channels == 3:
        assert (loaded(folder) == (colors >> 8).transpose(0, 3, 1, 2)).all()
    lines = describe_images(files_config(folder), images)
    assert "not read in 2 images: the lower 8 of 16 bits of color or transparency, which Pillow drops" in lines
    assert "--preserve_input_precision reads 16 bits of color, as arrays" in lines
    assert (loaded(folder, preserve_input_precision=True) == colors.transpose(0, 3, 1, 2)).all()


def test_png_files_of_8_bits_are_images_whatever_is_to_be_kept(folder: Path) -> None:
    save_grays(folder, 2)
    assert load_images(files_config(folder, preserve_input_precision=True)).value_range is None


@pytest.mark.parametrize("streaming", [False, True])
def test_arrays_of_a_table_are_read_from_a_cache_or_a_stream(tmp_path: Path, streaming: bool) -> None:
    features = datasets.Features(
        {"x": datasets.Array3D((5, 8, 8), "uint16"), "y": datasets.Array2D((8, 8), "float32")}
    )
    table = datasets.Dataset.from_dict({"x": list(BANDS), "y": list(FIELDS)}, features=features)
    (tmp_path / "table").mkdir()
    table.to_parquet(str(tmp_path / "table" / "a.parquet"))
    config = cache_config(tmp_path / "table", image_column="x", streaming=streaming)
    images = open_stream(config) if streaming else load_images(config)
    assert all((images.image(i) == BANDS[i]).all() for i in range(3))
    assert images.image(0).dtype == np.uint16
    if not streaming:
        of_dataset = load_images(cache_config(None, cache_dir=str(tmp_path / "c"), image_column="y"), dataset=table)
        assert (of_dataset.image(2)[0] == FIELDS[2]).all()
        with pytest.raises(UsageError, match=r"array_key takes effect only for .npz and .h5 files, got 'x' for cells"):
            load_images(cache_config(tmp_path / "table", image_column="x", array_key="x"))


def test_hdf5_tables_are_read_by_rows_as_datasets_does(tmp_path: Path) -> None:
    pytest.importorskip("datasets.packaged_modules.hdf5.hdf5", reason="a later version of datasets has it")
    folder = tmp_path / "table"
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file["image"], file["kind"] = BANDS, np.array([0, 1, 0])
    images = load_images(cache_config(folder, label_column="kind"))
    assert (images.image(1) == BANDS[1]).all()
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 0]


def test_folders_of_arrays_are_classes_and_a_stream_reads_what_the_cache_has(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        np.save(folder / name / "0.npy", BANDS)
    settings: dict[str, Any] = {"label_column": "label", "value_range": [0, 4000]}
    images = load_images(files_config(folder, **settings))
    assert images.class_names == ["a", "b"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    stream = open_stream(files_config(folder, streaming=True, **settings))
    assert stream.value_range == images.value_range
    read = stream.first_images(6)
    assert all((planes == images.image(i)).all() and label == i // 3 for i, (planes, label) in enumerate(read))


# Values


def test_range_is_that_of_the_type_of_floats_that_of_the_data(folder: Path) -> None:
    np.save(folder / "a.npy", BANDS)
    assert load_images(files_config(folder)).value_range == ValueRange(0, 65535, "uint16")
    np.save(folder / "a.npy", FIELDS)
    images = load_images(files_config(folder, stack_axis=0))
    assert images.value_range == ValueRange(float(FIELDS.min()), float(FIELDS.max()), "float32")
    x_0 = to_x_0(as_tensor(np.array(images.pixels)), images.scale)
    assert (float(x_0.min()), float(x_0.max())) == (-1, 1)


def test_quantiles_become_the_ends_and_what_they_clip_is_counted(folder: Path) -> None:
    np.save(folder / "a.npy", FIELDS)
    config = files_config(folder, stack_axis=0, value_quantiles=[0.1, 0.9])
    images = load_images(config)
    low, high = np.quantile(FIELDS, [0.1, 0.9])
    assert images.value_range is not None
    assert (images.value_range.low, images.value_range.high) == pytest.approx((low, high))
    assert images.num_clipped == (np.clip(FIELDS, low, high) != FIELDS).sum()
    assert any(line.startswith(f"clipped: {images.num_clipped} values") for line in describe_images(config, images))
    other = load_images(files_config(folder, stack_axis=0))
    assert other.fingerprint != images.fingerprint  # a resumed run would train on other x_0


@pytest.mark.parametrize(
    ("values", "place"), [(np.nan, "channel 1, row 2, column 3"), (-np.inf, "channel 1, row 2, column 3: -inf")]
)
def test_values_that_are_not_finite_are_named_or_left_out(folder: Path, values: float, place: str) -> None:
    arrays = np.stack([FIELDS[:2]] * 2)
    arrays[1, 1, 2, 3] = values
    save_each(folder, arrays, np.save, "npy")
    with pytest.raises(UsageError, match=f"1.npy.*{place}"):
        load_images(files_config(folder))
    images = load_images(files_config(folder, on_bad_image="skip"))
    assert (len(images), images.num_bad) == (1, 1)


def test_smaller_arrays_are_those_that_pillow_resizes_channel_by_channel(folder: Path) -> None:
    save_each(folder, FIELDS[:, None] * np.ones((2, 1, 1), np.float32), np.save, "npy")
    wanted = Image.fromarray(FIELDS[0]).resize((4, 4), Image.Resampling.BILINEAR)
    assert (loaded(folder, resolution=4)[0, 1] == np.asarray(wanted)).all()


def test_flips_and_crops_are_those_of_images(folder: Path) -> None:
    oblong = RNG.integers(0, 256, (4, 6, 9)).astype(np.uint8)
    (folder.parent / "pictures").mkdir()
    for i, values in enumerate(oblong):
        np.save(folder / f"{i}.npy", values)
        (folder.parent / "pictures" / f"{i}.png").write_bytes(png(values))
    settings: dict[str, Any] = {"resolution": 6}
    of_arrays = load_images(files_config(folder, **settings))
    of_images = load_images(files_config(folder.parent / "pictures", **settings))
    batches = [next(iter(micro_batches(each, random_flip=True))) for each in (of_arrays, of_images)]
    x_0 = [to_x_0(batch["pixels"], each.scale) for batch, each in zip(batches, (of_arrays, of_images), strict=True)]
    assert (x_0[0] == x_0[1]).all()


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 3}, "channels must be those of the arrays, 5"),
        ({"value_range": [0, 3000]}, "value_range must hold all values, got 0 3000"),
        ({"value_range": [0, 70000]}, "value_range must be two whole numbers that uint16 can hold"),
        ({"value_range": [0, 4000.5]}, "value_range must be two whole numbers"),
        ({"display_channels": [0, 1]}, "display_channels must be one channel, or three"),
        ({"display_channels": [5]}, r"each in \[0, 5\)"),
        ({"value_quantiles": [0.5, 2]}, r"value_quantiles must be two rising numbers in \[0, 1\]"),
        ({"channel_axis": 4}, "channel_axis must be an axis of each array, got 4"),
        ({"channel_axis": 0, "stack_axis": 0}, "must be different axes"),
        ({"array_key": "x"}, "array_key has no effect on 0.npy"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    save_each(folder, BANDS, np.save, "npy")
    with pytest.raises(UsageError, match=message):
        load_images(files_config(folder, **settings))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (BANDS[0].astype(np.uint8), "all arrays must have one type and as many channels"),
        (BANDS[0, :3], "all arrays must have one type and as many channels"),
        (BANDS[0, :, :6, :6], "resolution must be given unless"),
        (BANDS[0].astype(np.complex64), "real and imaginary part as two channels"),
        (BANDS[0].astype(np.int64), "an array must be of uint8"),
        (np.zeros(3), r"an array must be \(H, W\)"),
    ],
)
def test_array_that_is_not_as_the_first_is_named(folder: Path, second: np.ndarray, message: str) -> None:
    save_each(folder, [BANDS[0], second], np.save, "npy")
    with pytest.raises(UsageError, match=f"{message}.*1.npy|1.npy.*{message}|{message}"):
        load_images(files_config(folder))


def test_damaged_file_is_named(folder: Path) -> None:
    save_each(folder, BANDS, np.save, "npy")
    (folder / "1.npy").write_bytes((folder / "1.npy").read_bytes()[:-10])
    with pytest.raises(UsageError, match=r"every image must be readable, got row 1 .*1.npy"):
        load_images(files_config(folder))


def test_settings_of_arrays_are_refused_for_images_and_for_streams_that_need_a_range(folder: Path) -> None:
    save_grays(folder, 2)
    with pytest.raises(UsageError, match="channel_axis = 0 has no effect: it is for arrays"):
        load_images(files_config(folder, channel_axis=0))
    with pytest.raises(UsageError, match="channels must be 1, 3 or 4 of images, got 2"):
        load_images(files_config(folder, channels=2))
    fields = folder.parent / "fields"
    fields.mkdir()
    np.save(fields / "a.npy", FIELDS[0])
    with pytest.raises(UsageError, match="value_range must be given to stream float32"):
        open_stream(files_config(fields, streaming=True))


def test_folder_of_images_with_arrays_beside_is_one_of_images(folder: Path) -> None:
    save_grays(folder, 2)
    np.save(folder / "a.npy", FIELDS[0])
    config = files_config(folder)
    images = load_images(config)
    assert (len(images), images.value_range) == (2, None)
    assert "not read: 1 .npy" in describe_images(config, images)[0]


def test_damaged_archive_says_its_error(folder: Path) -> None:
    content = io.BytesIO()
    np.savez(content, x=FIELDS)
    (folder / "a.npz").write_bytes(content.getvalue()[:100])
    with pytest.raises(UsageError, match=r"each file must be readable, got a\.npz"):
        load_images(files_config(folder))
    with pytest.raises(UsageError, match="array_key has no effect"), open_arrays(folder / "a.npy", ["x"]):
        pass


def test_four_axes_of_a_volume_are_not_guessed(folder: Path) -> None:
    save_nifti(folder / "a.nii.gz", np.arange(384, dtype=np.float32).reshape(8, 8, 3, 2))
    for settings in ({}, {"stack_axis": 3}):
        with pytest.raises(UsageError, match="--channel_axis and --stack_axis say"):
            load_images(cache_config(None, train_data_dir=str(folder), **settings))
    images = load_images(cache_config(None, train_data_dir=str(folder), stack_axis=2, channel_axis=3))
    assert (len(images), images.channels, images.size) == (3, 2, (8, 8))


@pytest.mark.parametrize("other", ["picture.png", "panchromatic.tif"])
def test_tiff_file_of_bands_beside_pictures_is_not_called_damaged(folder: Path, other: str) -> None:
    save_each(folder, BANDS, save_tiff(**PLANES), "tif")
    gray = Image.fromarray(BANDS[0, 0])
    gray.save(folder / other)
    with pytest.raises(UsageError, match=r"0\.tif.*read as an array in a folder of such TIFF files alone"):
        load_images(files_config(folder))
    (folder / other).unlink()
    assert (loaded(folder) == BANDS).all()
