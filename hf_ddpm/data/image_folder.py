"""A folder of images: one listing of what is read and what is not, which everything that needs one shares.

image      a file in a format of FORMATS, by its extension, or by its first bytes where the extension tells nothing
metadata   files whose rows name images, see metadata.py; of a split they may lie beside its folder, too
archive    a file of ARCHIVE_EXTENSIONS, which is not opened: it may hold what lies beside it
split      a folder with a name of SPLIT_NAMES, where others beside it have one, too: beside `car`, `train` is a class
class      the name of the folder that an image is in, where all images are equally deep and there are several
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hf_ddpm.data.array_files import is_array_file
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.metadata import METADATA_NAMES, Metadata, read_metadata, require_files
from hf_ddpm.runtime.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

# The raster formats that Pillow decodes by itself or by a plugin, the most frequent ones first. Others are not opened:
# for EPS it would start Ghostscript. The last ones cannot be told by their first bytes.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF", "JXL", "JPEG2000", "PPM", "DIB", "ICO"),
    *("ICNS", "QOI", "PCX", "DCX", "SGI", "DDS", "XBM", "XPM", "PSD", "FITS", "FLI", "SUN", "PIXAR", "MSP", "CUR"),
    *("BLP", "FTEX", "GBR", "MCIDAS", "XVTHUMB", "PCD", "IM", "IMT", "SPIDER", "TGA"),
)
# Format -> the package that lets Pillow read it, and the extensions that its files then have.
PLUGINS = {
    "AVIF": ("pillow-avif-plugin", (".avif", ".avifs")),
    "HEIF": ("pillow-heif", (".heic", ".heif", ".hif")),
    "JXL": ("pillow-jxl-plugin", (".jxl",)),
}
# Whole names of folders, in any case, that say which split they hold.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("val", "valid", "validation", "dev", "holdout"),
}
UNPACK = "(unpack it)"
ARCHIVE_EXTENSIONS = (".zip", ".tar", ".tar.gz", ".tgz")
OF_THE_SYSTEM = ("lost+found", "System Volume Information", "$RECYCLE.BIN")  # which nobody else may read


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The files of a folder.

    Args:
        folder: The folder.
        images: The images, in the order of their paths.
        arrays: The files of arrays, in this order; where there are images, they count as unread, too.
        metadata_files: The metadata files in it, and those beside it if it is named as a split.
        unread: What is not read -> how many files.
    """

    folder: Path
    images: list[Path]
    arrays: list[Path]
    metadata_files: list[Path]
    unread: Counter[str]

    @cached_property
    def metadata(self) -> Metadata | None:
        """The rows of the metadata files; None without any that name a file in the folder.

        Raises:
            UsageError: As `read_metadata` raises it.
        """
        return read_metadata(self.folder, self.metadata_files, [*self.images, *self.arrays])

    @cached_property
    def files_elsewhere(self) -> list[Path]:
        """The files outside of the folder that are read with it: metadata beside it, and what they name there."""
        if self.metadata is None:
            return []
        start = f"{self.folder.absolute()}{os.sep}"
        files = [str(path.absolute()) for path in self.metadata_files] + sorted(self.metadata.named)
        return [Path(path) for path in files if not path.startswith(start)]


_listed: ContextVar[dict[Path, ImageFolder] | None] = ContextVar("_listed", default=None)


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """List each folder once for the duration of a `with` block, however many functions ask for its images."""
    token = _listed.set({})
    try:
        yield
    finally:
        _listed.reset(token)


def list_images(folder: Path) -> ImageFolder:
    """List the files of a folder and of its sub-folders.

    Raises:
        UsageError: When a folder cannot be read.
    """
    known = _listed.get()
    if known is None:
        return _list_images(folder)
    if folder not in known:
        known[folder] = _list_images(folder)
    return known[folder]


def _list_images(folder: Path) -> ImageFolder:
    images, arrays, metadata_files, unread = [], [], [], Counter[str]()
    for path in files_below(folder):
        if path.exists() and not path.is_file():  # to read a pipe or a socket would wait for a writer
            unread["pipes and the like"] += 1
        elif path.name in METADATA_NAMES:
            metadata_files.append(path)
        elif path.name.lower().endswith(ARCHIVE_EXTENSIONS):
            unread[f"{path.suffix.lower()} {UNPACK}"] += 1
        elif path.name == "grid.png" and path.with_name("samples.json").is_file():
            unread["grid.png of `hf-ddpm sample`"] += 1
        elif is_array_file(path):
            arrays.append(_with_text_name(path))
        elif is_image(path):
            images.append(_with_text_name(path))
        else:
            unread[kind_of(path)] += 1
    metadata_files += _metadata_beside(folder)
    for path in arrays if images else ():
        unread[kind_of(path)] += 1
    images, arrays = (sorted(paths, key=lambda path: path.as_posix()) for paths in (images, arrays))
    return ImageFolder(folder, images, arrays, metadata_files, unread)


def _metadata_beside(folder: Path) -> list[Path]:
    """Return the metadata files beside the folder of a split, or beside the folder `images` that it is in."""
    folder = folder.absolute()
    if split_kind(folder.name) is None:
        return []
    above = [folder.parent, *([folder.parent.parent] if folder.parent.name == "images" else [])]
    return [path / name for path in above for name in METADATA_NAMES if (path / name).is_file()]


def _with_text_name(path: Path) -> Path:
    """Return the path of an image, whose name goes into a table of texts.

    Raises:
        UsageError: When its bytes are no text.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the names of images and of their folders must be UTF-8, got {os.fsencode(path)!r}: rename it"
        ) from error
    return path


def split_folders(folder: Path, images: Sequence[Path]) -> dict[str, Path]:
    """Return the folders of splits by their names, in `folder` or in its folder `images`; empty if there are none.

    They are splits if all are named so, or if one for training and one that is held out are among them. Parts of names
    and files are none; `datasets` takes `test_tube_1.png` for a test image.

    Args:
        folder: The folder.
        images: All images below it. Folders without any say nothing.
    """
    for level in (folder, folder / "images"):
        start = f"{level}{os.sep}"
        places = (str(path)[len(start) :].split(os.sep) for path in images if str(path).startswith(start))
        names = sorted({parts[0] for parts in places if len(parts) > 1})
        kinds = {split_kind(name) for name in names}
        if len(names) > 1 and (None not in kinds or ("train" in kinds and len(kinds) > 2)):
            return {name: level / name for name in names}
    return {}


def split_kind(name: str) -> str | None:
    """Return which split a folder of this name holds, by a name in SPLIT_NAMES; None if it says nothing of that."""
    return next((kind for kind, names in SPLIT_NAMES.items() if name.lower() in names), None)


def open_images(listed: ImageFolder, config: DataConfig) -> Dataset:
    """Open the images as a data set with a column `image`, and `label` if their folders are classes.

    With metadata, the rows are those of the metadata, with all their columns.

    Args:
        listed: The files of the folder.
        config: The settings of the data. Without `on_bad_image` "skip", each file that metadata name must be there.

    Raises:
        UsageError: When metadata cannot be read, or name a file that is not there.
    """
    import datasets
    import pyarrow

    metadata, columns = listed.metadata, {}
    if metadata is None:
        paths = [str(path.absolute()) for path in listed.images]
        columns["image"] = pyarrow.array(paths, pyarrow.string())
        features: dict[str, Any] = {"image": datasets.Image()}
    else:
        if config.on_bad_image == "raise":
            require_files(metadata, listed.folder, listed.images, config)
        for name, cells in metadata.columns.items():
            columns[name] = metadata_column(name, cells, is_of_files=name in metadata.file_columns)
        features = {**datasets.Features.from_arrow_schema(pyarrow.table(columns).schema)}
        features.update(dict.fromkeys(metadata.file_columns, datasets.Image()))
        paths = [path or "" for path in metadata.columns[metadata.file_columns[0]]]
    labels = None if "label" in columns else folder_classes([*map(Path, paths)])
    if labels is not None:
        columns["label"] = labels
        features["label"] = datasets.ClassLabel(names=sorted(set(labels)))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def metadata_column(name: str, cells: list[Any], is_of_files: bool) -> Any:
    """Return a column of metadata for Arrow."""
    import pyarrow

    try:
        return pyarrow.array(cells, pyarrow.string() if is_of_files else None)
    except pyarrow.ArrowException as error:
        kinds = " and ".join(sorted({type(cell).__name__ for cell in cells if cell is not None}))
        raise UsageError(
            f"metadata must hold values of one type in a column, got {kinds} in {name!r}: make them alike"
        ) from error


def folder_classes(paths: Sequence[Path]) -> list[str] | None:
    """Return the class of each file, the folder that it is in; None where folders are no classes."""
    labels = [path.parent.name for path in paths]
    is_of_classes = len(set(labels)) > 1 and len({len(path.parts) for path in paths}) == 1
    return labels if is_of_classes else None


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its sub-folders, sorted in each, without hidden ones.

    A folder that several links lead to is read once, so that links to a folder above lead in no circle.

    Raises:
        UsageError: When a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UsageError(
            f"each folder of images must be readable, got {str(error.filename)!r}: {error.strerror}; allow it, or "
            "move it away"
        ) from error

    seen = set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(root)
        if status.st_ino:  # some network drives number no files
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")) and name not in OF_THE_SYSTEM)
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def is_image(path: Path) -> bool:
    """Return whether a file is an image by its extension, or by its first bytes if no format has the extension."""
    extension = path.suffix.lower()
    _, extensions = _formats()
    if extension in extensions:
        return True
    if extension in Image.EXTENSION or not path.is_file():  # of a format that is not read; a link to nothing
        return False
    # A format without first bytes of its own, as TGA, would take any file for an image.
    formats = [name for name in readable_formats() if Image.OPEN[name][1] is not None]
    try:
        with Image.open(path, formats=formats):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow raises nearly any class
        return False


def readable_formats() -> tuple[str, ...]:
    """Return the formats of FORMATS that Pillow reads here."""
    return _formats()[0]


@cache
def _formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the formats that Pillow reads here, and their extensions."""
    Image.init()
    # Two of them register themselves when they are imported.
    for module in ("pillow_heif", "pillow_jxl", "pillow_avif"):
        with contextlib.suppress(ImportError):
            getattr(import_module(module), "register_heif_opener", lambda: None)()
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    # What opens JPEG opens MPO, several of them in a file.
    known = (*formats, "MPO")
    return formats, frozenset(extension for extension, name in Image.EXTENSION.items() if name in known)


def kind_of(path: Path) -> str:
    """Return what a file that is not read is called, with the package that would let Pillow read it."""
    extension = path.suffix.lower()
    for name, (package, extensions) in PLUGINS.items():
        if extension in extensions and name not in readable_formats():
            return f"{extension} (pip install {package})"
    if extension in (".csv", ".jsonl"):
        return f"{extension} (metadata are in metadata{extension})"
    return extension or "without an extension"
