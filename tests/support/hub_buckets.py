"""The Hub of hub_server with storage buckets and Xet, which stores what the real client sends through hf-xet.

hf-xet writes to a folder of this machine where the Hub gives it the address `local://FOLDER`. So chunks, hashes and
files are those of the real client. Faults concern requests to the Hub: the tokens of Xet, batches, listings.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.hub_server import DATE, HubServer, _Answer, _Incoming, _is_private, _json, _RefusedError, _route

_BUCKET = "/api/buckets/(?P<name>[^/]+/[^/]+)"


@dataclass
class StoredBucket:
    """A bucket.

    Args:
        hashes: Path -> Xet's hash of the file.
    """

    private: bool
    hashes: dict[str, str] = field(default_factory=dict)


class _Objects(dict[str, bytes]):
    """The files of LFS by their sha256, also those that came through Xet."""

    def __init__(self, server: BucketServer):
        super().__init__()
        self.server = server

    def get(self, key: str, default: Any = None) -> Any:
        for name, _, sha256 in self.server.xet_files():
            if sha256 == key:
                return self.server.xet_content(name)
        return super().get(key, default)


class BucketServer(HubServer):
    """A HubServer that takes files through Xet, and has buckets."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._store = tempfile.TemporaryDirectory()
        self.buckets: dict[str, StoredBucket] = {}
        self.objects = _Objects(self)
        self._batches_left: int | None = None

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._store.cleanup()

    @property
    def xet_url(self) -> str:
        return f"local://{self._store.name}"

    def pass_batches(self, number: int | None) -> None:
        """Refuse the batches after the next `number`; None: refuse none."""
        self._batches_left = number

    def xet_files(self) -> Iterator[tuple[str, int, str]]:
        """Yield Xet's hash, size and sha256 of each file that was sent; the sha256 is "" where the client gave none.

        Xet's shards are rows of 48 bytes. After the head, each file has one with its hash, flags and number of
        segments, one for each segment with its size, and more, as the flags say.
        """
        for path in Path(self._store.name).glob("xet/xorbs/shards/*.mdb"):
            content, place = path.read_bytes(), 48
            while content[place : place + 32] != b"\xff" * 32:
                flags, count = struct.unpack_from("<II", content, place + 32)
                name = "".join(f"{part:016x}" for part in struct.unpack_from("<4Q", content, place))
                segments = range(place + 48, place + 48 * (1 + count), 48)
                size = sum(struct.unpack_from("<I", content, segment + 36)[0] for segment in segments)
                place += 48 * (1 + count * (2 if flags & 1 << 31 else 1))
                sha256 = ""
                if flags & 1 << 30:
                    sha256 = "".join(f"{part:016x}" for part in struct.unpack_from("<4Q", content, place))
                    place += 48
                yield name, size, sha256

    def xet_content(self, name: str) -> bytes:
        """Return the file of a hash, as the real client puts it together.

        It does so from a copy: the database of chunks is locked by a client of another process.
        """
        from hf_xet import XetFileInfo, XetSession

        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(self._store.name, Path(folder) / "copy")
            group = XetSession().new_download_stream_group(
                endpoint=f"local://{copy}", token="of-the-server", token_expiry_unix_secs=int(time.time()) + 3600
            )
            return b"".join(group.download_stream(XetFileInfo(name)))

    def _bucket(self, incoming: _Incoming, name: str, write: bool = False) -> StoredBucket:
        user, owner = self._user(incoming), name.split("/")[0]
        bucket = self.buckets.get(name)
        if bucket is None or (bucket.private and user != owner):
            status = 401 if user is None else 404
            raise _RefusedError(status, "Bucket not found", "RepoNotFound")
        if write:
            self._writer(incoming, owner)
        return bucket

    @_route("POST", _BUCKET)
    def _create_bucket(self, incoming: _Incoming, name: str) -> _Answer:
        owner, _, short = name.partition("/")
        user = self._writer(incoming, None if owner == "me" else owner)
        name = f"{user}/{short}"
        url = f"{self.url}/buckets/{name}"
        if name in self.buckets:
            raise _RefusedError(409, "You already created this bucket", url=url)
        self.buckets[name] = StoredBucket(_is_private(incoming.json()))
        return _json({"url": url})

    @_route("GET", _BUCKET)
    def _bucket_info(self, incoming: _Incoming, name: str) -> _Answer:
        bucket = self._bucket(incoming, name)
        counts = {"size": 0, "totalFiles": len(bucket.hashes)}
        return _json({"id": name, "private": bucket.private, "createdAt": DATE, **counts})

    @_route("GET", _BUCKET + "/xet-(?P<kind>read|write)-token")
    def _bucket_token(self, incoming: _Incoming, name: str, kind: str) -> _Answer:
        self._bucket(incoming, name, write=kind == "write")
        return self._xet_token()

    @_route("GET", "/api/models/(?P<name>[^/]+/[^/]+)/xet-(?P<kind>read|write)-token/[^/]+")
    def _model_token(self, incoming: _Incoming, name: str, kind: str) -> _Answer:
        self._repo(incoming, "models", name, write=kind == "write")
        return self._xet_token()

    def _xet_token(self) -> _Answer:
        end = int(time.time()) + 3600
        given = {"casUrl": self.xet_url, "accessToken": "of-the-client", "exp": end}
        headers = {"X-Xet-Cas-Url": self.xet_url, "X-Xet-Access-Token": "of-the-client"}
        return _json(given, headers={**headers, "X-Xet-Token-Expiration": str(end)})

    @_route("POST", _BUCKET + "/batch")
    def _batch(self, incoming: _Incoming, name: str) -> _Answer:
        bucket = self._bucket(incoming, name, write=True)
        if self._batches_left is not None:
            if self._batches_left == 0:
                raise _RefusedError(403, "the test made this fail")
            self._batches_left -= 1
        operations = [json.loads(line) for line in incoming.body.splitlines()]
        sent = {name for name, _, _ in self.xet_files()}
        for operation in operations:
            if operation["type"] == "addFile":
                if operation["xetHash"] not in sent:
                    raise _RefusedError(400, f"the content of {operation['path']} was not uploaded")
                bucket.hashes[operation["path"]] = operation["xetHash"]
            else:
                bucket.hashes.pop(operation["path"], None)
        return _json({"success": True, "failed": []})

    @_route("POST", _BUCKET + "/paths-info")
    def _bucket_paths(self, incoming: _Incoming, name: str) -> _Answer:
        bucket = self._bucket(incoming, name)
        return _json([entry for entry in self._entries(bucket) if entry["path"] in incoming.json()["paths"]])

    @_route("GET", _BUCKET + "/tree(?:/(?P<prefix>.+))?")
    def _bucket_tree(self, incoming: _Incoming, name: str, prefix: str | None) -> _Answer:
        bucket = self._bucket(incoming, name)
        return _json([e for e in self._entries(bucket) if not prefix or e["path"].startswith(f"{prefix}/")])

    def _entries(self, bucket: StoredBucket) -> list[dict[str, Any]]:
        sizes = {name: size for name, size, _ in self.xet_files()}
        return [
            {"type": "file", "path": path, "size": sizes[xet_hash], "xetHash": xet_hash, "mtime": DATE}
            for path, xet_hash in sorted(bucket.hashes.items())
        ]

    @_route("GET", "/buckets/(?P<name>[^/]+/[^/]+)/resolve/(?P<path>.+)")
    def _bucket_resolve(self, incoming: _Incoming, name: str, path: str) -> _Answer:
        """Say where a file is; the client asks this alone, and fetches the file by Xet."""
        bucket = self._bucket(incoming, name)
        if path not in bucket.hashes:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        (size,) = (entry["size"] for entry in self._entries(bucket) if entry["path"] == path)
        route = f"{self.url}/api/buckets/{name}/xet-read-token"
        headers = {"X-Xet-Hash": bucket.hashes[path], "X-Xet-Refresh-Route": route, "X-Linked-Size": str(size)}
        return _Answer(200, b"", headers)
