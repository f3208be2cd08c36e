"""Files that are whole or absent, whatever happens while they are written, and readers that name what is damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from hf_ddpm.runtime import slurm
from hf_ddpm.runtime.errors import UsageError, in_one_line

# The folder of a pipeline's network: of one that makes images from noise, and of one that makes them from images too.
NETWORK_FOLDERS = ("unet", "conditional_unet")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader finds the old content or the new one, also after a loss of power.

    The content is written under another name in the same folder, which is made if need be, and then renamed.

    Args:
        path: The file to write.
        content: Bytes, or text that is encoded as UTF-8.

    Raises:
        OSError: When the file cannot be written; the old content is then still there.
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
    """Write a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def append_lines(path: Path, lines: list[str]) -> None:
    """Append all lines to a file, or none of them if that raises OSError."""
    content = "".join(f"{line}\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:  # a buffer would be written again before the file is cut
        size_before = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size_before)
            raise


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable; Windows has no call for it and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some file systems cannot flush a folder.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder for the duration of a `with` block; a killed process leaves no lock behind.

    Windows and file systems without locks do not lock: there, two processes can be in the block at once.

    Yields:
        Whether the folder is locked.

    Raises:
        BlockingIOError: When another process holds the lock; the message names it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    with open(folder / ".lock", "a+") as file:
        try:
            # This lock belongs to the process alone: a process that it forks does not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BlockingIOError(error.errno, f"{holder} has locked it", str(folder)) from error
            is_locked = False
        if is_locked:
            with suppress(OSError):  # a full disk is no reason not to lock
                file.truncate(0)
                file.write(_own_name())
                file.flush()
        yield is_locked


def _own_name() -> str:
    """Return what a person finds this process by: its job, or its number and machine."""
    job = slurm.job()
    return f"process {os.getpid()} on {platform.node()}" if job is None else f"job {job} of SLURM"


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let other processes wait that come to a `with` block of this function for the same folder; it holds no file.

    As with `lock`, nobody waits on Windows and on file systems without locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open, too
        os.close(descriptor)


def sha256(*paths: Path) -> str:
    """Return the checksum of the contents of files, one after the other, as 64 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def network_folder(folder: Path) -> Path:
    """Return the folder of the network of a diffusers pipeline, by its name; `unet` if there is none."""
    return next((folder / name for name in NETWORK_FOLDERS if (folder / name).is_dir()), folder / NETWORK_FOLDERS[0])


def weights_sha256(folder: Path) -> str | None:
    """Return the checksum of the weights of a diffusers pipeline's network, or None if there are no weights.

    Weights in several files are read in the order of the files' names.
    """
    # Repositories of early diffusers have all files in one folder.
    for subfolder in (*(folder / name for name in NETWORK_FOLDERS), folder):
        for pattern in ("*.safetensors", "*.bin"):
            if files := sorted(subfolder.glob(f"diffusion_pytorch_model{pattern}")):
                return sha256(*files)
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines, without lines that a killed run left unfinished.

    Raises:
        UsageError: When a line is JSON, but holds no step, as a run writes none.
    """
    records = []
    with naming_damage(f"{path} cannot be read", "correct it, or move it away"):
        content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:  # cut off, also within a character
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UsageError(f"{path} cannot be read: no step in line {number}: correct that line, or delete it")
        records.append(record)
    return records


def cut_metrics(path: Path, last_step: int) -> None:
    """Delete the lines after `last_step`, which a resumed run writes again."""
    records = [record for record in read_metrics(path) if record["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def read_mapping(path: Path, remedy: str = "correct it") -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file, or an empty one if there is no such file.

    Args:
        path: A file whose name ends in `.json`, or else a YAML file.
        remedy: What the user can do about a damaged file; the error message ends with it.

    Raises:
        UsageError: When the file is damaged, or holds something else than a mapping.
    """
    with naming_damage(f"{path} cannot be read", remedy):
        content = path.read_bytes() if path.is_file() else None
    return {} if content is None else parse_mapping(content, path, remedy)


def parse_mapping(
    content: bytes | str, path: Path | str, remedy: str = "correct it", is_json: bool | None = None
) -> dict[str, Any]:
    """Return the mapping that `content`, which was read from `path`, holds; see `read_mapping`.

    Args:
        content: What was read.
        path: The file, for error messages.
        remedy: See `read_mapping`.
        is_json: Whether it is JSON, whatever its name says.
    """
    with naming_damage(f"{path} cannot be read", remedy):
        text = content if isinstance(content, str) else content.decode("utf-8")
        if str(path).endswith(".json") if is_json is None else is_json:
            mapping = json.loads(text, object_pairs_hook=_unique)
        else:
            mapping = yaml.load(text, _UniqueLoader)
        if not isinstance(mapping, dict | None):
            raise ValueError(f"it must be a mapping, got {mapping!r}")
        return mapping or {}


# libyaml's loader is ten times as fast, and is in nearly all builds of PyYAML.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueLoader(_SafeLoader):
    """A loader of plain values for which a key that stands twice is a mistake: YAML's own takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return mapping


@contextmanager
def naming_damage(failure: str, remedy: str) -> Iterator[None]:
    """Turn the errors that reading a damaged file causes in a `with` block into a UsageError: failure, cause, remedy.

    Args:
        failure: What could not be done, for example "config.yaml cannot be read".
        remedy: What the user can do about it, for example "correct it".

    Raises:
        UsageError: When the block raises one, or an error that a missing or mistyped value causes.
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{failure}: {in_one_line(error)}: {remedy}") from error
    except (LookupError, TypeError, AttributeError) as error:  # without the type, their messages say too little
        raise UsageError(f"{failure}: {in_one_line(error, with_type=True)}: {remedy}") from error


def look_at(name: str, path: str | Path) -> Path:
    """Return a path that the user named, `~` expanded, after a look at what is there: it may be nothing.

    Args:
        name: The setting that names the path, for the error message.
        path: A path, or what may be one, as a Hub id.

    Raises:
        UsageError: When the path is empty or too long, of an unknown user, or what it names may not be read.
    """
    if not str(path):
        raise UsageError(f"{name} must not be empty: leave it out for its default")
    shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:  # what pathlib raises for a home that it does not find
        raise UsageError(f"{name} must be a path of a user of this machine, got {shown!r}") from error
    try:
        is_folder = stat.S_ISDIR(expanded.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return expanded
    except (OSError, ValueError) as error:  # a ValueError is of a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{name} must be a path that can be looked at, got {shown!r}: {reason}") from error
    if not os.access(expanded, os.R_OK | os.X_OK if is_folder else os.R_OK):
        raise UsageError(f"{name} must be readable, got {shown!r}: you lack the permission")
    return expanded


def require_writable_folder(name: str, folder: Path) -> None:
    """Check that a folder can be written to, or made.

    Args:
        name: The setting that names the folder, for the error message.
        folder: The folder, which need not exist.

    Raises:
        UsageError: When it is a file, lies in one, or may not be written.
    """
    look_at(name, folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{name} must be a folder, got {str(folder)!r}, which is a file")
    existing = existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"{name} must be a folder that can be written, got {str(folder)!r}: see {existing}")


def existing_parent(path: Path) -> Path:
    """Return the path itself if it exists, or else its nearest parent that does: where `path` would be made."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
