"""Files that are whole or absent, whatever happens while they are written; and what says that they are."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hf_ddpm.runtime.errors import UsageError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes `path` under another name in its folder, which is made if need be, and renames it: a reader finds the old
    content or the new one, also after a loss of power.

    Raises: OSError; what `path` held is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_flushed(partial, content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_flushed(path: Path, content: bytes | str) -> None:
    """Writes a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def append_lines(path: Path, lines: list[str]) -> None:
    """Appends all lines or, if that raises OSError, none."""
    content = "".join(f"{line}\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:  # a buffer would be written again before the file is cut
        before = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def flush_folder(folder: Path) -> None:
    """Makes the names in `folder` durable; Windows cannot, and does so itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # a file system that has no such thing
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Within it, no other process is within it; a killed process leaves no lock behind.

    Raises: BlockingIOError if another process is.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "a") as file:
        try:
            # Of this process alone: a process that it forks does not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(error.errno, "another process has locked it", str(folder)) from error
            # else a file system without locks
        yield


def sha256(*paths: Path) -> str:
    """Of the contents of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weights_sha256(folder: Path) -> str | None:
    """Of the weights of a diffusers pipeline's network, in the order of their files' names; None without any."""
    for place in (folder / "unet", folder):  # repositories of early diffusers have all files in one folder
        for pattern in ("*.safetensors", "*.bin"):
            if files := sorted(place.glob(f"diffusion_pytorch_model{pattern}")):
                return sha256(*files)
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; one that a killed run left unfinished is no line."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def cut_metrics(path: Path, last_step: int) -> None:
    """Leaves the lines up to `last_step`; those after it are written again."""
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_mapping(path: Path) -> dict[str, Any]:
    """A mapping in YAML or JSON; empty if the run did not write it. Raises: UsageError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path.name} cannot be read: {in_a_line(error)}: correct it") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path.name} cannot be read: it must be a mapping, got {content!r}: correct it")
    return content


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
