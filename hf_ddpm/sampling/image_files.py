"""The image files that a command reads, and the new ones that it writes beside a picture of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_ddpm.data.image_folder import list_images
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at


def image_files(option: str, path: str | Path) -> tuple[list[Path], list[Path]]:
    """Return the names and the paths of the image files that an option names, in the order of the names.

    They are files of arrays where a folder holds no pictures.
    """
    found = look_at(option, path)
    if found.is_file():
        return [Path(found.name)], [found]
    if not found.is_dir():
        raise UsageError(f"{option} must be an image or a folder of images, got {str(path)!r}, which does not exist")
    listed = list_images(found)
    files = listed.images or listed.arrays
    if not files:
        raise UsageError(f"{option} must be an image or a folder of images, got {str(path)!r}, which holds none")
    return [file.relative_to(found) for file in files], files


def new_files(out: Path, names: Sequence[Path], picture: str, suffix: str = ".png") -> list[Path]:
    """Return the file of each new image, after a look that none is there and no two are the same."""
    files = [out / name.with_suffix(suffix) for name in names]
    for i, file in enumerate(files):
        if file == out / picture or file in files[:i]:
            raise UsageError(
                f"image must hold files of different names, but {picture}, got {str(names[i])!r}: rename it"
            )
    for file in [*files, out / picture]:
        if file.exists():
            raise UsageError(f"{file} would be overwritten: choose another folder than {str(out)!r}")
    return files
