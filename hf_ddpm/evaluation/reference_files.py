"""The files of a reference: a folder that is written whole or not at all.

reference.safetensors   the statistics, tensors by name
reference.json          the data, what they were measured by, versions, warnings, and the sha256 of the other file
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_ddpm._version import __version__
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import flush_folder, look_at, naming_damage, read_mapping, write_flushed

FORMAT = 1


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of this package and of others, by their names."""
    return {"hf_ddpm": __version__, **{name: version(name) for name in packages}}


def write_files(out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a reference to the new folder `out`, completely or not at all.

    Args:
        out: The folder.
        tensors: The statistics.
        metadata: The content of reference.json without the checksum.

    Raises:
        UsageError: When it cannot be written.
    """
    content = save({**tensors})
    with_checksum = {**metadata, "sha256": hashlib.sha256(content).hexdigest()}
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        part.mkdir(parents=True)
        write_flushed(part / "reference.safetensors", content)
        write_flushed(part / "reference.json", json.dumps(with_checksum, indent=2, ensure_ascii=False) + "\n")
        part.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        raise UsageError(f"out must be a folder to write to, got {str(out)!r}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_files(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the content of reference.json without the checksum, and the tensors, of the reference in a folder.

    Raises:
        UsageError: When there is none, or it is damaged.
    """
    folder = look_at("reference", path)
    if not (folder / "reference.json").is_file():
        raise UsageError(
            f"reference must be a folder with reference.json, got {str(path)!r}: make one with `hf-ddpm reference`"
        )
    try:
        with naming_damage(f"{folder / 'reference.json'} cannot be read", "make it again"):
            metadata = read_mapping(folder / "reference.json", "make it again")
            if metadata["format"] != FORMAT:
                raise UsageError(f"reference must have the format {FORMAT}, got {metadata['format']}: make it again")
            content = (folder / "reference.safetensors").read_bytes()
            expected, actual = metadata.pop("sha256"), hashlib.sha256(content).hexdigest()
            if actual != expected:
                raise UsageError(
                    f"reference must be as it was written, got {str(path)!r} with the sha256\n  {actual} instead of\n"
                    f"  {expected}: make it again with `hf-ddpm reference`"
                )
            return metadata, load(content)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder} cannot be read: {in_one_line(error)}: make it again") from error
