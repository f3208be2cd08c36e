"""What reaches the Hub, what of it comes back, and what is said when the Hub or the network fails.

With the real client of huggingface_hub, in this process, and the Hub of hub_server.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app
from hf_ddpm.evaluation.features import NETWORKS
from hf_ddpm.hub import background as background_module
from hf_ddpm.hub import card, upload
from hf_ddpm.hub.background import Pusher
from hf_ddpm.hub.upload import KEPT_README, Pushed, push
from hf_ddpm.runtime.errors import PushError, UsageError
from hf_ddpm.runtime.files import sha256
from hf_ddpm.runtime.run_files import run_files
from hf_ddpm.timesteps import SearchedTimesteps, write_searched
from hf_ddpm.training import publishing
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.evaluation.test_evaluate import CallOfInception
from tests.support.hub_server import HubServer, client_environment
from tests.support.networks import tiny_unet_config

ROOT = Path(__file__).parents[2]
TOKEN, OTHER, READER = "hf_alicesecret", "hf_bobsecret", "hf_readersecret"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMMIT = "/commit/main$"
NAME = "alice/digits"

# huggingface_hub uploads with an argument of httpx that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process's client, which has alice's token and does not sleep between its attempts."""
    with HubServer(tokens={TOKEN: "alice", OTHER: "bob", READER: "alice"}, read_only=[READER]) as server:
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
        yield server
        forget_connections()


def forget_connections() -> None:
    """The client's; a test may have pointed it at another Hub."""
    (getattr(_http, "close_session", None) or _http.reset_sessions)()  # the latter before version 1


def save_model(folder: Path, seed: int = 0, scheduler: Any = None, **saved: Any) -> Path:
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(**tiny_unet_config(channels=1))
    if scheduler is None:
        scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        DDPMPipeline(unet, scheduler).save_pretrained(folder, **saved)
    else:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder, **saved)
    return folder


def save_run(folder: Path) -> Path:
    """A folder as training leaves it, with what must not be published beside what is."""
    save_model(folder)
    places = {"output_dir": str(folder), "train_data_dir": "/data/pictures", "cache_dir": "~/cache", "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(places))
    training = {"steps": 1200, "images": 76800}
    (folder / "run.json").write_text(json.dumps({"data": {"name": "/data/pictures"}, "training": training}))
    (folder / "metrics.jsonl").write_text('{"step": 1200, "images": 76800, "loss": 0.5}\n')
    hidden = ["optimizer.bin", "random_states_0.pkl", "unet/old.pt", ".env", "notes.txt", ".lock", "logs/events.1"]
    hidden += ["checkpoint-3/unet/diffusion_pytorch_model.safetensors", "checkpoint-3/optimizer.bin"]
    hidden += ["previews/step-0000003.png", "ema/snapshot-1.safetensors", "figures/raw.npy", "best/best.json"]
    for name in ("figures/samples.png", "figures/reverse.gif", *hidden):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(TOKEN.encode())
    (folder / "figures/samples.png").write_bytes(b"png")
    (folder / "figures/reverse.gif").write_bytes(b"gif")
    card.write_card(folder)
    return folder


ARRIVES = {
    *("README.md", "config.yaml", "run.json", "metrics.jsonl", "figures/samples.png", "figures/reverse.gif"),
    *("model_index.json", "unet/config.json", WEIGHTS, "scheduler/scheduler_config.json", ".gitattributes"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "digits")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(name: str, text: str, path: str = "README.md") -> None:
    """Somebody writes a file on the Hub."""
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=name)


def images(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=20, output_type="np").images


# What is pushed


def test_a_push_brings_what_is_listed_as_one_private_commit(server: HubServer, run: Path):
    (run / "unet/config.json").write_text(
        json.dumps(json.loads((run / "unet/config.json").read_text()) | {"_name_or_path": str(run / "unet")})
    )
    before = contents(run)
    pushed = push(run, "digits")
    repo = server.repo(NAME)
    assert repo.private
    assert repo.files.keys() == ARRIVES
    assert [commit.title for commit in repo.commits[1:]] == ["Step 1,200, 76,800 images"]
    assert pushed == Pushed(NAME, f"{server.url}/{NAME}", repo.branches["main"], is_new=True, kept_readme=False)
    for content in repo.files.values():
        assert not [word for word in (TOKEN, str(run.parent), "/data/", "~/cache") if word.encode() in content]
    places = {"train_data_dir": "pictures", "seed": 0}
    assert yaml.safe_load(repo.files["config.yaml"]) == places
    assert json.loads(repo.files["run.json"])["data"]["name"] == "pictures"
    after = contents(run)
    assert after.pop("README.md") == repo.files["README.md"]
    assert before.pop("README.md") != repo.files["README.md"]
    assert before == after
    assert card.named_repository((run / "README.md").read_text()) == NAME


def test_what_has_not_changed_is_not_pushed_again(server: HubServer, run: Path):
    first = push(run, "digits")
    again = push(run, NAME)
    assert (again.commit, again.is_new) == (first.commit, False)
    (run / "metrics.jsonl").write_text('{"step": 1300, "images": 83200}\n')
    changed = push(run, NAME, message="more")
    assert changed.is_new
    repo = server.repo(NAME)
    assert [commit.title for commit in repo.commits[2:]] == ["more"]
    assert repo.commits[2].parent == first.commit
    assert len(server.asked("PUT", "^/lfs/")) == 3  # weights and two pictures, once


def test_a_run_that_is_not_finished_says_the_step_of_its_last_line(server: HubServer, run: Path):
    (run / "run.json").unlink()
    push(run, "digits")
    assert server.repo(NAME).commit().title == "Step 1,200, 76,800 images"


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_keeps_its_visibility(server: HubServer, run: Path, public: bool):
    HfApi().create_repo(NAME, private=True)
    push(run, NAME, public=public)
    assert server.repo(NAME).private
    assert server.repo(NAME).files.keys() == ARRIVES


def test_nothing_goes_to_a_public_repository_unasked(server: HubServer, run: Path):
    push(run, NAME, public=True)
    assert not server.repo(NAME).private
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(PushError, match=r"must be private unless you ask .*--public; .* another name") as error:
        push(run, NAME)
    assert not error.value.is_transient
    assert len(server.repo(NAME).commits) == 2
    assert push(run, NAME, public=True).is_new


def test_what_cannot_be_published_is_refused_before_anything_is_asked(server: HubServer, run: Path, tmp_path: Path):
    bins = save_model(tmp_path / "bins", safe_serialization=False)
    (run / "config.yaml").write_text(f"hub_token: {TOKEN}")
    torch.manual_seed(0)
    foreign = diffusers.DDPMPipeline(diffusers.UNet2DModel(**tiny_unet_config()), DDPMScheduler())
    foreign.save_pretrained(tmp_path / "foreign")
    for folder, message in {
        tmp_path: "saved model",
        bins: "safetensors",
        run: "hub_token must not be published",
        tmp_path
        / "foreign": "scheduler of hf_ddpm.scheduler, which diffusers does not load: save .* hf_ddpm.DDPMPipeline",
    }.items():
        with pytest.raises(UsageError, match=message) as error:
            push(folder, NAME)
        assert TOKEN not in str(error.value)
    assert not server.requests


# READMEs and files of others


def test_what_was_written_around_our_part_stays(server: HubServer, run: Path):
    push(run, NAME)
    text = server.repo(NAME).files["README.md"].decode()
    edited = text.replace("---\n", "---\nlicense: mit\n", 1).replace(card.BEGIN, f"Above.\n\n{card.BEGIN}")
    edit(NAME, edited.replace("## How to use it", "## Replaced") + "\nBelow.\n")
    assert not push(run, NAME).kept_readme
    there = server.repo(NAME).files["README.md"].decode()
    assert card.own_text(there).split() == ["#", "digits", "Above.", "Below."]
    assert (ModelCard(there).data.license, "## How to use it" in there, "Replaced" in there) == ("mit", True, False)
    assert (run / "README.md").read_text() == there
    assert not push(run, NAME).is_new


@pytest.mark.parametrize("metadata", ["", "---\nlicense: mit\n---\n"])
def test_a_readme_that_was_written_by_hand_stays(server: HubServer, run: Path, metadata: str):
    HfApi().create_repo(NAME, private=True)
    edit(NAME, f"{metadata}# Mine\n\nOn a rainy day.\n")
    assert not push(run, NAME).kept_readme
    there = ModelCard(server.repo(NAME).files["README.md"].decode())
    assert card.own_text(str(there)) == "# Mine\n\nOn a rainy day."
    assert there.data.license == ("mit" if metadata else None)
    assert there.text.count(card.BEGIN) == 1


def test_metadata_that_were_written_on_the_hub_stay_without_a_text(server: HubServer, run: Path):
    HfApi().create_repo(NAME, private=True)
    edit(NAME, "---\nlicense: mit\n---\n# digits\n")
    (run / "README.md").write_text(f"{(run / 'README.md').read_text()}\nFrom here.\n")
    assert not push(run, NAME).kept_readme
    there = ModelCard(server.repo(NAME).files["README.md"].decode())
    assert there.data.license == "mit"
    assert "hf_ddpm" in there.data.tags
    assert card.own_text(str(there)).split() == ["#", "digits", "From", "here."]


def test_a_text_that_was_written_here_arrives_whatever_the_name_of_the_repository(server: HubServer, run: Path):
    push(run, "other")
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(f"{text}\nFrom here.\n")
    assert not push(run, "other").kept_readme
    assert "From here." in server.repo("alice/other").files["README.md"].decode()
    edit("alice/other", text.replace(card.BEGIN, f"Above.\n{card.BEGIN}"))
    (run / "README.md").write_text(text)
    assert not push(run, "other").kept_readme
    assert "Above." in (run / "README.md").read_text()


@pytest.mark.parametrize("text", [b"---\nlicense: [\n---\n# Mine\n", b"---\n- a\n---\n# Mine\n", b"\xff# Mine\n"])
def test_a_readme_that_cannot_be_read_is_left_alone(server: HubServer, run: Path, text: bytes):
    HfApi().create_repo(NAME, private=True)
    head = server.repo(NAME).commit()
    server.repo(NAME).add("main", "theirs", "", {**head.files, "README.md": text}, head.lfs)
    with pytest.raises(PushError, match=r"README.md of alice/digits .*correct it on the Hub") as error:
        push(run, NAME)
    assert not error.value.is_transient
    assert server.repo(NAME).files["README.md"] == text
    (run / "README.md").write_bytes(text)
    with pytest.raises(UsageError, match=r"README\.md cannot be read: .*: correct it, or delete it"):
        push(run, "other")
    assert not list(run.glob("partial-*"))


def test_of_two_texts_the_hubs_is_kept_there_and_ours_here(server: HubServer, run: Path):
    push(run, NAME)
    text = (run / "README.md").read_text()
    edit(NAME, f"{text}\nFrom there.\n")
    (run / "README.md").write_text(f"{text}\nFrom here.\n")
    done = CliRunner().invoke(app, ["push", str(run), NAME])
    assert (done.exit_code, KEPT_README in done.stderr) == (0, True)
    there, here = server.repo(NAME).files["README.md"].decode(), (run / "README.md").read_text()
    assert ("From there." in there, "From here." in there) == (True, False)
    assert ("From there." in here, "From here." in here) == (False, True)
    assert push(run, NAME).kept_readme


def test_what_contradicts_the_model_goes_and_what_others_added_stays(server: HubServer, run: Path):
    (run / "evaluation.json").write_text(json.dumps({"results": []}))
    push(run, NAME)
    for path in ("unet/diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin", "notes.txt", "figures/mine.png"):
        edit(NAME, "old", path)
    (run / "evaluation.json").unlink()
    push(run, NAME)
    assert server.repo(NAME).files.keys() == ARRIVES | {"notes.txt", "figures/mine.png"}


def test_a_run_that_goes_on_takes_what_was_of_its_older_weights_off_the_hub(server: HubServer, run: Path):
    (run / "evaluation.json").write_text(json.dumps({"weights_sha256": sha256(run / WEIGHTS), "results": []}))
    (run / "eval.jsonl").write_text("")
    push(run, "digits")
    assert {"evaluation.json", "run.json", "eval.jsonl"} <= server.repo("alice/digits").files.keys()
    (run / "run.json").unlink()
    (run / "eval.jsonl").unlink()
    save_model(run, seed=1)
    push(run, "digits")
    assert not {"evaluation.json", "run.json", "eval.jsonl"} & server.repo("alice/digits").files.keys()


def evaluate_with_pictures(run: Path) -> set[str]:
    (run / "evaluation.json").write_text(json.dumps({"weights_sha256": sha256(run / WEIGHTS), "results": []}))
    names = {f"figures/{name}.png" for name in ("steps", "seconds", "bound", "memorization")}
    for name in names:
        (run / name).write_bytes(b"of training images")
    return names | {"evaluation.json"}


def test_pictures_of_what_was_measured_are_of_the_weights_that_are_pushed(server: HubServer, run: Path):
    measured = evaluate_with_pictures(run)
    push(run, "digits")
    assert measured <= server.repo("alice/digits").files.keys()
    save_model(run, seed=1)
    push(run, "digits")
    assert not measured & server.repo("alice/digits").files.keys()
    measured = evaluate_with_pictures(run)
    (run / "evaluation.json").unlink()
    push(run, "digits")
    assert not measured & server.repo("alice/digits").files.keys()


def test_a_run_that_is_deleted_takes_what_was_measured_with_it(run: Path):
    measured = evaluate_with_pictures(run)
    assert measured <= {path.relative_to(run).as_posix() for path in run_files(run)}


def test_searched_timesteps_are_of_the_weights_that_are_pushed(run: Path):
    found = SearchedTimesteps("ddim", (19, 3), 0.1, 0.2, num_images=2, seed=0, reference_steps=10)
    write_searched(run, [found], sha256(run / WEIGHTS))
    save_model(run / "ema/std-0.1", 1)
    assert (upload.stage(run) / "scheduler/searched_timesteps.json").is_file()
    assert not (upload.stage(run, model=run / "ema/std-0.1") / "scheduler/searched_timesteps.json").exists()
    average = run / "ema/std-0.1"
    write_searched(average, [found], sha256(average / WEIGHTS))
    assert (upload.stage(run, model=average) / "scheduler/searched_timesteps.json").is_file()
    save_model(run, seed=1)
    assert not (upload.stage(run) / "scheduler/searched_timesteps.json").exists()


def test_a_folder_with_any_name_can_be_measured_and_pushed(server: HubServer, run: Path):
    reference = {"name": "my photos (größer)", "split": "train", "count": 9, "fingerprint": "f"}
    result = {"metric": "kid", "name": "KID", "value": 0.1, "num_compared": [9, 9], "command": "evaluate"}
    result |= {"network": None, "reference": reference}
    result |= {"sampling": {"scheduler": "ddpm", "num_inference_steps": 3, "seed": 0}}
    weights = card.weights_sha256(run)
    (run / "evaluation.json").write_text(json.dumps({"weights_sha256": weights, "results": [result]}))
    push(run, NAME)
    results = ModelCard(server.repo(NAME).files["README.md"].decode()).data.eval_results
    assert results is not None
    assert (results[0].dataset_type, results[0].dataset_name) == ("my-photos-gr-er-f", "my photos (größer)")


def test_the_card_of_an_average_is_of_that_average(server: HubServer, run: Path):
    settings = {"use_ema": True, "ema_halflife_images": [50.0, 1e6, 50.5], "ema_inv_gamma": 1.0, "ema_power": 0.75}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    save_model(run / "ema/halflife-1e+06", 1)
    save_model(run / "ema/halflife-50.5", 1)
    save_model(run / "ema/std-0.1", 2)
    (run / "ema/std-0.1/average.json").write_text('{"std": 0.1, "images": 38400}')
    push(run, NAME, averages=True)
    repo = server.repo(NAME)
    row = "| Averaged weights (EMA) | "
    assert f"{row}half-life 50 images" in repo.files["README.md"].decode()
    assert f"{row}half-life 1,000,000 images" in repo.commit("halflife-1e+06").files["README.md"].decode()
    assert repo.commit("halflife-50.5").files["average.json"] == b'{"halflife_images": 50.5}\n'
    text = repo.commit("std-0.1").files["README.md"].decode()
    assert f"{row}a power of the images seen, std 0.1 of them |" in text
    assert "| Optimizer steps | 1,200 |" in repo.files["README.md"].decode()
    assert "| Optimizer steps |" not in text


def test_a_preview_is_of_the_weights_that_are_pushed(run: Path, tmp_path: Path):
    (tmp_path / "preview.png").write_bytes(b"newer")
    files = upload.stage(run, preview=tmp_path / "preview.png")
    assert (files / "figures/samples.png").read_bytes() == b"newer"


def test_a_model_in_the_cache_of_the_hub_can_be_pushed(server: HubServer, run: Path, tmp_path: Path):
    (tmp_path / "blob").write_bytes((run / WEIGHTS).read_bytes())
    (run / WEIGHTS).unlink()
    (run / WEIGHTS).symlink_to("../../blob")
    push(run, "digits")
    assert server.repo("alice/digits").files[WEIGHTS] == (tmp_path / "blob").read_bytes()


def test_a_state_that_is_not_wanted_any_more_makes_no_commit(server: HubServer, run: Path):
    push(run, "digits")
    save_model(run, seed=1)
    with pytest.raises(PushError, match="a newer state goes in its place"):
        upload.commit(HfApi(), upload.stage(run), "alice/digits", "main", "old", is_wanted=lambda: False)
    assert len(server.repo("alice/digits").commits) == 2


def test_what_is_written_here_while_a_push_goes_on_stays(server: HubServer, run: Path):
    hold = server.hold("/commit/")
    pushing = threading.Thread(target=push, args=(run, "digits"))
    pushing.start()
    assert hold.entered.wait(60)
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(f"{text}\nWritten meanwhile.\n")
    hold.release()
    pushing.join()
    assert (run / "README.md").read_text().endswith("\nWritten meanwhile.\n")
    assert '"alice/digits"' in (run / "README.md").read_text()


def test_each_average_is_a_branch(server: HubServer, run: Path):
    averages = {"halflife-50": 1, "std-0.1": 2}
    for name, seed in averages.items():
        save_model(run / "ema" / name, seed)
    result = {"metric": "kid", "name": "KID", "value": 0.123456, "num_compared": [9, 9], "command": "evaluate"}
    result |= {"network": None, "reference": {"name": "r", "split": "train", "count": 9, "fingerprint": "f"}}
    result |= {"sampling": {"scheduler": "ddpm", "num_inference_steps": 3, "seed": 0}}
    weights = card.weights_sha256(run)
    (run / "evaluation.json").write_text(json.dumps({"weights_sha256": weights, "results": [result]}))
    push(run, NAME, averages=True)
    repo = server.repo(NAME)
    assert repo.branches.keys() == {"main", *averages}
    assert "0.1235" in repo.files["README.md"].decode()
    for name in averages:
        files = repo.commit(name).files
        assert files[WEIGHTS] == (run / "ema" / name / WEIGHTS).read_bytes() != repo.files[WEIGHTS]
        text = files["README.md"].decode()
        assert f'from_pretrained("{NAME}", revision="{name}")' in text
        assert f'from_pretrained("{NAME}")' not in text
        assert "evaluation.json" not in files
        assert "0.1235" not in text
        assert ModelCard(text).data.eval_results is None
        loaded = DDPMPipeline.from_pretrained(NAME, revision=name).unet.state_dict()
        expected = load_file(run / "ema" / name / WEIGHTS)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert card.named_repository((run / "README.md").read_text()) == NAME
    number = len(repo.commits)
    push(run, NAME, averages=True)
    assert len(repo.commits) == number


def test_a_branch_leaves_main_alone(server: HubServer, run: Path):
    HfApi().create_repo(NAME, private=True)
    before = server.repo(NAME).files
    for _ in range(2):
        push(run, NAME, revision="dev")
    assert server.repo(NAME).files == before
    assert server.repo(NAME).commit("dev").files.keys() == ARRIVES
    assert len(server.repo(NAME).commits) == 2


# Faults


def fails(status: int, path: str = COMMIT, times: int | None = None, **headers: str) -> Callable[[HubServer], None]:
    return lambda server: server.fail(status, path, times=times, headers=headers)


def nothing(server: HubServer) -> None:
    pass


REFUSALS: dict[str, tuple[str, Callable[[HubServer], None], str, bool]] = {
    "no token": ("", nothing, "there is no token: hf auth login, or HF_TOKEN", False),
    "401": ("hf_wrongsecret", nothing, "wrong or expired, hf auth login makes a new one", False),
    "401 later": (TOKEN, fails(401), "wrong or expired, hf auth login makes a new one", False),
    "403": (READER, nothing, "may not write to .*: give one with write access, or another name", False),
    "403 other": (OTHER, nothing, "may not write to alice/digits: give", False),
    "404": (TOKEN, fails(404, "/preupload/"), "alice/digits is not there, or the token may not see it", False),
    "409": (TOKEN, fails(409), "alice/digits is taken by something else: give another", False),
    "412": (TOKEN, fails(412, times=3), "others are committing to alice/digits at the same time", True),
    "413": (TOKEN, fails(413), "larger than the Hub's limits", False),
    "429": (TOKEN, fails(429), "the Hub asks for fewer requests", True),
    "500": (TOKEN, fails(500), "the Hub has an error of its own", True),
    "503": (TOKEN, fails(503, "^/lfs/"), "the Hub has an error of its own", True),
    "503 at once": (TOKEN, fails(503, "/repos/create$"), "the Hub has an error of its own", True),
    "400": (TOKEN, fails(400), "the Hub refuses what was sent to alice/digits", False),
    "cut": (
        *(TOKEN, lambda server: server.cut("^/lfs/", after_bytes=1000, times=None)),
        *("cannot be reached, or the connection broke", True),
    ),
    "newline": (TOKEN + "\n", nothing, "the connection broke", True),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("is_given", [False, True], ids=["environment", "argument"])
def test_a_refusal_says_what_to_do(
    server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_given: bool
):
    token, fault, text, is_transient = REFUSALS[name]
    if is_given:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    fault(server)
    before = contents(run)
    if name == "newline" and not is_given:
        assert push(run, NAME).is_new  # the client strips it there
        return
    with pytest.raises(PushError, match=text) as error:
        push(run, NAME, token=token or None if is_given else None)
    assert error.value.is_transient is is_transient
    assert "secret" not in f"{error.value} {error.value!r}"
    assert contents(run) == before
    if name not in ("no token", "401", "403", "403 other", "503 at once", "newline"):
        assert len(server.repo(NAME).commits) == 1
    server.mend()
    assert push(run, NAME, token=TOKEN).is_new


@pytest.mark.parametrize(
    ("name", "text"), [("a b", "'a b' cannot name a repository"), ("a/b/c", "'a/b/c' cannot name a repository")]
)
def test_a_name_that_is_none(server: HubServer, run: Path, name: str, text: str):
    with pytest.raises(PushError, match=text) as error:
        push(run, name)
    assert not error.value.is_transient
    assert not server.asked("POST", "")


def test_offline_and_unreachable(server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = CliRunner().invoke(app, ["push", str(run), NAME])
    assert (done.exit_code, done.stderr) == (1, "error: HF_HUB_OFFLINE is set: unset it, and push again\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere())
    with pytest.raises(PushError, match=r"http://127.0.0.1:\d+ cannot be reached") as error:
        push(run, NAME)
    assert error.value.is_transient
    assert not server.requests
    assert not list(run.glob("partial-*"))


def nowhere() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_push_whose_answer_was_lost_is_not_made_twice(server: HubServer, run: Path):
    server.cut(COMMIT)
    with pytest.raises(PushError, match="the connection broke") as error:
        push(run, NAME)
    assert error.value.is_transient
    assert len(server.repo(NAME).commits) == 2
    again = push(run, NAME)
    assert (again.is_new, len(server.repo(NAME).commits)) == (False, 2)


def test_an_upload_that_broke_once_goes_on(server: HubServer, run: Path):
    server.cut("^/lfs/", after_bytes=1000)
    assert push(run, NAME).is_new
    assert server.repo(NAME).files[WEIGHTS] == (run / WEIGHTS).read_bytes()


def test_what_somebody_commits_in_between_is_kept(server: HubServer, run: Path):
    push(run, NAME)
    (run / "metrics.jsonl").write_text("{}\n")
    hold = server.hold(COMMIT)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(push(run, NAME)))
    thread.start()
    assert hold.entered.wait(60)
    head, files = server.repo(NAME).commit(), server.repo(NAME).files
    readme = files["README.md"].replace(card.END.encode(), f"{card.END}\n\nIn between.".encode())
    server.repo(NAME).add("main", "other", "", {**files, "notes.txt": b"mine", "README.md": readme}, head.lfs)
    hold.release()
    thread.join()
    assert done[0].is_new
    assert [request.status for request in server.asked("POST", COMMIT)] == [200, 412, 200]
    now = server.repo(NAME).files
    assert (now["notes.txt"], now["metrics.jsonl"]) == (b"mine", b"{}\n")
    assert b"In between." in now["README.md"]


# In the background


class Background:
    """A Pusher, what it said, and a held commit after each failure that it said."""

    def __init__(self, server: HubServer, folder: Path):
        self.server, self.folder, self.said, self.told = server, folder, [], threading.Event()
        self.pusher = Pusher(folder, NAME, TOKEN, "main", False, self.say)

    def say(self, text: str) -> None:
        self.said.append(text)
        self.next = self.server.hold(COMMIT)
        self.told.set()

    def start(self, number: int) -> None:
        (self.folder / "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
        self.pusher.start(f"push {number}")

    @property
    def titles(self) -> list[str]:
        return [commit.title for commit in self.server.repo(NAME).commits[1:]]


@pytest.fixture
def background(server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    monkeypatch.setattr(background_module, "PAUSES_SECONDS", (0.01,))
    found = Background(server, run)
    yield found
    server.mend()
    found.pusher.close(60)
    assert not found.pusher._thread.is_alive()
    assert not list(run.glob("partial-*"))


def test_the_newest_state_goes_and_nobody_waits(background: Background, server: HubServer):
    first = server.hold(COMMIT)
    background.start(1)
    assert first.entered.wait(60)
    background.start(2)
    background.start(3)
    assert len(list(background.folder.glob("partial-push-*"))) == 2  # on its way, and the newest
    assert background.titles == []
    second = server.hold(COMMIT)
    first.release()
    assert second.entered.wait(60)
    assert background.titles == ["push 1"]
    assert server.repo(NAME).files["metrics.jsonl"] == b'{"step": 1}\n'
    second.release()
    background.pusher.close(60)
    assert background.titles == ["push 1", "push 3"]
    assert server.repo(NAME).files["metrics.jsonl"] == b'{"step": 3}\n'
    assert background.said == []


@pytest.mark.parametrize(("status", "is_passing"), [(503, True), (403, False)])
def test_a_failure_is_said_and_what_can_arrive_later_does(
    background: Background, server: HubServer, status: int, is_transient: bool
):
    server.fail(status, COMMIT)
    background.start(1)
    assert background.told.wait(60)
    (text,) = background.said
    assert text.startswith(f"the push of 'push 1' to {NAME} failed, training goes on: ")
    assert text.endswith("It is tried again in 0.01 s") is is_transient
    assert TOKEN not in text
    if not is_transient:
        background.start(2)
    assert background.next.entered.wait(60)
    background.next.release()
    background.pusher.close(60)
    assert background.titles == ["push 1" if is_transient else "push 2"]


def test_an_end_that_does_not_wait(background: Background, server: HubServer):
    hold = server.hold(COMMIT)
    background.start(1)
    assert hold.entered.wait(60)
    background.start(2)
    background.pusher.close(0)
    assert background.pusher._thread.is_alive()
    background.start(3)
    assert len(list(background.folder.glob("partial-push-*"))) == 1  # on its way
    hold.release()
    background.pusher._thread.join(60)
    assert background.titles == ["push 1"]


def test_no_folder_that_can_go_is_listed(run: Path):
    """In a process of its own: an audit hook hears by whatever name `Path.glob` lists, and cannot be taken away."""
    (run / "partial-push-1-another").mkdir()
    code = """
        import sys
        from pathlib import Path
        from hf_ddpm.hub.upload import stage
        listed = set()
        sys.addaudithook(lambda event, given: listed.add(Path(given[0]).name) if event == "os.scandir" else None)
        stage(Path(sys.argv[1]))
        print(*listed)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code), run], check=True, capture_output=True, text=True)
    listed = done.stdout.split()
    assert "unet" in listed
    assert set(listed) <= {run.name, "unet", "scheduler", "figures"}


def test_files_that_cannot_be_copied_leave_none(background: Background):
    (background.folder / "config.yaml").write_text("seed: [")
    for message, push_it in {
        "config.yaml cannot be read: while parsing": lambda: background.start(1),
        "config.yaml cannot be read: while": lambda: push(background.folder, NAME),
    }.items():
        with pytest.raises((OSError, UsageError), match=message):
            push_it()
        assert not list(background.folder.glob("partial-*"))


# In training


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "PAUSES_SECONDS", (0.01,))
    monkeypatch.setattr(publishing, "LAST_PAUSES_SECONDS", (0.0, 0.0))


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_settings, "push_to_hub": True, "hub_model_id": NAME, "ema_snapshots": 0}


def test_a_training_is_pushed_and_writes_no_token(server: HubServer, settings: dict[str, Any], tmp_path: Path):
    settings |= {"hub_token": TOKEN, "logger": "tensorboard", "ema_halflife_images": "10 100", "hub_averages": True}
    flags = [part for name, value in settings.items() for part in (f"--{name}", *str(value).split(" "))]
    environment = client_environment(server, tmp_path / "hf") | {"PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*launch, str(ROOT / "train_accelerate.py"), *flags],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    repo = server.repo(NAME)
    titles = [commit.title for commit in repo.commits[1:]]
    assert titles[-2:] == ["Step 6, 24 images", "Step 6, 24 images, the average halflife-100"]
    assert set(titles[:-2]) <= {"Step 3, 12 images"}
    assert repo.private
    assert repo.files.keys() >= ARRIVES
    assert repo.branches.keys() == {"main", "halflife-100"}
    assert f"{server.url}/{NAME}: {repo.branches['main'][:12]}" in done.stderr
    run = Path(settings["output_dir"])
    assert repo.files[WEIGHTS] == (run / WEIGHTS).read_bytes()
    written = contents(tmp_path)
    assert any("events.out" in name for name in written)
    assert [name for name, content in written.items() if TOKEN.encode() in content] == []
    assert TOKEN not in done.stdout + done.stderr
    for content in repo.files.values():
        assert str(tmp_path).encode() not in content
    assert not list(run.glob("partial-*"))


def test_a_hub_that_fails_costs_nothing_that_was_trained(
    server: HubServer, settings: dict[str, Any], quick: None, capsys: pytest.CaptureFixture[str]
):
    server.fail(500, "/commit/", times=None)
    config = TrainingConfig(**settings, hub_revision="dev", hub_averages=True, ema_halflife_images=[10, 100])
    train(config)
    run = Path(config.output_dir)
    said = capsys.readouterr().err
    command = f"hf-ddpm push {run} {NAME} --revision dev --averages"
    assert f"the model is whole in '{run}', but was not pushed: the Hub has an error of its own" in said
    assert f"{command} does it later" in said
    assert len(server.asked("POST", "/commit/dev$")) >= 3
    DDPMPipeline.from_pretrained(run)
    server.mend()
    done = CliRunner().invoke(app, command.split()[1:])
    assert done.exit_code == 0, done.output
    assert server.repo(NAME).commit("dev").files[WEIGHTS] == (run / WEIGHTS).read_bytes()
    assert server.repo(NAME).branches.keys() == {"main", "dev", "halflife-100"}


def test_a_push_that_is_on_its_way_when_training_ends_arrives_first(
    server: HubServer, settings: dict[str, Any], quick: None
):
    hold = server.hold(COMMIT)
    thread = threading.Thread(target=lambda: (hold.entered.wait(60), hold.release()))
    thread.start()
    train(TrainingConfig(**settings))
    thread.join()
    titles = [commit.title for commit in server.repo(NAME).commits[1:]]
    assert titles in (["Step 3, 12 images", "Step 6, 24 images"], ["Step 6, 24 images"])


@pytest.mark.parametrize("before", [False, True], ids=["new", "overwritten"])
def test_a_wrong_token_is_refused_before_anything_is_written(
    server: HubServer, settings: dict[str, Any], run: Path, before: bool
):
    config = TrainingConfig(**settings, hub_token="hf_wrongsecret", overwrite_output_dir=before)
    if before:
        shutil.move(run, config.output_dir)
        there = contents(Path(config.output_dir))
    with pytest.raises(UsageError, match="push_to_hub cannot work: the Hub does not accept the token") as error:
        train(config)
    assert "secret" not in str(error.value)
    assert contents(Path(config.output_dir)) == there if before else not Path(config.output_dir).exists()


def test_training_begins_without_a_network(
    server: HubServer, settings: dict[str, Any], quick: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(constants, "ENDPOINT", nowhere())
    config = TrainingConfig(**settings)
    train(config)
    said = capsys.readouterr().err
    assert f"nothing can be pushed to {NAME} yet, training begins nonetheless: http://127.0.0.1" in said
    assert f"hf-ddpm push {config.output_dir} {NAME} does it later" in said
    assert (Path(config.output_dir) / WEIGHTS).is_file()


# Back again

LOAD = """
import os, sys
sys.modules["hf_ddpm"] = None  # importing it raises ImportError
import diffusers, numpy, torch
torch.set_num_threads(1)
name, out = sys.argv[1:]
for loader in (diffusers.DDPMPipeline, diffusers.DiffusionPipeline):
    pipeline = loader.from_pretrained(name)
    assert type(pipeline) is diffusers.DDPMPipeline and type(pipeline.scheduler) is diffusers.DDPMScheduler
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, generator=generator, num_inference_steps=20, output_type="np").images
    numpy.save(f"{out}/{loader.__name__}.npy", images)
for dtype in (torch.float16, torch.bfloat16):
    assert loader.from_pretrained(name, torch_dtype=dtype).unet.dtype is dtype
"""


def load(environment: dict[str, str], out: Path) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", LOAD, NAME, str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # its successor is too new
def test_stock_and_we_load_a_private_repository(server: HubServer, run: Path, tmp_path: Path, monkeypatch: Any):
    push(run, NAME)
    index = json.loads(server.repo(NAME).files["model_index.json"])
    assert {name: part for name, part in index.items() if not name.startswith("_")} == {
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    assert index["_class_name"] == "DDPMPipeline"
    assert not [name for name in server.repo(NAME).files if name.endswith((".py", ".bin", ".pkl"))]
    pipeline = DDPMPipeline.from_pretrained(NAME)
    assert type(pipeline.scheduler) is DDPMScheduler
    expected = images(pipeline)
    for dtype in (torch.float16, torch.bfloat16):
        assert DDPMPipeline.from_pretrained(NAME, torch_dtype=dtype).unet.dtype is dtype
    environment = client_environment(server, tmp_path / "stock", TOKEN)
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": nowhere()}):
        done = load(environment | more, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        for loader in ("DDPMPipeline", "DiffusionPipeline"):
            path = tmp_path / "out" / f"{loader}.npy"
            assert np.array_equal(np.load(path), expected)
            path.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_connections()
    assert np.array_equal(images(DDPMPipeline.from_pretrained(NAME)), expected)


def test_a_private_repository_is_for_those_who_may_see_it(server: HubServer, run: Path, tmp_path: Path, monkeypatch):
    push(run, NAME)
    for token in ("", OTHER):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache{token}"))
        with pytest.raises(OSError, match="digits"):
            DDPMPipeline.from_pretrained(NAME)
        done = CliRunner().invoke(app, ["sample", NAME, "--out", str(tmp_path / "images")])
        assert done.exit_code == 2
        assert "it is not on the Hub, or private, which needs hf auth login" in done.stderr
        assert not (tmp_path / "images").exists()


# Repositories of others


def stock_scheduler() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(
        20, beta_start=0.005, beta_end=0.9, beta_schedule="linear", variance_type="fixed_large"
    )


@pytest.fixture(params=["folders", "flat"])
def foreign(server: HubServer, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """What stock wrote, with weights as a pickle, on the Hub as bob/stock; `flat` as it was in its early days."""
    folder = save_model(tmp_path / "stock", scheduler=stock_scheduler(), safe_serialization=False)
    if request.param == "flat":
        for part in ("unet", "scheduler"):
            for path in (folder / part).iterdir():
                path.rename(folder / path.name)
            (folder / part).rmdir()
    api = HfApi(token=OTHER)
    api.create_repo("bob/stock")
    api.upload_folder(repo_id="bob/stock", folder_path=folder)
    assert not list(folder.rglob("*.safetensors"))
    return folder


def test_a_stock_repository_is_sampled_and_trained_further(
    foreign: Path, settings: dict[str, Any], tmp_path: Path, image_folder: Path
):
    expected = images(diffusers.DDPMPipeline.from_pretrained(foreign))
    pipeline = DDPMPipeline.from_pretrained("bob/stock")
    assert type(pipeline.scheduler) is DDPMScheduler
    assert np.array_equal(images(pipeline), expected)
    count = ["--num_images", "2", "--num_inference_steps", "3"]
    done = CliRunner().invoke(app, ["sample", "bob/stock", "--out", str(tmp_path / "images"), *count])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    del settings["model_config_name_or_path"], settings["ddpm_num_steps"]
    train(TrainingConfig(**{**settings, "init_from": "bob/stock", "push_to_hub": False, "hub_model_id": None}))
    run = Path(settings["output_dir"])
    assert ModelCard.load(run / "README.md").data.base_model == "bob/stock"
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["prediction_type"], written["ddpm_beta_schedule"]) == ("epsilon", "linear")


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")
def test_a_stock_repository_is_measured(foreign: Path, image_folder: Path, tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "inception.pt"
    torch.jit.script(CallOfInception()).save(str(path))
    monkeypatch.setitem(NETWORKS, "inception", replace(NETWORKS["inception"], sha256=sha256(path)))
    flags = ["--metrics", "kid", "--dataset_name", str(image_folder), "--cache_dir", str(tmp_path / "cache")]
    flags += ["--num_images", "8", "--num_inference_steps", "2", "--network", "inception"]
    out = tmp_path / "measured"
    command = ["evaluate", "bob/stock", *flags, "--network_path", str(path), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [row["metric"] for row in json.loads((out / "evaluation.json").read_text())["results"]] == ["kid"]


class Executes:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_not_executed(foreign: Path, settings: dict[str, Any], tmp_path: Path):
    path = next(foreign.rglob("*.bin"))
    executed = tmp_path / "executed"
    path.write_bytes(pickle.dumps({"conv_in.weight": Executes(executed)}))
    torch.save({"conv_in.weight": Executes(executed)}, tmp_path / "zip.bin")
    for content in (path.read_bytes(), (tmp_path / "zip.bin").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(path.name)):
            DDPMPipeline.from_pretrained(foreign)
        assert CliRunner().invoke(app, ["sample", str(foreign), "--out", str(tmp_path / "o")]).exit_code == 1
        assert not executed.exists()
    del settings["model_config_name_or_path"], settings["ddpm_num_steps"]
    with pytest.raises((OSError, UsageError)):
        train(TrainingConfig(**{**settings, "init_from": str(foreign), "push_to_hub": False, "hub_model_id": None}))
    assert not executed.exists()
    assert not Path(settings["output_dir"]).exists()
