"""The places of files on the Hub that are private and replaced: a storage bucket, or the branch of a repository."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hf_ddpm.hub.errors import status_of


@dataclass(frozen=True)
class Repository:
    """The branch `main` of a model repository as a place."""

    api: HfApi
    name: str
    kind: str = "repository"

    def create(self) -> bool:
        """Create it, private, unless it exists; return whether it is private."""
        self.api.create_repo(self.name, private=True, exist_ok=True)
        return bool(self.api.model_info(self.name).private)

    def names(self) -> list[str]:
        """Return the names of its files."""
        return self.api.list_repo_files(self.name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is no such file or place."""
        try:
            info = self.api.model_info(self.name)
        except HfHubHTTPError as error:
            if status_of(error) == 404:
                return None
            raise
        if name not in [file.rfilename for file in info.siblings or ()]:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = self.api.hf_hub_download(self.name, name, revision=info.sha, local_dir=folder)
            return Path(path).read_bytes()

    def replace(
        self, files: dict[str, Path], record: tuple[str, bytes], outdated: Sequence[str], message: str
    ) -> None:
        """Add files and the record and delete what is outdated in one commit, then squash the history.

        Args:
            files: Name -> the file here.
            record: The name and the content of the file that names the others.
            outdated: The names of files to delete.
            message: The commit's message.
        """
        head = self.api.model_info(self.name).sha
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        for operation in operations:
            # One by one: for several, the client starts threads, and Python waits for threads before it ends.
            self.api.preupload_lfs_files(self.name, [operation])
        operations.append(CommitOperationAdd(*record))
        operations += [CommitOperationDelete(name) for name in outdated]
        self.api.create_commit(self.name, operations, commit_message=message, parent_commit=head)
        self.api.super_squash_history(self.name, commit_message=message)

    def download(self, names: list[str], target: Path) -> None:
        """Download files into a folder, under the same names."""
        api = self.api
        snapshot_download(self.name, allow_patterns=names, local_dir=target, token=api.token, endpoint=api.endpoint)


@dataclass(frozen=True)
class Bucket:
    """A storage bucket as a place."""

    api: Any  # the HfApi of huggingface_hub 2
    name: str
    kind: str = "bucket"

    def create(self) -> bool:
        """Create it, private, unless it exists; return whether it is private."""
        self.api.create_bucket(self.name, private=True, exist_ok=True)
        return bool(self.api.bucket_info(self.name).private)

    def names(self) -> list[str]:
        """Return the names of its files."""
        return [entry.path for entry in self.api.list_bucket_tree(self.name, recursive=True) if entry.type == "file"]

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is no such file or place."""
        try:
            if not list(self.api.get_bucket_paths_info(self.name, [name])):
                return None
        except HfHubHTTPError as error:
            if status_of(error) == 404:
                return None
            raise
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            self.api.download_bucket_files(self.name, [(name, path)], raise_on_missing_files=True)
            return path.read_bytes()

    def replace(
        self, files: dict[str, Path], record: tuple[str, bytes], outdated: Sequence[str], message: str
    ) -> None:
        """Add files, then the record, then delete what is outdated: a bucket knows no commits, nor their messages.

        The arguments are those of a repository.
        """
        self.api.batch_bucket_files(self.name, add=[(path, name) for name, path in files.items()])
        name, content = record
        self.api.batch_bucket_files(self.name, add=[(content, name)])
        if outdated:
            self.api.batch_bucket_files(self.name, delete=list(outdated))

    def download(self, names: list[str], target: Path) -> None:
        """Download files into a folder, under the same names."""
        files = [(name, target / name) for name in names]
        self.api.download_bucket_files(self.name, files, raise_on_missing_files=True)


Place = Bucket | Repository


def has_buckets() -> bool:
    """Return whether huggingface_hub can use storage buckets here: version 2 can, through hf-xet."""
    is_off = bool(getattr(constants, "HF_HUB_DISABLE_XET", False))
    return hasattr(HfApi, "batch_bucket_files") and find_spec("hf_xet") is not None and not is_off


def places(api: HfApi, name: str) -> Sequence[Place]:
    """Return the places in which files may be, first the one in which they are put from here.

    Args:
        api: The client.
        name: The name of the place, with its namespace.
    """
    return [Bucket(api, name), Repository(api, name)] if has_buckets() else [Repository(api, name)]
