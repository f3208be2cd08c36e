"""The files that an option of a command names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.image_files import image_files


def test_folder_gives_pictures_and_arrays_in_order(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    np.save(tmp_path / "a.npy", np.zeros((4, 4)))
    (tmp_path / "c.txt").write_text("neither")
    assert image_files("image", tmp_path) == ([Path("a.npy"), Path("b.png")], [tmp_path / "a.npy", tmp_path / "b.png"])
    (tmp_path / "none").mkdir()
    for path in ("none", "missing"):
        with pytest.raises(UsageError, match="image must be an image or a folder of images"):
            image_files("image", tmp_path / path)
