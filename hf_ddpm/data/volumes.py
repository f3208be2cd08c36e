"""Columns of volumes in tables, of the type `datasets.Nifti`: each slice of a volume is an image.

volume    a NIfTI file; the bytes of one that a table holds are written into a file of the cache
slice     an image of a volume along its stack axis, as of a folder of NIfTI files; see array_files.py
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hf_ddpm.data.array_files import NIFTI
from hf_ddpm.data.arrays import slice_feature, slices_of
from hf_ddpm.data.columns import holds_files, volume_column
from hf_ddpm.data.config import DataConfig, cache_folder
from hf_ddpm.data.decoding import name_of, unreadable_image_error, with_bytes
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import write_atomically

VOLUMES = "volumes"  # the folder in `cache_folder` of volumes whose bytes a table holds
GZIP = b"\x1f\x8b"


def with_slices(table: Any, config: DataConfig) -> Any:
    """Return a table with a row for each slice of its column of volumes; the table itself if it has none to read.

    Labels and groups are repeated for each slice. Other columns of files are left out.

    Args:
        table: A data set of `datasets` with all its columns.
        config: The settings of the data.

    Raises:
        UsageError: When a volume cannot be read, or its axes cannot be told.
    """
    name = volume_column(table.features, config)
    if name is None:
        return table
    import datasets

    volumes = table.select_columns([name]).cast_column(name, datasets.Nifti(decode=False))
    numbers: list[int] = []
    slices: list[dict[str, Any] | None] = []
    for row, volume in enumerate(volumes):
        of_volume = [None] if volume[name] is None else slices_of(_file_of(volume[name], row, config), config)
        slices += of_volume
        numbers += [row] * len(of_volume)
    kept = [column for column in table.column_names if not holds_files(table.features[column])]
    cells = table.select_columns(kept)[:] if kept else {}
    columns = {column: [values[row] for row in numbers] for column, values in cells.items()}
    features = datasets.Features({**{column: table.features[column] for column in kept}, name: slice_feature()})
    sliced = datasets.Dataset.from_dict({**columns, name: slices}, features=features)
    sliced.info.license = table.info.license
    # That of a new table would change with the folder of the cache.
    sliced._fingerprint = table._fingerprint
    return sliced


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
