"""A small Hugging Face Hub in memory, on a port of this machine, that fails when a test asks it to.

It answers the requests that huggingface_hub and diffusers send. So the real client is tested: its uploads, its
downloads, and what becomes of them when the Hub refuses, breaks off or does not answer.

    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        code = "import huggingface_hub; huggingface_hub.create_repo('alice/digits', private=True)"
        run_client(hub, code, tmp_path, token="hf_alice")
        assert hub.repo("alice/digits").private

It proves that our side speaks the protocol. It cannot prove how the real Hub judges a card or a quota. It has no Xet,
no pull requests, no gated repositories, no organizations and no pages of listings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import yaml

from tests.support.forks import python

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".gif")
LARGEST_REGULAR_BYTES = 10_000
# The Hub begins each repository with such a commit.
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    files: dict[str, bytes]
    lfs: frozenset[str]  # paths of the files that git holds as pointers


@dataclass
class Repo:
    id: str
    type: str
    private: bool
    sdk: str | None
    commits: list[Commit] = field(default_factory=list)  # of all branches, as they came
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str = "main") -> Commit:
        """Return the commit of a branch, a tag or an oid; raises KeyError if there is none."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return {commit.oid: commit for commit in self.commits}[oid]

    @property
    def files(self) -> dict[str, bytes]:
        """The files of `main`."""
        return self.commit().files

    def add(self, branch: str, title: str, description: str, files: dict[str, bytes], lfs: frozenset[str]) -> Commit:
        parent = self.branches.get(branch)
        oid = _sha1(f"{self.type} {self.id} {len(self.commits)}".encode())
        self.commits.append(Commit(oid, parent, title, description, files, lfs))
        self.branches[branch] = oid
        return self.commits[-1]


@dataclass(frozen=True)
class Request:
    """A request, and the status of its answer."""

    method: str
    path: str  # decoded, without the query
    query: str
    headers: Mapping[str, str]  # names in lower case
    user: str | None  # None: it had no token, or an unknown one
    status: int | None  # None: the connection was closed before an answer

    @property
    def user_agent(self) -> str:
        return self.headers.get("user-agent", "")


@dataclass
class Hold:
    """Requests that wait for `release`; `entered` is set once the first of them has arrived."""

    path: str
    method: str | None
    entered: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        self.released.set()


@dataclass
class _Fault:
    path: str
    method: str | None
    times: int | None


@dataclass
class _Failure(_Fault):
    answer: _Answer


@dataclass
class _Cut(_Fault):
    after_bytes: int
    of: Literal["request", "response"] | None
    reset: bool


_F = TypeVar("_F", bound=_Fault)


@dataclass(frozen=True)
class _Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class _RefusedError(Exception):
    """An error that is answered in the words of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        headers |= {"X-Repo-Commit": more.pop("commit")} if "commit" in more else {}
        self.answer = _json({"error": message, **more}, status, headers)


@dataclass(frozen=True)
class _Incoming:
    method: str
    path: str  # as sent
    query: str
    headers: Mapping[str, str]
    body: bytes
    token: str | None

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., _Answer]]] = []
_API = "/api/(?P<type>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_PAGE = "/(?:(?P<type>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"


def _route(method: str, pattern: str) -> Callable[[Callable[..., _Answer]], Callable[..., _Answer]]:
    def register(answer: Callable[..., _Answer]) -> Callable[..., _Answer]:
        _ROUTES.append((method, re.compile(pattern), answer))
        return answer

    return register


class HubServer:
    """The server, as a context manager; at its end it releases held requests and closes every connection.

    Args:
        tokens: Token -> user. Users may write to the repositories under their own names.
        read_only: The tokens that may not write.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None, read_only: Collection[str] = ()):
        self.tokens = dict(tokens or {})
        self.read_only = frozenset(read_only)
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}  # sha256 -> content, of LFS
        self._repos: dict[tuple[str, str], Repo] = {}
        self._failures: list[_Failure] = []
        self._cuts: list[_Cut] = []
        self._holds: list[Hold] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for hold in self._holds:
            hold.release()
        self._server.close_connections()
        self._server.server_close()

    def repo(self, name: str, type: Literal["model", "dataset", "space"] = "model") -> Repo:
        """Return a repository, for a test to look into; raises KeyError if there is none."""
        return self._repos[type, name]

    def requests_to(self, method: str, path: str) -> list[Request]:
        """Return the answered requests in whose path the pattern `path` is found, in their order."""
        with self._lock:
            return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    def fail(
        self,
        status: int,
        path: str = "",
        method: str | None = None,
        times: int | None = 1,
        headers: Mapping[str, str] | None = None,
        body: str | None = None,
    ) -> None:
        """Answer the next `times` requests with `status` and change nothing; None stands for all until `mend`.

        Args:
            path: A pattern that must be found in the decoded path.
            method: Default: every method.
            headers: Such as Retry-After, X-Error-Code.
            body: Default: an error in JSON.
        """
        error = json.dumps({"error": f"the test made this fail with {status}"}) if body is None else body
        content_type = {"Content-Type": "application/json" if body is None else "text/plain"}
        answer = _Answer(status, error.encode(), {**content_type, **(headers or {})})
        with self._lock:
            self._failures.append(_Failure(path, method, times, answer))

    def cut(
        self,
        path: str = "",
        after_bytes: int = 0,
        times: int | None = 1,
        method: str | None = None,
        of: Literal["request", "response"] | None = None,
        reset: bool = False,
    ) -> None:
        """Close the connection of the next `times` requests after so many bytes of a body.

        Args:
            of: "request": the server reads so much, does nothing and answers nothing. "response": it does what was
                requested, and answers so much. Default: "request" for PUT, else "response".
            reset: Close as a broken connection does, not as a server closes in order. Clients tell them apart.
        """
        with self._lock:
            self._cuts.append(_Cut(path, method, times, after_bytes, of, reset))

    def hold(self, path: str = "", method: str | None = None) -> Hold:
        """Let matching requests wait, once their bodies are read, until the returned object is released."""
        with self._lock:
            self._holds.append(Hold(path, method))
            return self._holds[-1]

    def mend(self) -> None:
        """Forget all faults, and release all held requests."""
        with self._lock:
            self._failures.clear()
            self._cuts.clear()
            for hold in self._holds:
                hold.release()
            self._holds.clear()

    def _take(self, faults: list[_F], method: str, path: str) -> _F | None:
        """Return the first fault that matches, and count it as used once."""
        with self._lock:
            for fault in faults:
                if fault.times != 0 and fault.method in (None, method) and re.search(fault.path, path):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def _wait(self, method: str, path: str) -> None:
        with self._lock:
            holds = [hold for hold in self._holds if hold.method in (None, method) and re.search(hold.path, path)]
        for hold in holds:
            hold.entered.set()
            hold.released.wait()

    def _record(self, incoming: _Incoming, status: int | None) -> None:
        user = self.tokens.get(incoming.token or "")
        path = unquote(incoming.path)
        request = Request(incoming.method, path, incoming.query, incoming.headers, user, status)
        with self._lock:
            self.requests.append(request)

    def _answer(self, incoming: _Incoming) -> _Answer:
        failure = self._take(self._failures, incoming.method, unquote(incoming.path))
        if failure:
            return failure.answer
        method = "GET" if incoming.method == "HEAD" else incoming.method
        try:
            for known, pattern, answer in _ROUTES:
                match = pattern.fullmatch(incoming.path)
                if known == method and match:
                    parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    with self._lock:
                        return answer(self, incoming, **parts)
        except _RefusedError as refused:
            return refused.answer
        except Exception:
            return _json({"error": traceback.format_exc()}, 501)
        # The client tries again at 500, not at 501.
        return _json({"error": f"hub_server does not know {incoming.method} {incoming.path}"}, 501)

    def _user(self, incoming: _Incoming) -> str | None:
        if incoming.token is not None and incoming.token not in self.tokens:
            # Also where no token would do, and not as RepoNotFound: huggingface_hub's pull request 2847.
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(incoming.token or "")

    def _writer(self, incoming: _Incoming, namespace: str | None) -> str:
        user = self._user(incoming)
        if user is None:
            # The client makes a missing repository of any other 401 at https://.../api/models/..., at http of none.
            raise _RefusedError(401, "Invalid username or password.", "RepoNotFound")
        if incoming.token in self.read_only or namespace not in (None, user):
            raise _RefusedError(403, f"Forbidden: you don't have the rights to write under {namespace or user}")
        return user

    def _repo(self, incoming: _Incoming, type: str | None, name: str, write: bool = False) -> Repo:
        user = self._user(incoming)
        repo = self._repos.get(((type or "models").removesuffix("s"), name))
        namespace = name.split("/")[0]
        if repo is None or (repo.private and user != namespace):
            if user is None:
                raise _RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        if write:
            self._writer(incoming, namespace)
        return repo

    @_route("GET", "/api/whoami-v2")
    def _whoami(self, incoming: _Incoming) -> _Answer:
        user = self._user(incoming)
        if user is None:
            raise _RefusedError(401, "Invalid username or password.")
        role = "read" if incoming.token in self.read_only else "write"
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
        return _json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self, incoming: _Incoming) -> _Answer:
        block = re.match(r"---\n(.*?)\n---", incoming.json()["content"], re.DOTALL)
        metadata = yaml.safe_load(block[1] if block else "") or {}
        results = [r for model in metadata.get("model-index") or [] for r in model["results"]]
        types = [result["dataset"]["type"] for result in results]
        odd = [name for name in types if not re.fullmatch(r"([\w-]+/)?[\w.-]+", name, re.ASCII)]
        if odd:
            return _json({"errors": [{"message": f"dataset.type {odd[0]!r} fails to match the pattern"}]}, status=400)
        return _json({"errors": [], "warnings": []})

    @_route("POST", "/api/repos/create")
    def _create(self, incoming: _Incoming) -> _Answer:
        asked = incoming.json()
        user = self._writer(incoming, asked.get("organization"))
        type, name = asked.get("type") or "model", f"{user}/{asked['name']}"
        url = f"{self.url}/{'' if type == 'model' else type + 's/'}{name}"
        if (type, name) in self._repos:
            raise _RefusedError(409, f"You already created this {type} repo", url=url)
        if (type == "space") != ("sdk" in asked):
            raise _RefusedError(400, "a space, and only a space, needs an sdk")
        repo = self._repos[type, name] = Repo(name, type, _is_private(asked), asked.get("sdk"))
        repo.add("main", "initial commit", "", {".gitattributes": GIT_ATTRIBUTES}, frozenset())
        return _json({"url": url})

    @_route("DELETE", "/api/repos/delete")
    def _delete(self, incoming: _Incoming) -> _Answer:
        asked = incoming.json()
        user = self._writer(incoming, asked.get("organization"))
        repo = self._repo(incoming, (asked.get("type") or "model") + "s", f"{user}/{asked['name']}", write=True)
        del self._repos[repo.type, repo.id]
        return _json({})

    @_route("PUT", f"{_API}/settings")
    def _settings(self, incoming: _Incoming, type: str, name: str) -> _Answer:
        repo = self._repo(incoming, type, name, write=True)
        repo.private = _is_private(incoming.json(), repo.private)
        return _json({"private": repo.private})

    @_route("GET", f"{_API}(?:/revision/(?P<revision>[^/]+))?")
    def _info(self, incoming: _Incoming, type: str, name: str, revision: str | None) -> _Answer:
        repo = self._repo(incoming, type, name)
        commit = _commit(repo, revision or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs=" in incoming.query:
            for sibling in siblings:
                entry = _entry(commit, sibling["rfilename"])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    lfs = entry["lfs"]
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        dates = {"createdAt": DATE, "lastModified": DATE}
        state = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        sdk = {"sdk": repo.sdk} if repo.type == "space" else {}
        owner = {"id": repo.id, "author": repo.id.split("/")[0]}
        return _json({**owner, "sha": commit.oid, "siblings": siblings, **state, **dates, **sdk})

    @_route("GET", f"{_API}/refs")
    def _refs(self, incoming: _Incoming, type: str, name: str) -> _Answer:
        repo = self._repo(incoming, type, name)
        found = {
            kind: [{"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]
            for kind, place, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        return _json({**found, "converts": [], "pullRequests": []})

    @_route("GET", f"{_API}/commits/(?P<revision>[^/]+)")
    def _commits(self, incoming: _Incoming, type: str, name: str, revision: str) -> _Answer:
        repo = self._repo(incoming, type, name)
        found = [_commit(repo, revision)]
        while found[-1].parent is not None:
            found.append(repo.commit(found[-1].parent))
        author = [{"user": repo.id.split("/")[0]}]
        return _json(
            [{"id": c.oid, "title": c.title, "message": c.description, "authors": author, "date": DATE} for c in found]
        )

    @_route("POST", f"{_API}/super-squash/(?P<branch>[^/]+)")
    def _squash(self, incoming: _Incoming, type: str, name: str, branch: str) -> _Answer:
        repo = self._repo(incoming, type, name, write=True)
        head = _head(repo, branch)
        del repo.branches[branch]
        repo.add(branch, incoming.json().get("message", "squashed"), "", head.files, head.lfs)
        return _json({})

    @_route("POST", f"{_API}/branch/(?P<branch>[^/]+)")
    def _create_branch(self, incoming: _Incoming, type: str, name: str, branch: str) -> _Answer:
        repo = self._repo(incoming, type, name, write=True)
        if branch in repo.branches:
            raise _RefusedError(409, "Reference already exists")
        repo.branches[branch] = _commit(repo, incoming.json().get("startingPoint", "main")).oid
        return _json({})

    @_route("POST", f"{_API}/tag/(?P<revision>[^/]+)")
    def _create_tag(self, incoming: _Incoming, type: str, name: str, revision: str) -> _Answer:
        repo, tag = self._repo(incoming, type, name, write=True), incoming.json()["tag"]
        if tag in repo.tags:
            raise _RefusedError(409, "Tag reference exists already")
        repo.tags[tag] = _commit(repo, revision).oid
        return _json({})

    @_route("DELETE", f"{_API}/(?P<kind>branch|tag)/(?P<ref>[^/]+)")
    def _delete_ref(self, incoming: _Incoming, type: str, name: str, kind: str, ref: str) -> _Answer:
        repo = self._repo(incoming, type, name, write=True)
        refs = repo.branches if kind == "branch" else repo.tags
        if ref not in refs:
            raise _RefusedError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        del refs[ref]
        return _json({})

    @_route("GET", f"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def _tree(self, incoming: _Incoming, type: str, name: str, revision: str, path: str | None) -> _Answer:
        commit = _commit(self._repo(incoming, type, name), revision)
        entries = _entries(commit)
        if path and entries.get(path, {}).get("type") != "directory":
            raise _RefusedError(404, f'{path} does not exist on "{revision}"', "EntryNotFound", commit=commit.oid)
        prefix = f"{path}/" if path else ""
        below = [key for key in entries if key.startswith(prefix)]
        if parse_qs(incoming.query).get("recursive", ["false"])[0].lower() != "true":
            below = [key for key in below if "/" not in key.removeprefix(prefix)]
        return _json([entries[key] for key in below])

    @_route("POST", f"{_API}/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, incoming: _Incoming, type: str, name: str, revision: str) -> _Answer:
        entries = _entries(_commit(self._repo(incoming, type, name), revision))
        paths = parse_qs(incoming.body.decode()).get("paths", [])
        return _json([entries[path] for path in paths if path in entries])

    @_route("GET", f"{_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, incoming: _Incoming, type: str | None, name: str, revision: str, path: str) -> _Answer:
        commit = _commit(self._repo(incoming, type, name), revision)
        if path not in commit.files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound", commit=commit.oid)
        content, etag = commit.files[path], f'"{_content_oid(commit, path)}"'
        headers = {"X-Repo-Commit": commit.oid, "ETag": etag, "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        if path in commit.lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", incoming.headers.get("range", ""))
        if asked is None:
            return _Answer(200, content, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return _Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
        span = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return _Answer(206, content[start : end + 1], {**headers, **span})

    @_route("POST", f"{_API}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, incoming: _Incoming, type: str, name: str, revision: str) -> _Answer:
        commit = _head(self._repo(incoming, type, name, write=True), revision)
        files = []
        for asked in incoming.json()["files"]:
            path = asked["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or asked["size"] > LARGEST_REGULAR_BYTES
            known = {"oid": _content_oid(commit, path)} if path in commit.files else {}
            files.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, **known})
        return _json({"files": files})

    @_route("POST", rf"{_PAGE}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, incoming: _Incoming, type: str | None, name: str) -> _Answer:
        self._repo(incoming, type, name, write=True)
        verify = f"{self.url}{incoming.path.removesuffix('/batch')}/verify"
        objects = []
        for asked in incoming.json()["objects"]:
            actions = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}, "verify": {"href": verify}}
            objects.append({**asked, **({} if asked["oid"] in self.objects else {"actions": actions})})
        return _json({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def _lfs_upload(self, incoming: _Incoming, oid: str) -> _Answer:
        if hashlib.sha256(incoming.body).hexdigest() != oid:
            raise _RefusedError(400, "the content has another sha256")
        self.objects[oid] = incoming.body
        return _Answer()

    @_route("POST", rf"{_PAGE}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, incoming: _Incoming, type: str | None, name: str) -> _Answer:
        self._repo(incoming, type, name, write=True)
        asked = incoming.json()
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _RefusedError(404, "the object was not uploaded")
        return _json({})

    @_route("POST", f"{_API}/commit/(?P<revision>[^/]+)")
    def _send_commit(self, incoming: _Incoming, type: str, name: str, revision: str) -> _Answer:
        repo = self._repo(incoming, type, name, write=True)
        head = _head(repo, revision)
        files, lfs = dict(head.files), set(head.lfs)
        header: dict[str, Any] = {}
        for line in incoming.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
                if value.get("parentCommit", head.oid) != head.oid:
                    raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
                continue
            path = value["path"].rstrip("/")
            if key == "file":
                files[path] = base64.b64decode(value["content"], validate=True)
                lfs.discard(path)
            elif key == "lfsFile":
                content = self.objects.get(value["oid"])
                if content is None or value.get("size", len(content)) != len(content):
                    raise _RefusedError(400, f"the LFS object of {path} was not uploaded")
                files[path] = content
                lfs.add(path)
            elif key in ("deletedFile", "deletedFolder"):
                gone = {path} if key == "deletedFile" else {known for known in files if known.startswith(f"{path}/")}
                if not gone <= files.keys() or not gone:
                    raise _RefusedError(404, "A file with this name doesn't exist", "EntryNotFound", commit=head.oid)
                files = {known: content for known, content in files.items() if known not in gone}
                lfs -= gone
            else:
                raise _RefusedError(400, f"unknown key {key}")
        commit = repo.add(revision, header["summary"], header.get("description", ""), files, frozenset(lfs))
        prefix = "" if repo.type == "model" else f"{type}/"
        url = f"{self.url}/{prefix}{name}/commit/{commit.oid}"
        return _json({"commitUrl": url, "commitOid": commit.oid, "success": True})


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Answer:
    return _Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _blob_oid(content: bytes) -> str:
    """Return git's name of a file's content."""
    return _sha1(b"blob %d\0" % len(content) + content)


def _pointer(content: bytes) -> bytes:
    """Return what git holds in the place of a file in LFS."""
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()


def _content_oid(commit: Commit, path: str) -> str:
    """Return the sha256 of a file in LFS, or git's name of another; the client compares its own file with it."""
    content = commit.files[path]
    return hashlib.sha256(content).hexdigest() if path in commit.lfs else _blob_oid(content)


def _entry(commit: Commit, path: str) -> dict[str, Any]:
    content = commit.files[path]
    entry = {"type": "file", "path": path, "size": len(content)}
    if path not in commit.lfs:
        return {**entry, "oid": _blob_oid(content)}
    pointer = _pointer(content)
    lfs = {"oid": _content_oid(commit, path), "size": len(content), "pointerSize": len(pointer)}
    return {**entry, "oid": _blob_oid(pointer), "lfs": lfs}


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Return the files of a commit and the folders that they are in."""
    found = {path: _entry(commit, path) for path in commit.files}
    for path in commit.files:
        for i in [i for i, character in enumerate(path) if character == "/"]:
            found[path[:i]] = {"type": "directory", "path": path[:i], "size": 0, "oid": _sha1(path[:i].encode())}
    return dict(sorted(found.items()))


def _commit(repo: Repo, revision: str) -> Commit:
    try:
        return repo.commit(revision)
    except KeyError:
        raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None


def _head(repo: Repo, branch: str) -> Commit:
    """Return the head of a branch; nothing can be added to a tag or an oid."""
    return _commit(repo, repo.branches.get(branch, f"refs/heads/{branch}"))


def _is_private(asked: Mapping[str, Any], default: bool = False) -> bool:
    """Return the visibility that the client asked for: `visibility`, or `private` in its earlier versions."""
    if "visibility" in asked:
        return asked["visibility"] == "private"
    return bool(asked.get("private", default))


class _Server(ThreadingHTTPServer):
    # Their end is waited for, so that no thread outlives the server.
    daemon_threads = False

    def __init__(self, hub: HubServer):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().close_request(request)

    def close_connections(self) -> None:
        """Close the connections that clients keep open; at each, a thread waits for the next request."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed meanwhile

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, but not that a client was killed or gave up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of an answer waits 40 ms for the acknowledgment of its head

    @property
    def hub(self) -> HubServer:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        token = headers.get("authorization", "").removeprefix("Bearer ") or None
        incoming = _Incoming(self.command, url.path, url.query, headers, b"", token)
        cut = hub._take(hub._cuts, self.command, unquote(url.path))
        of = (cut.of or ("request" if self.command == "PUT" else "response")) if cut else None
        body = self.rfile.read(min(length, cut.after_bytes) if cut and of == "request" else length)
        hub._wait(self.command, unquote(url.path))
        if len(body) < length or of == "request":  # a client that was killed has not asked for anything
            hub._record(incoming, None)
            self.hang_up(cut is not None and cut.reset)
            return
        answer = hub._answer(_Incoming(self.command, url.path, url.query, headers, body, token))
        hub._record(incoming, answer.status)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: cut.after_bytes] if cut else answer.body)
        if cut:
            self.hang_up(cut.reset)

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = answer

    def hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


def client_environment(hub: HubServer, folder: Path, token: str | None = None) -> dict[str, str]:
    """Return the environment of a process whose Hub is `hub` and whose caches are in `folder`.

    huggingface_hub reads it when it is imported.
    """
    other_variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))
    }
    return {
        **other_variables,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_XET": "1",  # with it, no file is sent by LFS
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **{"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        **({"HF_TOKEN": token} if token else {}),
    }


def run_client(hub: HubServer, code: str, tmp_path: Path, token: str | None = None) -> str:
    """Return what `code` prints in a process of its own whose Hub is `hub`; a failure of it fails the test."""
    printed, complained = (tmp_path / f"{uuid4()}" for _ in range(2))
    process = python(["-c", code], tmp_path, client_environment(hub, tmp_path / "hf", token), printed, complained)
    process.start()
    process.join()
    said, errors = (path.read_text() for path in (printed, complained))
    for path in (printed, complained):
        path.unlink()
    assert process.exitcode == 0, errors
    return said
