"""A Hub on this machine, and runs to push to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

from hf_ddpm.hub import background
from hf_ddpm.training import publishing
from tests.support.hub_buckets import BucketServer
from tests.support.hub_runs import NAME, OTHER, READER, TOKEN, forget_connections, save_run
from tests.support.hub_server import HubServer, client_environment

TOKENS: dict[str, Any] = {"tokens": {TOKEN: "alice", OTHER: "bob", READER: "alice"}, "read_only": [READER]}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process's client, which has alice's token and does not sleep between its attempts."""
    server = HubServer(**TOKENS)
    with server, client_of(server, tmp_path, monkeypatch):
        yield server


@pytest.fixture
def bucket_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """The same with buckets and Xet, which need huggingface_hub 2 and hf-xet."""
    if not hasattr(HfApi, "batch_bucket_files") or find_spec("hf_xet") is None:
        pytest.skip("buckets need huggingface_hub 2 and hf-xet")
    server = BucketServer(**TOKENS)
    with server, client_of(server, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        yield server


@pytest.fixture(params=["repository", "bucket"])
def hub(request: pytest.FixtureRequest) -> HubServer:
    """A Hub whose client puts checkpoints into a repository, and one whose client puts them into a bucket."""
    return request.getfixturevalue("server" if request.param == "repository" else "bucket_server")


@contextmanager
def client_of(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process's client take a server for the Hub."""
    for name, value in client_environment(server, tmp_path / "hf", TOKEN).items():
        monkeypatch.setenv(name, value)
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(tmp_path / "hf/hub"),
        "HF_TOKEN_PATH": str(tmp_path / "hf/token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
    forget_connections()
    yield
    forget_connections()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "digits")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_PAUSES_SECONDS", (0.01,))
    for module in (background, publishing):
        monkeypatch.setattr(module, "FINAL_RETRY_PAUSES_SECONDS", (0.0, 0.0))


@pytest.fixture
def push_settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_settings, "push_to_hub": True, "hub_model_id": NAME, "ema_snapshots": 0}
