"""The place of a checkpoint on the Hub: always whole, private, replaced, and without a trace of the machine."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from hf_ddpm.hub.checkpoints import copy_checkpoint, find_record, send_checkpoint
from hf_ddpm.runtime.errors import PushError, UsageError
from hf_ddpm.training.checkpoint import verify
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.hub_resume import resume_from_hub
from tests.support.hub_buckets import BucketServer
from tests.support.hub_checkpoints import PLACE, is_private, stored, stored_step, write_run
from tests.support.hub_runs import NAME, READER, TOKEN, UPLOAD_WARNING, contents, forget_connections, nowhere
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)
PATHS = ["train_data_dir", "model_config_name_or_path", "output_dir"]


@pytest.fixture
def settings(push_settings: dict[str, Any]) -> dict[str, Any]:
    return {**push_settings, "hub_strategy": "checkpoint"}


def send(folder: Path, step: int, replaces_newer: bool = False) -> None:
    files = copy_checkpoint(folder, f"checkpoint-{step}", PATHS)
    send_checkpoint(HfApi(), NAME, files, f"checkpoint-{step}", lambda: True, replaces_newer)


def resume(settings: dict[str, Any], folder: Path) -> list[str]:
    """Bring the checkpoint from the Hub into a folder, and return the lines that were printed."""
    lines: list[str] = []
    config = TrainingConfig(**{**settings, "output_dir": str(folder), "resume_from_checkpoint": "hub"})
    resume_from_hub(config, lines.append)
    return lines


@pytest.mark.slow
def test_checkpoint_replaces_the_one_before_it(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    folder = write_run(tmp_path / "run", 3, settings)
    send(folder, 3)
    assert is_private(hub)
    first = stored(hub)
    send(write_run(folder, 6, settings), 6)
    assert stored_step(hub) == 6
    files = stored(hub)
    assert not first.keys() & files.keys() - {"checkpoint.json"}
    assert b"weights 6" in files.values()
    assert b"picture 3" in files.values()
    if not isinstance(hub, BucketServer):
        assert hub.repo(PLACE).commit().parent is None  # no history keeps the one before
    send(folder, 6)  # as a run does that was killed before it learned that it had arrived
    assert stored(hub) == files


def test_upload_that_was_overtaken_replaces_nothing(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    """An abandoned thread, or a machine that was taken for dead, may still be sending."""
    folder = write_run(tmp_path / "run", 3, settings)
    files, wanted = copy_checkpoint(folder, "checkpoint-3", PATHS), iter([True, False])
    send(write_run(tmp_path / "first", 2, settings), 2)
    before = {name: content for name, content in stored(hub).items() if name.startswith(("checkpoint.json", "2-"))}
    with pytest.raises(PushError, match="a newer state goes in its place"):
        send_checkpoint(HfApi(), NAME, files, "checkpoint-3", lambda: next(wanted), False)
    assert before.items() <= stored(hub).items()
    assert (found := find_record(HfApi(), NAME)) is not None
    assert found[1].step == 2
    send(write_run(folder, 4, settings), 4)
    assert stored_step(hub) == 4  # and nothing of the others is left


def test_files_that_are_on_their_way_to_a_later_checkpoint_stay(
    bucket_server: BucketServer, settings: dict[str, Any], tmp_path: Path
):
    """Another process may be about to write its record."""
    content = tmp_path / "content"
    content.write_text("weights")
    HfApi().create_bucket(PLACE, private=True)
    HfApi().batch_bucket_files(PLACE, add=[(content, "5-abc/weights"), (content, "2-abc/weights")])
    send(write_run(tmp_path / "run", 3, settings), 3)
    assert "5-abc/weights" in stored(bucket_server)
    assert "2-abc/weights" not in stored(bucket_server)


@pytest.mark.slow
def test_uploaded_files_show_nothing_of_the_machine(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    began = f"step 2: {tmp_path}/pictures/hidden-name.png at t = 3"
    folder = write_run(tmp_path / "hidden-folder", 3, settings, bad_steps_began=began)
    for config in folder.rglob("config.*"):
        assert str(tmp_path) in config.read_text()
    send(folder, 3)
    traces = [str(tmp_path), "hidden", TOKEN, getpass.getuser(), Path(settings["train_data_dir"]).name]
    for name, content in stored(hub).items():
        assert not [trace for trace in traces if trace.encode() in content], name


@pytest.mark.parametrize(
    ("path", "status"),
    [("/preupload/", 403), ("^/lfs/", 403), ("/commit/", 403), ("/commit/", 412), ("/super-squash/", 403)],
)
def test_repository_keeps_the_last_whole_checkpoint(
    server: HubServer, settings: dict[str, Any], tmp_path: Path, path: str, status: int
):
    folder = write_run(tmp_path / "run", 3, settings)
    send(folder, 3)
    server.fail(status, path, times=None)
    with pytest.raises(PushError):
        send(write_run(folder, 6, settings), 6)
    assert stored_step(server) == (6 if path == "/super-squash/" else 3)
    server.mend()
    send(folder, 6)
    assert stored_step(server) == 6
    assert server.repo(PLACE).commit().parent is None


@pytest.mark.slow
@pytest.mark.parametrize("num_batches", [0, 1, 2])
def test_bucket_keeps_the_last_whole_checkpoint(
    bucket_server: BucketServer, settings: dict[str, Any], tmp_path: Path, num_batches: int
):
    """Its batches are: the files, checkpoint.json, and what is deleted."""
    folder = write_run(tmp_path / "run", 3, settings)
    send(folder, 3)
    bucket_server.pass_batches(num_batches)
    with pytest.raises(PushError):
        send(write_run(folder, 6, settings), 6)
    assert len(resume(settings, tmp_path / "other")) == 1
    expected = 6 if num_batches == 2 else 3
    assert verify(tmp_path / f"other/checkpoint-{expected}") is None
    bucket_server.pass_batches(None)
    send(folder, 6)
    assert stored_step(bucket_server) == 6


@pytest.mark.slow
def test_empty_folder_gets_all_that_a_run_needs(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    folder = write_run(tmp_path / "run", 3, settings)
    send(folder, 3)
    (line,) = resume(settings, tmp_path / "other")
    assert line.startswith(f"checkpoint-3 of {PLACE} is downloaded, ")
    here, there = contents(folder), contents(tmp_path / "other")
    copies = {name for name in here if name.startswith("partial-push-")}
    assert there.keys() - {".lock"} == here.keys() - copies
    changed = {"config.yaml", "checkpoint-3/unet/config.json", "checkpoint-3/manifest.json"}
    assert {name for name in there if there[name] != here.get(name)} == {*changed, ".lock"}
    assert verify(tmp_path / "other/checkpoint-3") is None
    assert f"train_data_dir: {settings['train_data_dir']}" in there["config.yaml"].decode()


@pytest.mark.slow
def test_newest_of_folder_and_hub_is_taken(server: HubServer, settings: dict[str, Any], tmp_path: Path):
    send(write_run(tmp_path / "run", 3, settings), 3)
    (line,) = resume(settings, write_run(tmp_path / "newer", 4, settings))
    assert f"is no older than checkpoint-3 of {PLACE}: the run resumes from it" in line
    assert not (tmp_path / "newer/checkpoint-3").exists()
    resume(settings, write_run(tmp_path / "older", 2, settings))
    assert verify(tmp_path / "older/checkpoint-3") is None
    damaged = write_run(tmp_path / "damaged", 3, settings)
    (damaged / "checkpoint-3/optimizer.safetensors").write_text("moments 4")
    resume(settings, damaged)
    assert verify(damaged / "checkpoint-3") is None


def test_interrupted_download_goes_on(server: HubServer, settings: dict[str, Any], tmp_path: Path):
    folder = write_run(tmp_path / "run", 3, settings)
    send(folder, 3)
    server.fail(403, "optimizer.safetensors$", method="GET", times=None)
    with pytest.raises(UsageError, match="resume_from_checkpoint hub cannot work: the token may not"):
        resume(settings, tmp_path / "other")
    assert {path.name for path in (tmp_path / "other").iterdir()} == {".lock", "partial-download"}
    server.mend()
    resume(settings, tmp_path / "other")
    assert len(server.requests_to("GET", "unet/diffusion_pytorch_model.safetensors$")) == 1
    assert not (tmp_path / "other/partial-download").exists()


def test_files_that_are_not_those_of_the_record_are_refused(
    server: HubServer, settings: dict[str, Any], tmp_path: Path
):
    send(write_run(tmp_path / "run", 3, settings), 3)
    files = server.repo(PLACE).files
    (name,) = [name for name in files if name.endswith("optimizer.safetensors")]
    files[name] = b"moments 4"
    with pytest.raises(UsageError, match=r"checkpoint-3/optimizer\.safetensors is not the file"):
        resume(settings, tmp_path / "other")
    files["checkpoint.json"] = files["checkpoint.json"].replace(b'"metrics.jsonl"', b'"../metrics.jsonl"')
    with pytest.raises(UsageError, match=rf"checkpoint\.json of {PLACE} cannot be read: it names files"):
        resume(settings, tmp_path / "other")
    assert {path.name for path in (tmp_path / "other").iterdir()} == {".lock"}


@pytest.mark.slow
def test_later_checkpoint_on_the_hub_is_not_replaced(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    send(write_run(tmp_path / "run", 6, settings), 6)
    other = write_run(tmp_path / "other", 3, settings)
    with pytest.raises(PushError, match=f"{PLACE} holds checkpoint-6, and checkpoints after step 3 would replace it"):
        send(other, 3)
    assert stored_step(hub) == 6
    send(other, 3, replaces_newer=True)
    assert stored_step(hub) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, f"seed was 0 in this run, got 1: {PLACE} is of another run"),
        ({"prediction_type": "epsilon"}, "prediction_type was v_prediction in this run, got epsilon"),
        ({"hub_model_id": "alice/other"}, "alice/other-checkpoint holds none, is not there, or the token may not see"),
        ({"hub_token": "hf_wrongsecret"}, "resume_from_checkpoint hub cannot work: the Hub does not accept the token"),
    ],
)
def test_resume_refuses_what_cannot_work(
    server: HubServer, settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
):
    send(write_run(tmp_path / "run", 3, settings), 3)
    with pytest.raises(UsageError, match=message) as error:
        resume({**settings, **changes}, tmp_path / "other")
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "other").exists()


def test_resume_says_that_the_hub_cannot_be_reached(
    server: HubServer, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = nowhere()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.url, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(UsageError, match=r"resume_from_checkpoint hub cannot work: http://127\.0\.0\.1:\d+ cannot be"):
        resume(settings, tmp_path / "other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_connections()
    with pytest.raises(UsageError, match="resume_from_checkpoint hub cannot work: HF_HUB_OFFLINE is set"):
        resume(settings, tmp_path / "other")


def test_place_must_be_private_and_writable(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    folder = write_run(tmp_path / "run", 3, settings)
    files = copy_checkpoint(folder, "checkpoint-3", PATHS)
    send(folder, 3)
    with pytest.raises(PushError, match=f"the token may not write to {PLACE}"):
        send_checkpoint(HfApi(token=READER), NAME, files, "checkpoint-3", lambda: True, False)
    if isinstance(hub, BucketServer):
        hub.buckets[PLACE].private = False
    else:
        hub.repo(PLACE).private = False
    with pytest.raises(PushError, match=f"{PLACE} must be private, as it holds a checkpoint, but it exists"):
        send(folder, 3)


@pytest.mark.slow
def test_abandoned_upload_replaces_nothing(hub: HubServer, settings: dict[str, Any], tmp_path: Path):
    folder = write_run(tmp_path / "run", 3, settings)
    send(folder, 3)
    files = copy_checkpoint(write_run(folder, 6, settings), "checkpoint-6", PATHS)
    with pytest.raises(PushError, match="a newer state goes in its place"):
        send_checkpoint(HfApi(), NAME, files, "checkpoint-6", lambda: False, False)
    assert stored_step(hub) == 3
    found = find_record(HfApi(), NAME)
    assert found is not None
    assert found[1].checkpoint == "checkpoint-3"
