"""The values of a model of arrays: to x_0 and back, in its folder, and in pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_ddpm.data.batches import to_x_0
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import ValueRange, pictured, read_value_range, write_value_range


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_every_integer_comes_back_from_x_0(dtype: str) -> None:
    info = np.iinfo(dtype)
    values = np.arange(info.min, info.max + 1).astype(dtype)
    value_range = ValueRange(info.min, info.max, dtype)
    x_0 = value_range.to_x_0(torch.from_numpy(values.astype(np.int32)))
    assert x_0.dtype == torch.float32
    assert (float(x_0[0]), float(x_0[-1])) == (-1, 1)
    back = value_range.to_units(x_0 / 2 + 0.5)
    assert back.dtype == dtype
    assert (back == values).all()


def test_whole_range_of_a_type_is_that_of_images() -> None:
    pixels = torch.arange(65536)
    assert torch.equal(ValueRange(0, 65535, "uint16").to_x_0(pixels), to_x_0(pixels, 65535))


def test_floats_come_back_within_their_rounding_and_values_outside_are_clipped() -> None:
    value_range = ValueRange(-3, 5, "float32")
    values = torch.linspace(-3, 5, 1001)
    assert np.allclose(value_range.to_units(value_range.to_x_0(values) / 2 + 0.5), values, atol=2e-6)
    assert value_range.to_x_0(torch.tensor([-4.0, 6.0])).tolist() == [-1, 1]


def test_values_are_kept_in_the_folder_and_damage_is_named(tmp_path: Path) -> None:
    assert read_value_range(tmp_path) is None
    value_range = ValueRange(-1.5, 0.1, "float16", (2, 1, 0))
    write_value_range(tmp_path, value_range)
    assert read_value_range(tmp_path) == value_range
    (tmp_path / "scheduler/values.json").write_text('{"low": 2, "high": 1, "dtype": "uint8"}')
    with pytest.raises(UsageError, match=r"values\.json cannot be read"):
        read_value_range(tmp_path)


def test_pictures_show_chosen_channels_or_all_side_by_side() -> None:
    images = torch.rand(2, 4, 3, 5)
    value_range = ValueRange(0, 1, "float32")
    shown = pictured(images, ValueRange(0, 1, "float32", (3, 0, 2)))
    assert torch.equal(shown, images[:, [3, 0, 2]])
    shown = pictured(images, value_range)
    assert shown.shape == (2, 1, 3, 4 * 5 + 3)
    assert torch.equal(shown[:, 0, :, 6:11], images[:, 1])
    assert torch.equal(pictured(images, None), images)  # RGBA of image files
    assert torch.equal(pictured(images[:, :3], value_range), images[:, :3])
