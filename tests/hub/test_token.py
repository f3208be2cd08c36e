"""A token that no request can carry is named before anything is sent, and never shown."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.hub.download import find_model
from hf_ddpm.hub.space import push_space
from hf_ddpm.hub.token import check_token
from hf_ddpm.hub.upload import copy_for_upload, push
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.publishing import model_pusher
from tests.support.hub_runs import NAME, UPLOAD_WARNING
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)
ODD = {"\u200b": r"U\+200B \(ZERO WIDTH SPACE\)", "\u00a0": r"U\+00A0 \(NO-BREAK SPACE\)", "\u2019": r"U\+2019"}
ODD |= {" ": r"U\+0020 \(SPACE\)", "\n": r"U\+000A \(a control character\)", "\u0131": r"U\+0131"}


def odd_token(character: str) -> str:
    return f"hf_alice{character}secret"


@pytest.mark.parametrize("character", ODD)
def test_token_with_a_character_that_no_header_carries_is_refused(character, monkeypatch):
    for given in (odd_token(character), None):
        monkeypatch.setenv("HF_TOKEN", odd_token(character))
        if given is None and character == "\n":
            return  # huggingface_hub takes it out of the environment's
        origin = "HF_TOKEN" if given is None else "the token that was given"
        with pytest.raises(
            UsageError, match=rf"^{origin} must .* got {ODD[character]}.* as character 9 of 15"
        ) as error:
            check_token(given)
        assert "alice" not in str(error.value)
        assert "secret" not in str(error.value)


def test_token_of_a_login_is_named_as_such(server: HubServer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(odd_token("\u200b"))
    with pytest.raises(UsageError, match=r"^the token of hf auth login must"):
        check_token()
    path.write_text("hf_alicesecret")
    check_token()


@pytest.mark.parametrize(
    "command",
    [
        ["push", "RUN", NAME],
        ["sample", NAME, "--out", "OUT/samples"],
        ["evaluate", NAME, "--dataset_name", "digits"],
        ["info", NAME],
        ["train", "--dataset_name", "alice/pictures", "--output_dir", "OUT/run"],
        ["train", "--init_from", NAME, "--output_dir", "OUT/run"],
        ["train", "--push_to_hub", "--output_dir", "OUT/run"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_command_names_what_is_wrong_with_the_token(server, run, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HF_TOKEN", odd_token("\u200b"))
    words = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in command]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert "error: HF_TOKEN must consist of" in done.output
    assert "secret" not in done.output
    assert "alice\u200b" not in done.output
    assert not server.requests
    assert not (tmp_path / "out").exists()


def test_python_names_what_is_wrong_with_the_token(server, run, tiny_settings: dict[str, Any], monkeypatch):
    token = odd_token("\u200b")
    config = TrainingConfig(**tiny_settings, push_to_hub=True, hub_model_id=NAME, hub_token=token)
    calls = [lambda: push(run, NAME, token=token), lambda: train(config)]
    for call in calls:
        with pytest.raises(UsageError, match="the token that was given must consist of"):
            call()
    monkeypatch.setenv("HF_TOKEN", token)
    for call in (lambda: push(run, NAME), lambda: find_model(NAME), lambda: push_space(run, "alice/page", NAME)):
        with pytest.raises(UsageError, match="HF_TOKEN must consist of"):
            call()
    assert not server.requests


def test_failure_in_the_background_shows_no_token(server, run, short_pauses):
    """Nothing checks the token there: the error is the client's own."""
    lines: queue.Queue[str] = queue.Queue()
    config = TrainingConfig(push_to_hub=True, hub_model_id=NAME, hub_token=odd_token("\u200b"))
    pusher = model_pusher(config, lines.put)
    pusher.start(lambda: copy_for_upload(run, parent=run), "a push")
    line = lines.get(timeout=60)
    pusher.close(60)
    assert "the connection broke" in line
    assert "secret" not in line
