"""The results of an evaluation, on the card and in evaluation.json: which stay, and which are replaced."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.data import image_folder
from hf_ddpm.evaluation import results as results_module
from hf_ddpm.evaluation.results import write_evaluation
from hf_ddpm.hub import card as cards
from hf_ddpm.hub.card_metadata import eval_results
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.errors import UnwrittenError
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.run_files import read_evaluation
from hf_ddpm.timesteps import SearchedTimesteps, write_searched
from tests.support import forks
from tests.support.evaluations import (
    ALL_METRICS,
    by_metric,
    files_in,
    results_in,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


@pytest.mark.slow
def test_evaluate_writes_results_on_the_card(run: Path, measure: Any, capsys: pytest.CaptureFixture[str]):
    measure(run, metrics=ALL_METRICS, num_inference_steps=[1, 3], schedulers=["ddpm", "unipc"])
    said = capsys.readouterr().err.splitlines()
    for line in ("split train of digits: 300 images, 8 x 8, channels 1", "split test of digits: 120 images, 8 x 8"):
        assert len([text for text in said if text.startswith(line)]) == 1
    card = ModelCard.load(run / "README.md")
    results = results_in(run)
    found = card.data.eval_results
    assert found == eval_results(results)
    assert len(found) == len(results) == 4 * 6 + 3
    assert {(r.metric_type, r.metric_value) for r in found} == {(row["metric"], row["value"]) for row in results}
    assert card.data.model_name == "run"
    for row in results:
        for text in cards.result_cells(row).values():
            assert text in card.text
    assert f"```bash\n{results[0]['command']}\n```" in card.text
    for name in ("steps.png", "seconds.png", "bound.png", "memorization.png"):
        assert f"(figures/{name})" in card.text
    # Where things lie is nobody's business.
    # The examples load the folder as long as no repository is known; nothing else names it.
    elsewhere = [line for line in card.content.splitlines() if "from_pretrained(" not in line]
    assert str(run.parent) not in "\n".join(elsewhere) + json.dumps(results)


@pytest.mark.slow
@pytest.mark.parametrize("num_failures", [1, 100])
def test_results_that_cannot_be_written_are_not_lost(
    run: Path, measure: Any, network_file: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int
):
    """The disk is full: for one write, after which all results are written with the next; or for good."""
    left, flush = num_failures, os.fsync

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    settings: dict[str, Any] = {"metrics": ["kid"], "num_inference_steps": [1, 2]}
    if num_failures == 1:
        assert measure(run, **settings)["results"] == results_in(run)
        assert len(results_in(run)) == 2
        return
    with pytest.raises(UnwrittenError, match=r"^2 of 2 results could not .*: \[Errno 28\] No space") as error:
        measure(run, **settings)
    assert [row["sampling"]["num_inference_steps"] for row in error.value.result["results"]] == [1, 2]
    assert not (run / "evaluation.json").exists()
    words = ["--metrics", "kid", "--num_inference_steps", "2", "--num_images", "40", "--network_path", network_file]
    done = CliRunner().invoke(app, ["evaluate", str(run), *map(str, words)])
    assert done.exit_code == 1
    assert "error: 1 of 1 results could not be written" in done.stderr
    assert "unipc, 2 steps" in done.stdout


@pytest.mark.slow
def test_command_leaves_out_schedulers_where_the_default_depends_on_steps(run: Path, measure: Any):
    found = SearchedTimesteps("dpmsolver++", (19, 12, 4), 0.1, 0.2, num_images=1, seed=0, reference_steps=10)
    write_searched(run, [found], weights_sha256(run))
    rows = measure(run, metrics=["kid"], num_inference_steps=[3, 4])["results"]
    cells = [(row["sampling"]["scheduler"], row["sampling"]["num_inference_steps"]) for row in rows]
    assert cells == [("dpmsolver++", 3), ("unipc", 4)]
    assert "--num_inference_steps 3,4" in rows[0]["command"]
    assert "--scheduler" not in rows[0]["command"]
    (row,) = measure(run, metrics=["kid"], num_inference_steps=[4])["results"]
    assert "--scheduler unipc" in row["command"]


@pytest.mark.slow
def test_command_leaves_out_steps_where_each_scheduler_has_its_own_default(run: Path, measure: Any):
    DDPMScheduler(30, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(
        run / "scheduler"
    )
    rows = measure(run, metrics=["kid"], schedulers=["ddpm", "unipc"], num_inference_steps=[])["results"]
    cells = [(row["sampling"]["scheduler"], row["sampling"]["num_inference_steps"]) for row in rows]
    assert cells == [("ddpm", 30), ("unipc", 20)]
    assert "--scheduler ddpm,unipc" in rows[0]["command"]
    assert "--num_inference_steps" not in rows[0]["command"]


@pytest.mark.slow
def test_results_without_a_dtype_count_as_fp32(run: Path, measure: Any):
    (row,) = measure(run, metrics=["kid"])["results"]
    content = json.loads((run / "evaluation.json").read_text())
    for name in ("dtype", "compile"):
        del content["results"][0]["sampling"][name]
    (run / "evaluation.json").write_text(json.dumps(content))
    assert cards.result_cells(content["results"][0]) == cards.result_cells(row)
    measure(run, metrics=["kid"], dtype="bf16")
    assert [r["sampling"].get("dtype") for r in results_in(run)] == [None, "bf16"]
    measure(run, metrics=["kid"])
    assert [r["sampling"]["dtype"] for r in results_in(run)] == ["bf16", "fp32"]


@pytest.mark.slow
def test_evaluate_keeps_what_the_author_wrote_on_the_card(run: Path, measure: Any):
    (run / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    measure(run, metrics=["kid"])
    card = ModelCard.load(run / "README.md")
    assert card.text.startswith("Mine.\n")
    assert card.data.license == "mit"
    assert [result.metric_value for result in card.data.eval_results] == [results_in(run)[0]["value"]]


@pytest.mark.slow
def test_evaluate_keeps_the_repository_that_the_card_names(run: Path, measure: Any):
    cards.write_card(run, "me/photos")
    measure(run, metrics=["kid"])
    assert cards.named_repository((run / "README.md").read_text(encoding="utf-8")) == "me/photos"


@pytest.mark.slow
def test_results_replace_only_those_measured_in_the_same_way(run: Path, measure: Any):
    first = measure(run, metrics=["kid", "nll"])["results"]
    measure(run, metrics=["kid"], num_inference_steps=[3])
    measure(run, metrics=["kid"], seed=1)
    kept = [results_in(run)[i] for i in (0, 2, 3)]
    again = measure(run, metrics=["kid"])["results"]
    assert [row["value"] for row in again] == [first[1]["value"]]
    assert results_in(run) == [*kept, *again]
    assert read_evaluation(run) == results_in(run)


def add_rows(folder: Path, name: str) -> None:
    """Write five results, each by itself."""
    data = {"name": "digits", "split": "test", "count": 9, "fingerprint": name}
    row = {"metric": "nll", "name": "Bits per dimension", "value": 3.0, "standard_error": 0.1, "num_compared": [9]}
    for seed in range(5):
        likelihood = {"num_images": 9, "timesteps_per_image": 1, "seed": seed}
        new = row | {"reference": data, "likelihood": likelihood, "command": "x"}
        write_evaluation(folder, weights_sha256(folder), [new])


@pytest.mark.slow
def test_evaluations_that_write_at_once_lose_no_results(run: Path):
    processes = [forks.Process(add_rows, (run, name)) for name in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    written = {(row["reference"]["fingerprint"], row["likelihood"]["seed"]) for row in results_in(run)}
    assert written == {(name, seed) for name in ("a", "b", "c") for seed in range(5)}


@pytest.mark.slow
def test_evaluation_lists_each_folder_once(run: Path, measure: Any, monkeypatch: pytest.MonkeyPatch):
    listed, list_anew = [], image_folder._list_images
    monkeypatch.setattr(image_folder, "_list_images", lambda folder: (listed.append(folder), list_anew(folder))[1])
    measure(run, metrics=["kid"])
    assert sorted(listed) == sorted(set(listed))


@pytest.mark.slow
def test_results_of_other_weights_are_removed(run: Path, measure: Any):
    measure(run, metrics=["kid", "nll"])
    assert "Bits per dimension" in (run / "README.md").read_text()
    pipeline = DDPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.5)
    pipeline.save_pretrained(run)
    assert read_evaluation(run) == []
    cards.write_card(run)
    text = (run / "README.md").read_text()
    assert "Bits per dimension" not in text
    assert "figures/bound.png" not in text
    (row,) = measure(run, metrics=["kid"])["results"]
    assert results_in(run) == [row]
    assert not (run / "figures" / "bound.png").exists()
    assert "KID" in (run / "README.md").read_text()


@pytest.mark.slow
def test_card_in_another_folder_keeps_the_model_name_that_it_has(run: Path, measure: Any):
    out = run.with_name("results")
    out.mkdir()
    cards.write_card(out, "me/photos")
    measure(run, metrics=["kid"], out=out)
    assert 'from_pretrained("me/photos")' in (out / "README.md").read_text()


@pytest.mark.slow
def test_results_record_the_number_of_neighbors(run: Path, measure: Any, digits: Path):
    rows = by_metric(measure(run, metrics=["precision"])["results"])
    assert {row["neighbors"] for row in rows.values()} == {5}
    old = results_in(run)
    for row in old:
        del row["neighbors"]  # as of before they were recorded
    content = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(content | {"results": old}))
    measure(run, metrics=["precision"])
    assert len(results_in(run)) == len(rows)


@pytest.mark.slow
def test_seconds_picture_shows_times_of_one_machine_alone(run: Path, measure: Any):
    measure(run, metrics=["kid"], num_inference_steps=[2])
    content = json.loads((run / "evaluation.json").read_text())
    assert content["results"][0]["sampling"]["device"] == device_name(torch.device("cpu"))
    content["results"][0]["sampling"]["device"] = "another"
    (run / "evaluation.json").write_text(json.dumps(content))
    measure(run, metrics=["kid"], num_inference_steps=[3])
    assert (run / "figures/steps.png").is_file()
    assert not (run / "figures/seconds.png").exists()
    measure(run, metrics=["kid"], num_inference_steps=[4])
    assert (run / "figures/seconds.png").is_file()
    content = json.loads((run / "evaluation.json").read_text())
    for row in content["results"]:
        row["sampling"]["device"] = "another"
    (run / "evaluation.json").write_text(json.dumps(content))
    measure(run, metrics=["kid"], num_inference_steps=[4])
    assert not (run / "figures/seconds.png").exists()


@pytest.mark.slow
def test_evaluate_leaves_files_alone_when_a_write_fails(run: Path, measure: Any, monkeypatch: pytest.MonkeyPatch):
    measure(run, metrics=["kid"])
    before = files_in(run)

    def full(path: Path, content: bytes | str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(results_module, "write_atomically", full)
    with pytest.raises(UnwrittenError, match="no space left"):
        measure(run, metrics=["kid"], seed=1)
    assert files_in(run) == before


def test_card_says_that_a_bound_is_not_finite(run: Path):
    row = {"metric": "nll", "name": "Bits per dimension", "value": None, "standard_error": None, "num_compared": [9]}
    row |= {"reference": {"name": "digits", "split": "test", "count": 9, "fingerprint": "ab"}, "command": "x"}
    row |= {"likelihood": {"timesteps_per_image": 20, "seed": 0}}
    write_evaluation(run, str(weights_sha256(run)), [row])
    card = ModelCard.load(run / "README.md")
    assert "| not finite |" in card.text
    assert card.data.eval_results is None
