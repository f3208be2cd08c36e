"""The newest checkpoint of a run on the Hub, from which the run goes on on another machine.

It has a place of its own, NAME-checkpoint beside the model NAME, so that it stays private when the model is public.
The place is a storage bucket where huggingface_hub has them, else the branch `main` of a repository:

    checkpoint.json     the step, the images, the folder of the files, and size and sha256 of each
    STEP-DIGEST/        the files, under the names that they have in the run's folder

checkpoint.json is written when the files that it names are there, and older files are deleted after that. So it names
a whole checkpoint at any moment. In a repository all of it is one commit, and the history is then squashed: an older
checkpoint would take room as long as a commit has it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from hf_ddpm.hub.errors import as_push_errors
from hf_ddpm.hub.places import Place, places
from hf_ddpm.hub.upload import LOCAL_SETTINGS, copy_file, is_local_path
from hf_ddpm.runtime.errors import PushError, UsageError
from hf_ddpm.runtime.files import naming_damage, parse_mapping, read_mapping, sha256
from hf_ddpm.runtime.run_files import OF_CHECKPOINT

RECORD = "checkpoint.json"
SUFFIX = "-checkpoint"


@dataclass(frozen=True)
class Record:
    """The content of checkpoint.json.

    Args:
        step: The optimizer steps of the run at the checkpoint.
        images: The images seen in them.
        folder: The folder of the files in the place.
        files: The name of each file in the run's folder -> its `size` in bytes and its `sha256`.
    """

    step: int
    images: int
    folder: str
    files: dict[str, dict[str, Any]]

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint in the run's folder."""
        return f"checkpoint-{self.step}"

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(file["size"] for file in self.files.values())


def full_name(api: HfApi, model: str) -> str:
    """Return the name of a repository with its namespace: that of the token's owner unless it has one.

    Raises:
        PushError: When the Hub does not know the token, or cannot be reached.
    """
    if "/" in model:
        return model
    with as_push_errors(api, model):
        return f"{api.whoami()['name']}/{model}"


def find_record(api: HfApi, model: str) -> tuple[Place, Record] | None:
    """Return the newest checkpoint on the Hub and its place, or None if there is none.

    Raises:
        PushError: When the Hub refuses, or cannot be reached.
        UsageError: When checkpoint.json is damaged.
    """
    found = []
    for place in places(api, model + SUFFIX):
        with as_push_errors(api, place.name):
            content = place.read(RECORD)
        if content is not None:
            found.append((place, _read_record(content, place)))
    return max(found, key=lambda each: each[1].step, default=None)


def create_place(api: HfApi, model: str) -> Place:
    """Create the place of a checkpoint unless it exists, and return it.

    Raises:
        PushError: When it cannot be created, or is public.
    """
    place = places(api, model + SUFFIX)[0]
    create_private(place)
    return place


def create_private(place: Place) -> None:
    """Create a place unless it exists, and check that it is private.

    Raises:
        PushError: When it cannot be created, or is public.
    """
    with as_push_errors(place.api, place.name):
        if not place.create():
            raise PushError(
                f"{place.name} must be private, as it holds a checkpoint, but it exists and is public: make it "
                "private on the Hub, or give another hub_model_id"
            )


def require_write(api: HfApi, name: str) -> None:
    """Check that the token is none that may only read: the client takes a repository that exists for created.

    Raises:
        PushError: When it is one.
    """
    with as_push_errors(api, name):
        role = ((api.whoami().get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise PushError(f"the token may not write to {name}: give one with write access, or another name")


def require_older(record: Record | None, step: int, name: str) -> None:
    """Check that the checkpoint on the Hub is not of a later step than the one that is to replace it.

    Raises:
        PushError: When it is.
    """
    if record is not None and record.step > step:
        raise PushError(
            f"{name} holds {record.checkpoint}, and checkpoints after step {step} would replace it: "
            "--resume_from_checkpoint hub goes on from it, --overwrite_output_dir replaces it, another hub_model_id "
            "leaves it alone; it can be deleted on the Hub"
        )


def send_checkpoint(
    api: HfApi, model: str, files: Path, message: str, still_wanted: Callable[[], bool], replaces_newer: bool
) -> None:
    """Put copies of a checkpoint and of what belongs to it in the place of the checkpoint on the Hub.

    Args:
        api: The client.
        model: The repository of the model, with its namespace.
        files: The folder of the copies, see `copy_checkpoint`.
        message: The commit's message.
        still_wanted: Asked before the files go up, and before the record is replaced, which it is not after False.
        replaces_newer: Also replace a checkpoint of a later step, which another run has left there.

    Raises:
        PushError: When the Hub refuses, or cannot be reached.
    """
    place = create_place(api, model)
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    contents = {name: {"size": (files / name).stat().st_size, "sha256": sha256(files / name)} for name in names}
    (progress,) = files.glob("checkpoint-*/progress.json")
    about = read_mapping(progress)
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:8]
    record = Record(about["step"], about["images"], f"{about['step']}-{digest}", contents)

    def require_wanted() -> None:
        before = place.read(RECORD)
        if before is not None and not replaces_newer:
            require_older(_read_record(before, place), record.step, place.name)
        if not still_wanted():
            raise PushError("a newer state goes in its place")

    with as_push_errors(api, place.name):
        require_wanted()
        added = {f"{record.folder}/{name}": files / name for name in names}
        # Files of a later step may be those of another process that is about to write its record.
        outdated = [
            name
            for name in place.names()
            if "/" in name and name not in added and (replaces_newer or _step_of(name) <= record.step)
        ]
        content = (json.dumps(asdict(record), indent=2) + "\n").encode()
        place.replace(added, (RECORD, content), outdated, message, require_wanted)


def _step_of(name: str) -> int:
    """Return the step of the checkpoint that a file of a place belongs to."""
    step = name.partition("-")[0]
    return int(step) if step.isdecimal() else 0


def copy_checkpoint(folder: Path, checkpoint: str, path_settings: Collection[str]) -> Path:
    """Return a new folder in a run's folder with a checkpoint and what a run that resumes from it needs.

    Nothing in it says where it was trained: paths are left out, and in the copy of manifest.json, size and sha256 are
    those of the copies. Weights are hard links where the file system allows it.

    Args:
        folder: The run's folder.
        checkpoint: The name of the checkpoint.
        path_settings: The names of settings that may be paths.

    Raises:
        UsageError: When a file of the run is damaged.
        OSError: When a file cannot be read, or not be copied.
    """
    copies = Path(tempfile.mkdtemp(prefix="partial-push-", dir=folder))
    try:
        for pattern in (checkpoint, *OF_CHECKPOINT):
            for path in sorted(folder.glob(pattern)):
                for source in [path] if path.is_file() else sorted(path.rglob("*")):
                    target = copies / source.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if source.is_file():
                        copy_file(source, target)
        settings = copies / "config.yaml"
        portable = _without_paths(read_mapping(folder / "config.yaml"), path_settings)
        settings.write_text(yaml.safe_dump(portable, sort_keys=False), encoding="utf-8")
        for config in copies.rglob("config.json"):
            _rewrite(config, lambda content: {k: v for k, v in content.items() if k != "_name_or_path"})
        _rewrite(copies / checkpoint / "progress.json", _without_image_names)
        _rewrite(copies / checkpoint / "manifest.json", lambda manifest: _described(manifest, copies / checkpoint))
    except BaseException:
        shutil.rmtree(copies, ignore_errors=True)
        raise
    return copies


def download_checkpoint(place: Place, record: Record, folder: Path) -> Path:
    """Download a checkpoint and what belongs to it, and return the folder that holds it as a run's folder would.

    An earlier download that was interrupted goes on.

    Args:
        place: Where the checkpoint is.
        record: Its checkpoint.json.
        folder: The run's folder. The download stands in its `partial-download`.

    Raises:
        PushError: When the Hub refuses, or cannot be reached.
        UsageError: When what comes is not what checkpoint.json names.
    """
    partial = folder / "partial-download"
    # What is replaced meanwhile is missing, which is found below.
    with as_push_errors(place.api, place.name), suppress(EntryNotFoundError):
        place.download([f"{record.folder}/{name}" for name in record.files], partial)
    for name, expected in record.files.items():
        path = partial / record.folder / name
        if not path.is_file() or sha256(path) != expected["sha256"]:
            shutil.rmtree(partial, ignore_errors=True)  # of a bucket nothing comes where a file is missing
            raise UsageError(
                f"{record.checkpoint} of {place.name} must be whole, but {name} is not the file that {RECORD} names: "
                "start again, in case it was replaced meanwhile"
            )
    return partial / record.folder


def read_settings(place: Place, record: Record) -> bytes:
    """Return the config.yaml of the run of a checkpoint on the Hub, which lacks the settings that are paths.

    Raises:
        PushError: When the Hub refuses, or cannot be reached.
    """
    with as_push_errors(place.api, place.name):
        return place.read(f"{record.folder}/config.yaml") or b""


def _read_record(content: bytes, place: Place) -> Record:
    remedy = f"delete that {place.kind} on the Hub, or give another hub_model_id"
    with naming_damage(f"{RECORD} of {place.name} cannot be read", remedy):
        record = Record(**parse_mapping(content, RECORD, remedy))
        parts = [part for name in (record.folder, *record.files) for part in name.split("/")]
        if not parts or {"", ".", ".."} & {*parts} or record.folder.count("/"):
            raise ValueError("it names files outside of its folder")
        return record


def _without_paths(settings: dict[str, Any], path_settings: Collection[str]) -> dict[str, Any]:
    def is_path(name: str, value: Any) -> bool:
        if not isinstance(value, str):
            return False
        return is_local_path(value) or (name in path_settings and Path(value).exists())

    return {k: v for k, v in settings.items() if k not in LOCAL_SETTINGS and not is_path(k, v)}


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a JSON file anew if that changes its content."""
    content = read_mapping(path)
    changed = change(content)
    if changed != content:
        path.write_text(json.dumps(changed, indent=2), encoding="utf-8")


def _without_image_names(progress: dict[str, Any]) -> dict[str, Any]:
    """Return a progress that says when skipped steps began, without the paths of their images."""
    return {**progress, "bad_steps_began": progress["bad_steps_began"].partition(":")[0]}


def _described(manifest: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return a manifest with size and sha256 of the JSON files as they are in the copy."""
    files = dict(manifest["files"])
    for name in files:
        if name.endswith(".json"):
            files[name] = {"size": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
    return {**manifest, "files": files}
