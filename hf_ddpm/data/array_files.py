"""Files of arrays: which of a folder they are, and the arrays in them.

array file   .npy, .npz, HDF5, NIfTI, or TIFF and PNG that are read as values
key          the name of an array in a .npz or HDF5 file
slice        one image of a file that holds several, along an axis of its arrays
encoded      a row of a data set: {"bytes": None, "path": ..., "slice": ...}, the last None where a file is one image
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from hf_ddpm.data.image_format import has_deep_colors
from hf_ddpm.runtime.errors import UsageError

NUMPY = (".npy", ".npz")
HDF5 = (".h5", ".hdf5", ".he5")
NIFTI = (".nii", ".nii.gz")
TIFF = (".tif", ".tiff")
PNG = (".png",)
ARRAY_FILES = (*NUMPY, *HDF5, *NIFTI)
# Extensions -> the package that reads them.
PACKAGES = {HDF5: "h5py", NIFTI: "nibabel", TIFF: "tifffile", PNG: "imagecodecs"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two of BigTIFF
# The tag of planes for channels (TIFF 6.0, Section 8), which Pillow does not read with 16 bits.
_PLANAR_CONFIGURATION = 284
# Compressed files that stay in memory: the images of one follow each other.
NUM_WHOLE_FILES = 4
NUM_TRIED_FILES = 64
# NumPy parses the header of an array by Python's own parser, which threads of Python 3.11 cannot share.
_HEADERS = threading.Lock()
# Modes of files that are read as pictures: gray of 8 or 16 bits, integers with a value range, and colors of 8 bits.
_PICTURE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B", "I;16L")


class FileArray(NamedTuple):
    """An array in a file, which is read when it is indexed.

    Args:
        values: What has a shape and a dtype, and gives a part of itself for an index.
        axes: A letter for each axis, where the file names them as TIFF does: "S" and "C" are channels, "Z" and "T"
            count images; "" where it does not.
    """

    values: Any
    axes: str = ""


def is_array_file(path: Path) -> bool:
    """Return whether a file is one of arrays by its extension; TIFF files are pictures until a folder says more."""
    return path.name.lower().endswith(ARRAY_FILES)


def is_hdf5(path: Path) -> bool:
    """Return whether a file is an HDF5 file by its extension."""
    return path.suffix.lower() in HDF5


def is_tiff(path: Path) -> bool:
    """Return whether a file is a TIFF file by its extension."""
    return path.suffix.lower() in TIFF


def is_png(path: Path) -> bool:
    """Return whether a file is a PNG file by its extension."""
    return path.suffix.lower() in PNG


def are_pictures(paths: Sequence[Path], keeps_precision: bool) -> bool:
    """Return whether Pillow reads TIFF or PNG files as what they are, by the first that it can open.

    Args:
        paths: The files.
        keeps_precision: Whether colors of 16 bits are to keep them. Pillow reads them as 8, and a run says so.
    """
    for path in paths[:NUM_TRIED_FILES]:
        with contextlib.suppress(Exception), Image.open(path) as image:  # Pillow raises nearly any class
            is_split = getattr(image, "tag_v2", {}).get(_PLANAR_CONFIGURATION) == 2
            is_lost = has_deep_colors(image) and (keeps_precision or is_split)
            return image.mode in _PICTURE_MODES and not is_lost
    return False


def require_package(path: Path) -> None:
    """Check that the package that reads a file is installed.

    Raises:
        UsageError: When it is not.
    """
    for extensions, package in PACKAGES.items():
        if path.name.lower().endswith(extensions) and importlib.util.find_spec(package) is None:
            raise UsageError(f"{path.name} needs the package {package}, which is not installed: pip install {package}")


@contextlib.contextmanager
def open_arrays(path: Path, keys: Sequence[str]) -> Iterator[list[FileArray]]:
    """Open the arrays of a file for the duration of a `with` block.

    Args:
        path: The file.
        keys: The names of the arrays in a .npz or HDF5 file; empty for the only one.

    Raises:
        UsageError: When a package is missing, or the file has no such array, or has several and `keys` is empty.
        Exception: When the file is damaged; its reader raises nearly any class.
    """
    name = path.name.lower()
    require_package(path)
    if keys and not name.endswith((".npz", *HDF5)):
        raise UsageError(f"array_key has no effect on {path.name}, which holds one array: leave it out")
    if name.endswith(".npy"):
        with _HEADERS:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        yield [FileArray(array)]
    elif name.endswith(".npz"):
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            chosen = _chosen(path, archive.files, keys)
        yield [FileArray(_npz_array(path, key, path.stat().st_mtime_ns)) for key in chosen]
    elif name.endswith(HDF5):
        import h5py

        with h5py.File(path, "r") as file:
            names: list[str] = []
            # Numbers of two axes or more: others are labels and coordinates.
            file.visititems(lambda key, item: names.append(key) if len(getattr(item, "shape", ())) > 1 else None)
            yield [FileArray(file[key]) for key in _chosen(path, names, keys)]
    elif name.endswith(NIFTI):
        yield [FileArray(*_nifti_array(path, path.stat().st_mtime_ns))]
    elif name.endswith(PNG):
        yield [_png_array(path.read_bytes())]
    else:
        with _open_tiff(path) as array:
            yield [array]


def array_of_picture(content: bytes, name: str) -> FileArray:
    """Return the array in the bytes of a PNG or TIFF file, as `open_arrays` does for a file.

    Args:
        content: The bytes.
        name: What error messages call the image.

    Raises:
        UsageError: When they are of another format, or a package is missing.
        Exception: When they are damaged; the reader raises nearly any class.
    """
    if content.startswith(_PNG_SIGNATURE):
        require_package(Path("an image .png"))
        return _png_array(content)
    if not content.startswith(_TIFF_SIGNATURES):
        raise UsageError(
            "preserve_input_precision can keep 16 bits of color only where all images are PNG or TIFF files of it, "
            f"got another format in {name}: leave it out"
        )
    require_package(Path("an image .tif"))
    with _open_tiff(io.BytesIO(content)) as array:
        return FileArray(np.asarray(array.values[()]), array.axes)


def _png_array(content: bytes) -> FileArray:
    import imagecodecs

    values = imagecodecs.png_decode(content)
    return FileArray(values, "YXS"[: values.ndim])


def _chosen(path: Path, names: Sequence[str], keys: Sequence[str]) -> Sequence[str]:
    """Return the keys of the arrays to read."""
    if not keys and len(names) == 1:
        return names
    if not keys or not {*keys} <= {*names}:
        wanted = ",".join(keys) or "none"
        raise UsageError(
            f"array_key must name arrays of each file, got {wanted} for {path.name} with "
            f"{', '.join(names) or 'none'}: --array_key, with commas between several"
        )
    return keys


@lru_cache(maxsize=NUM_WHOLE_FILES)
def _npz_array(path: Path, key: str, _: int) -> np.ndarray:
    """Read an array of a .npz file; the time of its change tells one content of the file from another."""
    with _HEADERS, open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        return archive[key]


@lru_cache(maxsize=NUM_WHOLE_FILES)
def _nifti_array(path: Path, _: int) -> tuple[np.ndarray, str]:
    """Read a NIfTI file in the order of its own axes; values that it scales are float32."""
    import nibabel

    image: Any = nibabel.load(path)  # pyright: ignore[reportPrivateImportUsage]
    is_scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    values = np.asarray(image.dataobj, np.float32 if is_scaled else image.get_data_dtype())
    return values, "XYZT"[: values.ndim]


@contextlib.contextmanager
def _open_tiff(file_or_path: Path | IO[bytes]) -> Iterator[FileArray]:
    import tifffile

    with tifffile.TiffFile(file_or_path) as file:
        series = file.series[0]
        # Pages of equal shape that tifffile cannot put together would be left out without a word.
        if len(file.series) > 1:
            raise ValueError(f"its pages have {len(file.series)} shapes: save each shape in a file of its own")
        yield FileArray(_TiffSeries(series), series.axes)


class _TiffSeries:
    """The array of a TIFF file: one page is read where the first axis counts pages."""

    def __init__(self, series: Any) -> None:
        self.series, self.shape, self.dtype = series, tuple(series.shape), series.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        first = index[0] if isinstance(index, tuple) and index else index
        if isinstance(first, int) and self.ndim > 2 and len(self.series.pages) == self.shape[0]:
            page = np.asarray(self.series.asarray(key=first)).reshape(self.shape[1:])
            return page[index[1:]] if isinstance(index, tuple) else page
        return np.asarray(self.series.asarray())[index]
