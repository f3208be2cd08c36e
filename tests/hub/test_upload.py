"""What reaches the Hub, with the real client of huggingface_hub, in this process, and the Hub of hub_server."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import diffusers
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.hub.readme import named_repository
from hf_ddpm.hub.upload import Pushed, commit, copy_for_upload, push
from hf_ddpm.runtime.errors import PushError, UsageError
from hf_ddpm.runtime.files import sha256, weights_sha256
from hf_ddpm.timesteps import SearchedTimesteps, write_searched
from tests.support.forks import python
from tests.support.hub_runs import (
    ARRIVES,
    NAME,
    TOKEN,
    UPLOAD_WARNING,
    WEIGHTS,
    contents,
    edit_on_hub,
    evaluate_with_pictures,
    save_model,
)
from tests.support.hub_server import HubServer
from tests.support.networks import tiny_unet_config

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


def test_push_uploads_the_listed_files_as_one_private_commit(server: HubServer, run: Path):
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
    assert named_repository((run / "README.md").read_text()) == NAME


@pytest.mark.slow
def test_push_makes_no_commit_if_nothing_changed(server: HubServer, run: Path):
    first = push(run, "digits")
    again = push(run, NAME)
    assert (again.commit, again.is_new) == (first.commit, False)
    (run / "metrics.jsonl").write_text('{"step": 1300, "images": 83200}\n')
    changed = push(run, NAME, message="more")
    assert changed.is_new
    repo = server.repo(NAME)
    assert [commit.title for commit in repo.commits[2:]] == ["more"]
    assert repo.commits[2].parent == first.commit
    assert len(server.requests_to("PUT", "^/lfs/")) == 3  # weights and two pictures, once


def test_commit_of_an_unfinished_run_names_the_step_of_its_last_line(server: HubServer, run: Path):
    (run / "run.json").unlink()
    push(run, "digits")
    assert server.repo(NAME).commit().title == "Step 1,200, 76,800 images"


@pytest.mark.parametrize("public", [False, True])
def test_push_keeps_the_visibility_of_a_repository(server: HubServer, run: Path, public: bool):
    HfApi().create_repo(NAME, private=True)
    push(run, NAME, public=public)
    assert server.repo(NAME).private
    assert server.repo(NAME).files.keys() == ARRIVES


@pytest.mark.slow
def test_push_refuses_a_public_repository_unless_asked(server: HubServer, run: Path):
    push(run, NAME, public=True)
    assert not server.repo(NAME).private
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(PushError, match=r"must be private unless you ask .*--public; .* another name") as error:
        push(run, NAME)
    assert not error.value.is_transient
    assert len(server.repo(NAME).commits) == 2
    assert push(run, NAME, public=True).is_new


def test_push_refuses_unpublishable_folders_before_any_request(server: HubServer, run: Path, tmp_path: Path):
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


@pytest.mark.slow
def test_push_deletes_files_that_contradict_the_model_and_keeps_those_of_others(server: HubServer, run: Path):
    (run / "evaluation.json").write_text(json.dumps({"results": []}))
    push(run, NAME)
    for path in ("unet/diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin", "notes.txt", "figures/mine.png"):
        edit_on_hub(NAME, "old", path)
    (run / "evaluation.json").unlink()
    push(run, NAME)
    assert server.repo(NAME).files.keys() == ARRIVES | {"notes.txt", "figures/mine.png"}


@pytest.mark.slow
def test_push_of_a_resumed_run_deletes_what_described_older_weights(server: HubServer, run: Path):
    (run / "evaluation.json").write_text(json.dumps({"weights_sha256": sha256(run / WEIGHTS), "results": []}))
    (run / "eval.jsonl").write_text("")
    push(run, "digits")
    assert {"evaluation.json", "run.json", "eval.jsonl"} <= server.repo("alice/digits").files.keys()
    (run / "run.json").unlink()
    (run / "eval.jsonl").unlink()
    save_model(run, seed=1)
    push(run, "digits")
    assert not {"evaluation.json", "run.json", "eval.jsonl"} & server.repo("alice/digits").files.keys()


@pytest.mark.slow
def test_push_leaves_out_evaluation_pictures_of_other_weights(server: HubServer, run: Path):
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


def test_copy_for_upload_leaves_out_searched_timesteps_of_other_weights(run: Path):
    found = SearchedTimesteps("ddim", (19, 3), 0.1, 0.2, num_images=2, seed=0, reference_steps=10)
    write_searched(run, [found], sha256(run / WEIGHTS))
    save_model(run / "ema/std-0.1", 1)
    assert (copy_for_upload(run) / "scheduler/searched_timesteps.json").is_file()
    assert not (copy_for_upload(run, model=run / "ema/std-0.1") / "scheduler/searched_timesteps.json").exists()
    average = run / "ema/std-0.1"
    write_searched(average, [found], sha256(average / WEIGHTS))
    assert (copy_for_upload(run, model=average) / "scheduler/searched_timesteps.json").is_file()
    save_model(run, seed=1)
    assert not (copy_for_upload(run) / "scheduler/searched_timesteps.json").exists()


def test_push_accepts_results_of_a_dataset_with_any_name(server: HubServer, run: Path):
    reference = {"name": "my photos (größer)", "split": "train", "count": 9, "fingerprint": "f"}
    result = {"metric": "kid", "name": "KID", "value": 0.1, "num_compared": [9, 9], "command": "evaluate"}
    result |= {"network": None, "reference": reference}
    result |= {"sampling": {"scheduler": "ddpm", "num_inference_steps": 3, "seed": 0}}
    weights = weights_sha256(run)
    (run / "evaluation.json").write_text(json.dumps({"weights_sha256": weights, "results": [result]}))
    push(run, NAME)
    results = ModelCard(server.repo(NAME).files["README.md"].decode()).data.eval_results
    assert results is not None
    assert (results[0].dataset_type, results[0].dataset_name) == ("my-photos-gr-er-f", "my photos (größer)")


@pytest.mark.slow
def test_card_of_an_average_describes_that_average(server: HubServer, run: Path):
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


def test_copy_for_upload_takes_the_preview_as_samples(run: Path, tmp_path: Path):
    (tmp_path / "preview.png").write_bytes(b"newer")
    files = copy_for_upload(run, preview=tmp_path / "preview.png")
    assert (files / "figures/samples.png").read_bytes() == b"newer"


def test_push_follows_the_symbolic_links_of_the_hub_cache(server: HubServer, run: Path, tmp_path: Path):
    (tmp_path / "blob").write_bytes((run / WEIGHTS).read_bytes())
    (run / WEIGHTS).unlink()
    (run / WEIGHTS).symlink_to("../../blob")
    push(run, "digits")
    assert server.repo("alice/digits").files[WEIGHTS] == (tmp_path / "blob").read_bytes()


@pytest.mark.slow
def test_commit_is_not_made_if_it_is_not_wanted_any_more(server: HubServer, run: Path):
    push(run, "digits")
    save_model(run, seed=1)
    with pytest.raises(PushError, match="a newer state goes in its place"):
        commit(HfApi(), copy_for_upload(run), "alice/digits", "main", "old", still_wanted=lambda: False)
    assert len(server.repo("alice/digits").commits) == 2


@pytest.mark.slow
def test_push_uploads_each_average_as_a_branch(server: HubServer, run: Path):
    averages = {"halflife-50": 1, "std-0.1": 2}
    for name, seed in averages.items():
        save_model(run / "ema" / name, seed)
    result = {"metric": "kid", "name": "KID", "value": 0.123456, "num_compared": [9, 9], "command": "evaluate"}
    result |= {"network": None, "reference": {"name": "r", "split": "train", "count": 9, "fingerprint": "f"}}
    result |= {"sampling": {"scheduler": "ddpm", "num_inference_steps": 3, "seed": 0}}
    weights = weights_sha256(run)
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
    assert named_repository((run / "README.md").read_text()) == NAME
    number = len(repo.commits)
    push(run, NAME, averages=True)
    assert len(repo.commits) == number


@pytest.mark.slow
def test_push_to_a_branch_leaves_main_alone(server: HubServer, run: Path):
    HfApi().create_repo(NAME, private=True)
    before = server.repo(NAME).files
    for _ in range(2):
        push(run, NAME, revision="dev")
    assert server.repo(NAME).files == before
    assert server.repo(NAME).commit("dev").files.keys() == ARRIVES
    assert len(server.repo(NAME).commits) == 2


@pytest.mark.slow
def test_copy_for_upload_lists_no_folder_that_may_vanish(run: Path):
    """In a process of its own: an audit hook hears by whatever name `Path.glob` lists, and cannot be taken away."""
    (run / "partial-push-1-another").mkdir()
    code = """
        import sys
        from pathlib import Path
        from hf_ddpm.hub.upload import copy_for_upload
        listed = set()
        sys.addaudithook(lambda event, given: listed.add(Path(given[0]).name) if event == "os.scandir" else None)
        copy_for_upload(Path(sys.argv[1]))
        print(*listed)
    """
    process = python(["-c", dedent(code), str(run)], run.parent, None, run.with_name("listed.txt"))
    process.start()
    process.join()
    listed = run.with_name("listed.txt").read_text().split()
    assert process.exitcode == 0, listed
    assert "unet" in listed
    assert set(listed) <= {run.name, "unet", "scheduler", "figures"}
