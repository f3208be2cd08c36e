"""Columns of volumes in tables, of the type `datasets.Nifti`: each slice of a volume is an image.

volume    a NIfTI file; the bytes of one that a table holds are written into a file of the cache
slice     an image of a volume along its stack axis, as of a folder of NIfTI files; see array_files.py
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hf_ddpm.data.array_axes import axes_of
from hf_ddpm.data.array_files import NIFTI, open_arrays
from hf_ddpm.data.arrays import slice_feature, slices_of
from hf_ddpm.data.columns import check_condition_column, holds_files, image_column, volume_columns
from hf_ddpm.data.config import DataConfig, cache_folder
from hf_ddpm.data.decoding import name_of, unreadable_image_error, with_bytes
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import write_atomically

VOLUMES = "volumes"  # the folder in `cache_folder` of volumes whose bytes a table holds
GZIP = b"\x1f\x8b"


def with_slices(table: Any, config: DataConfig) -> Any:
    """Return a table with a row for each slice of its columns of volumes; the table itself if it has none to read.

    Labels and groups are repeated for each slice, and beside each slice of the images stands one of their conditions.
    Other columns of files are left out.

    Args:
        table: A data set of `datasets` with all its columns.
        config: The settings of the data.

    Raises:
        UsageError: When a volume cannot be read, its axes cannot be told, or the two of a row are no pair.
    """
    names = volume_columns(table.features, config)
    if not names:
        return table
    import datasets

    beside = _column_beside(table.features, names, config)
    volumes = table.select_columns(names)
    for name in names:
        volumes = volumes.cast_column(name, datasets.Nifti(decode=False))
    numbers: list[int] = []
    slices: dict[str, list[Any]] = {name: [] for name in names}
    for row, cells in enumerate(volumes):
        files = {name: _file_of(cell, row, config) for name, cell in cells.items() if cell is not None}
        of_row = {name: slices_of(file, config) for name, file in files.items()}
        count = max(map(len, of_row.values()), default=1)
        _require_pair(files, row, config)
        if beside is not None and count != 1:
            raise UsageError(
                f"condition_column must hold as many images as the column of images, got {count} slices in "
                f"{names[0]!r} and one image in {beside!r} in row {row}: name two columns of volumes"
            )
        for name in names:  # an empty cell is named when it is decoded
            slices[name] += of_row.get(name, [None] * count)
        numbers += [row] * count
    of_slices = datasets.Features(dict.fromkeys(names, slice_feature()))
    if beside is None:
        kept = [column for column in table.column_names if not holds_files(table.features[column])]
        cells = table.select_columns(kept)[:] if kept else {}
        columns = {column: [values[row] for row in numbers] for column, values in cells.items()}
        features = datasets.Features({**{column: table.features[column] for column in kept}, **of_slices})
        sliced = datasets.Dataset.from_dict({**columns, **slices}, features=features)
    else:  # of one slice each
        parts = [table.remove_columns(names), datasets.Dataset.from_dict(slices, features=of_slices)]
        sliced = datasets.concatenate_datasets(parts, axis=1)
    sliced.info.license = table.info.license
    # That of a new table would change with the folder of the cache.
    sliced._fingerprint = table._fingerprint
    return sliced


def _column_beside(features: Any, names: list[str], config: DataConfig) -> str | None:
    """Return the column of a pair that holds no volumes; None where both do, and where no pair is read.

    Args:
        features: The columns that there are.
        names: Those of volumes that are read.
        config: The settings of the data.

    Raises:
        UsageError: When there is no column of conditions, or none of images.
    """
    condition = config.condition_column
    if condition is None:
        return None
    check_condition_column(features, condition)
    if condition not in names:
        return condition
    if len(names) > 1 or config.image_column == condition:
        return None
    return image_column({name: feature for name, feature in features.items() if name != condition}, config)


def _require_pair(files: dict[str, Path], row: int, config: DataConfig) -> None:
    """Check that slices of the same number in the volumes of a row show the same place.

    Raises:
        UsageError: When there are other slices in one, of another size, or along another direction.
    """
    shapes = {name: _shape_of_stack(file, config) for name, file in files.items()}
    if len({*shapes.values()}) > 1:
        raise UsageError(
            f"the volumes of a row must have as many slices, height and width, got {_listed(shapes)} in row {row}: "
            "resample one onto the grid of the other, as nibabel.processing.resample_from_to does"
        )
    directions = {name: _directions_of(file) for name, file in files.items()}
    if len({*directions.values()}) > 1:
        raise UsageError(
            f"the volumes of a row must have axes of the same directions, got {_listed(directions)} in row {row}: "
            "turn them, as nibabel.as_closest_canonical does"
        )


def _listed(values: dict[str, Any]) -> str:
    return " and ".join(f"{value} in {name!r}" for name, value in values.items())


def _shape_of_stack(file: Path, config: DataConfig) -> tuple[int, ...]:
    """Return the number of the slices of a volume, their height and their width."""
    with open_arrays(file, []) as (array,):
        shape, axes = array.values.shape, axes_of(array, file.name, config)
    planes = (length for axis, length in enumerate(shape) if axis not in axes)
    return (1 if axes.stack is None else shape[axes.stack], *planes)


def _directions_of(file: Path) -> str:
    """Return where the axes of a volume lead, as RAS to the right, to the front and upwards."""
    import nibabel

    image: Any = nibabel.load(file)  # pyright: ignore[reportPrivateImportUsage]
    return "".join(code or "?" for code in nibabel.aff2axcodes(image.affine))  # pyright: ignore[reportPrivateImportUsage]


def _file_of(volume: dict[str, Any], row: int, config: DataConfig) -> Path:
    """Return the file of a volume, which is written if the table holds its bytes."""
    path = None if volume["path"] is None else str(volume["path"]).split("::")[-1]
    if volume["bytes"] is None and path is not None and "://" not in path:
        return Path(path)
    try:
        content = with_bytes(volume)["bytes"]
    except Exception as error:  # file systems and clients share no base class of errors
        raise unreadable_image_error(name_of(volume, row), error, config) from error
    if content is None:
        raise UsageError(f"each volume must have bytes or a path, got neither in row {row}: leave the row out")
    name = Path(path or f"row-{row}").name
    if not name.lower().endswith(NIFTI):
        name += NIFTI[content[:2] == GZIP]
    file = cache_folder(config) / VOLUMES / hashlib.sha256(content).hexdigest()[:32] / name
    if not file.is_file():
        try:
            write_atomically(file, content)
        except OSError as error:
            raise UsageError(
                f"cache_dir must be a folder to write to, got {str(file.parent)!r}: {in_one_line(error)}; give "
                "another --cache_dir"
            ) from error
    return file
