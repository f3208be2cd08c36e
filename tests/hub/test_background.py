"""Pushes from the background: the newest state goes, failures are reported, and nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_ddpm.hub import background as background_module
from hf_ddpm.hub.upload import copy_for_upload, push
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.publishing import model_pusher
from tests.support.hub_runs import COMMIT, NAME, TOKEN, UPLOAD_WARNING
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


class RecordedPusher:
    """A Pusher and the lines that it printed; after each of them, the next commit is held."""

    def __init__(self, server: HubServer, folder: Path):
        self.server = server
        self.folder = folder
        self.lines: list[str] = []
        self.has_printed = threading.Event()
        config = TrainingConfig(push_to_hub=True, hub_model_id=NAME, hub_token=TOKEN)
        self.pusher = model_pusher(config, self.print_line)

    def print_line(self, text: str) -> None:
        self.lines.append(text)
        self.next_commit = self.server.hold(COMMIT)
        self.has_printed.set()

    def start(self, number: int) -> None:
        (self.folder / "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
        self.pusher.start(lambda: copy_for_upload(self.folder, parent=self.folder), f"push {number}")

    @property
    def titles(self) -> list[str]:
        return [commit.title for commit in self.server.repo(NAME).commits[1:]]


@pytest.fixture
def recorded(server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedPusher]:
    monkeypatch.setattr(background_module, "RETRY_PAUSES_SECONDS", (0.01,))
    recorded = RecordedPusher(server, run)
    yield recorded
    server.mend()
    recorded.pusher.close(60)
    assert not recorded.pusher._thread.is_alive()
    assert not list(run.glob("partial-*"))


@pytest.mark.slow
def test_pusher_sends_only_the_newest_state_and_never_blocks(recorded: RecordedPusher, server: HubServer):
    first = server.hold(COMMIT)
    recorded.start(1)
    assert first.entered.wait(60)
    recorded.start(2)
    recorded.start(3)
    assert len(list(recorded.folder.glob("partial-push-*"))) == 2  # on its way, and the newest
    assert recorded.titles == []
    second = server.hold(COMMIT)
    first.release()
    assert second.entered.wait(60)
    assert recorded.titles == ["push 1"]
    assert server.repo(NAME).files["metrics.jsonl"] == b'{"step": 1}\n'
    second.release()
    recorded.pusher.close(60)
    assert recorded.titles == ["push 1", "push 3"]
    assert server.repo(NAME).files["metrics.jsonl"] == b'{"step": 3}\n'
    assert recorded.lines == []


@pytest.mark.parametrize(("status", "is_transient"), [(503, True), (403, False)])
def test_pusher_reports_a_failure_and_retries_a_transient_one(
    recorded: RecordedPusher, server: HubServer, status: int, is_transient: bool
):
    server.fail(status, COMMIT)
    recorded.start(1)
    assert recorded.has_printed.wait(60)
    (text,) = recorded.lines
    assert text.startswith(f"the push of 'push 1' to {NAME} failed, training continues: ")
    assert text.endswith("It is tried again in 0.01 s") is is_transient
    assert TOKEN not in text
    if not is_transient:
        recorded.start(2)
    assert recorded.next_commit.entered.wait(60)
    recorded.next_commit.release()
    recorded.pusher.close(60)
    assert recorded.titles == ["push 1" if is_transient else "push 2"]


def test_pusher_close_without_time_does_not_wait(recorded: RecordedPusher, server: HubServer):
    hold = server.hold(COMMIT)
    recorded.start(1)
    assert hold.entered.wait(60)
    recorded.start(2)
    recorded.pusher.close(0)
    assert recorded.pusher._thread.is_alive()
    recorded.start(3)
    assert len(list(recorded.folder.glob("partial-push-*"))) == 1  # on its way
    hold.release()
    recorded.pusher._thread.join(60)
    assert recorded.titles == ["push 1"]


def test_copy_for_upload_leaves_nothing_if_a_file_is_damaged(recorded: RecordedPusher):
    (recorded.folder / "config.yaml").write_text("seed: [")
    for message, push_it in {
        "config.yaml cannot be read: while parsing": lambda: recorded.start(1),
        "config.yaml cannot be read: while": lambda: push(recorded.folder, NAME),
    }.items():
        with pytest.raises((OSError, UsageError), match=message):
            push_it()
        assert not list(recorded.folder.glob("partial-*"))
