"""Color of 16 bits in tables: its bits are kept if that is asked for, as those of files in a folder are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import ValueRange
from tests.support.image_data import cache_config, noise, png

COLORS = np.random.default_rng(0).integers(0, 65536, (4, 6, 5, 3)).astype(np.uint16)


def tiff(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, values, photometric="rgb")
    return content.getvalue()


def save_table(folder: Path, files: list[bytes]) -> Path:
    """Save images in a parquet file, with their bytes."""
    rows = [{"bytes": content, "path": None} for content in files]
    folder.mkdir()
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("encode", [imagecodecs.png_encode, tiff])
def test_colors_of_a_table_keep_16_bits_if_that_is_asked_for(tmp_path: Path, encode: Any) -> None:
    config = cache_config(save_table(tmp_path / "table", [encode(each) for each in COLORS]))
    images = load_images(config)
    assert (images.image(1) == COLORS[1].transpose(2, 0, 1) >> 8).all()  # as Pillow reads them
    lines = describe_images(config, images)
    assert "not read in 4 images: the lower 8 of 16 bits of color or transparency, which Pillow drops" in lines
    assert "--preserve_input_precision reads 16 bits of color, as arrays" in lines
    for streaming in (False, True):
        config = cache_config(tmp_path / "table", preserve_input_precision=True, streaming=streaming)
        images = open_stream(config) if streaming else load_images(config)
        assert images.value_range == ValueRange(0.0, 65535.0, "uint16")
        assert all((images.image(i) == COLORS[i].transpose(2, 0, 1)).all() for i in range(4))
    # Settings of arrays take effect.
    narrow = load_images(cache_config(tmp_path / "table", preserve_input_precision=True, value_quantiles=[0.1, 0.9]))
    assert narrow.num_clipped > 0


def test_rows_that_name_files_keep_16_bits(tmp_path: Path) -> None:
    for i, values in enumerate(COLORS):
        (tmp_path / f"{i}.png").write_bytes(imagecodecs.png_encode(values))
    rows = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(4)]
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    config = cache_config(None, cache_dir=str(tmp_path / "cache"), preserve_input_precision=True)
    images = load_images(config, dataset=table)
    assert all((images.image(i) == COLORS[i].transpose(2, 0, 1)).all() for i in range(4))


@pytest.mark.slow
def test_other_images_beside_them_are_one_line(tmp_path: Path) -> None:
    deep = imagecodecs.png_encode(COLORS[0])
    jpeg = io.BytesIO()
    Image.fromarray(noise(6, 5, 3)).save(jpeg, "JPEG")
    for name, files, message in (
        ("a", [deep, png(noise(6, 5, 3))], "all arrays must have one type and as many channels, uint16 and 3"),
        ("b", [deep, jpeg.getvalue()], "only where all images are PNG or TIFF files of it, got another format"),
        ("c", [png(noise(6, 5, 3)), deep], r"only where all images are PNG or TIFF files of it, got 16-bit .* row 1"),
    ):
        config = cache_config(save_table(tmp_path / name, files), preserve_input_precision=True)
        with pytest.raises(UsageError, match=message) as error:
            load_images(config)
        assert "\n" not in str(error.value)
        # So nothing offers it.
        config = cache_config(tmp_path / name)
        lines = describe_images(config, load_images(config))
        assert any("of color or transparency, which Pillow drops" in line for line in lines)
        assert not any("--preserve_input_precision" in line for line in lines)
