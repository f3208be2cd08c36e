"""What a push says and leaves behind when the Hub or the network fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.hub.readme import END
from hf_ddpm.hub.upload import push
from hf_ddpm.runtime.errors import PushError
from tests.support.hub_runs import COMMIT, NAME, OTHER, READER, TOKEN, UPLOAD_WARNING, WEIGHTS, contents, nowhere
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


def failing(status: int, path: str = COMMIT, times: int | None = None, **headers: str) -> Callable[[HubServer], None]:
    return lambda server: server.fail(status, path, times=times, headers=headers)


def nothing(server: HubServer) -> None:
    pass


REFUSALS: dict[str, tuple[str, Callable[[HubServer], None], str, bool]] = {
    "no token": ("", nothing, "there is no token: hf auth login, or HF_TOKEN", False),
    "401": ("hf_wrongsecret", nothing, "wrong or expired, hf auth login makes a new one", False),
    "401 later": (TOKEN, failing(401), "wrong or expired, hf auth login makes a new one", False),
    "403": (READER, nothing, "may not write to .*: give one with write access, or another name", False),
    "403 other": (OTHER, nothing, "may not write to alice/digits: give", False),
    "404": (TOKEN, failing(404, "/preupload/"), "alice/digits is not there, or the token may not see it", False),
    "409": (TOKEN, failing(409), "alice/digits is taken by something else: give another", False),
    "412": (TOKEN, failing(412, times=3), "others are committing to alice/digits at the same time", True),
    "413": (TOKEN, failing(413), "larger than the Hub's limits", False),
    "429": (TOKEN, failing(429), "the Hub asks for fewer requests", True),
    "500": (TOKEN, failing(500), "the Hub has an error of its own", True),
    "503": (TOKEN, failing(503, "^/lfs/"), "the Hub has an error of its own", True),
    "503 at once": (TOKEN, failing(503, "/repos/create$"), "the Hub has an error of its own", True),
    "400": (TOKEN, failing(400), "the Hub refuses what was sent to alice/digits", False),
    "cut": (
        *(TOKEN, lambda server: server.cut("^/lfs/", after_bytes=1000, times=None)),
        *("cannot be reached, or the connection broke", True),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("is_given", [False, True], ids=["environment", "argument"])
def test_push_explains_a_refusal(
    server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_given: bool
):
    token, fault, text, is_transient = REFUSALS[name]
    if is_given:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    fault(server)
    before = contents(run)
    with pytest.raises(PushError, match=text) as error:
        push(run, NAME, token=token or None if is_given else None)
    assert error.value.is_transient is is_transient
    assert "secret" not in f"{error.value} {error.value!r}"
    assert contents(run) == before
    if name not in ("no token", "401", "403", "403 other", "503 at once"):
        assert len(server.repo(NAME).commits) == 1
    server.mend()
    assert push(run, NAME, token=TOKEN).is_new


@pytest.mark.parametrize(
    ("name", "text"), [("a b", "'a b' cannot name a repository"), ("a/b/c", "'a/b/c' cannot name a repository")]
)
def test_push_rejects_invalid_repo_id(server: HubServer, run: Path, name: str, text: str):
    with pytest.raises(PushError, match=text) as error:
        push(run, name)
    assert not error.value.is_transient
    assert not server.requests_to("POST", "")


def test_push_explains_that_the_hub_cannot_be_reached(server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = CliRunner().invoke(app, ["push", str(run), NAME])
    assert (done.exit_code, done.stderr) == (1, "error: HF_HUB_OFFLINE is set: unset it, and try again\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere())
    with pytest.raises(PushError, match=r"http://127.0.0.1:\d+ cannot be reached") as error:
        push(run, NAME)
    assert error.value.is_transient
    assert not server.requests
    assert not list(run.glob("partial-*"))


@pytest.mark.slow
def test_push_makes_no_second_commit_after_a_lost_answer(server: HubServer, run: Path):
    server.cut(COMMIT)
    with pytest.raises(PushError, match="the connection broke") as error:
        push(run, NAME)
    assert error.value.is_transient
    assert len(server.repo(NAME).commits) == 2
    again = push(run, NAME)
    assert (again.is_new, len(server.repo(NAME).commits)) == (False, 2)


def test_push_continues_an_upload_that_broke_once(server: HubServer, run: Path):
    server.cut("^/lfs/", after_bytes=1000)
    assert push(run, NAME).is_new
    assert server.repo(NAME).files[WEIGHTS] == (run / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_push_keeps_what_somebody_commits_in_between(server: HubServer, run: Path):
    push(run, NAME)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    hold = server.hold(COMMIT)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(push(run, NAME)))
    thread.start()
    assert hold.entered.wait(60)
    head, files = server.repo(NAME).commit(), server.repo(NAME).files
    readme = files["README.md"].replace(END.encode(), f"{END}\n\nIn between.".encode())
    server.repo(NAME).add("main", "other", "", {**files, "notes.txt": b"mine", "README.md": readme}, head.lfs)
    hold.release()
    thread.join()
    assert done[0].is_new
    assert [request.status for request in server.requests_to("POST", COMMIT)] == [200, 412, 200]
    now = server.repo(NAME).files
    assert (now["notes.txt"], now["metrics.jsonl"]) == (b"mine", b'{"step": 1}\n')
    assert b"In between." in now["README.md"]
