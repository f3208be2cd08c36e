"""Results of `hf-ddpm evaluate` on the card and in its metadata, as long as they are of the weights in the folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_ddpm.hub.card import _method_cell, write_card
from hf_ddpm.hub.card_metadata import _dataset_type, eval_results
from hf_ddpm.runtime.run_files import read_evaluation
from tests.support.cards import COPIES, RESULT, assert_no_trace_of_absence, card_of, make_run, write_results


def test_guided_results_say_how_they_were_guided():
    guidance = {"scale": 2.0, "interval": [0.2, None], "method": "apg", "weaker": "0123456789"}
    row = {"sampling": {"scheduler": "unipc", "num_inference_steps": 20, "guidance": guidance}}
    expected = "unipc, 20 steps, guidance 2 from sigma 0.2 by apg, weaker model 0123456"
    assert _method_cell(row) == expected
    guidance |= {"autoguidance_scale": 1.5}
    assert _method_cell(row) == "unipc, 20 steps, guidance 2 from sigma 0.2 by apg, autoguidance 1.5 by 0123456"


@pytest.mark.slow
def test_card_claims_no_evaluation_until_there_is_one(tmp_path: Path):
    none, copies = "No quality metric has been measured", "not been measured whether the model repeats images"
    card = card_of(tmp_path)
    assert none in card
    assert copies in card
    for content in ("{}", '{"results": []}'):
        (tmp_path / "evaluation.json").write_text(content)
        assert card_of(tmp_path) == card
    write_results(tmp_path, RESULT)
    assert none not in card_of(tmp_path)
    assert copies in card_of(tmp_path)
    write_results(tmp_path, COPIES)
    assert none not in card_of(tmp_path)
    assert copies not in card_of(tmp_path)


def test_results_are_on_the_card_and_in_its_metadata(tmp_path: Path):
    other = COPIES | {"command": "hf-ddpm evaluate photos --seed 1", "real_vs_real": None, "standard_error": None}
    make_run(tmp_path)
    write_results(tmp_path, RESULT, other)
    (tmp_path / "figures" / "steps.png").write_bytes(b"")
    card = write_card(tmp_path).read_text(encoding="utf-8")
    row = "| KID | 0.0123 ± 0.0012 | 0.0001 (test against train, 4,000 against 4,000) | 5,000 against 10,000 |"
    assert f"{row} inception, 299 px | some\\|one, train, 60,000 | ddim, 50 steps | 7 |\n" in card
    assert "| Near | 0.01235 |  | 5,000 against 10,000 |" in card
    for text in ("- Near: so many\n", f"```bash\n{other['command']}\n```", "(figures/steps.png)"):
        assert text in card
    assert "(figures/seconds.png)" not in card
    assert_no_trace_of_absence(card)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert results is not None
    assert [r.metric_value for r in results] == [RESULT["value"]] * 2
    assert results[0].metric_args == {
        "num_compared": [5000, 10000],
        "standard_error": 0.00123,
        "real_images": 0.0001,
        "reference_sha256": "ef" * 32,
        "network": "inception",
        "network_sha256": "cd" * 32,
        "scheduler": "ddim",
        "num_inference_steps": 50,
        "seed": 7,
    }
    assert (results[0].task_type, results[0].dataset_split, results[0].verified) == (
        "unconditional-image-generation",
        "train",
        False,
    )


def test_result_names_its_number_of_neighbors(tmp_path: Path):
    write_results(make_run(tmp_path), RESULT | {"metric": "recall", "name": "Recall", "neighbors": 5})
    assert "| Recall, k = 5 | " in write_card(tmp_path).read_text(encoding="utf-8")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert results is not None
    assert results[0].metric_args["neighbors"] == 5


@pytest.mark.parametrize(
    ("name", "type"),
    [("me/photos", "me/photos"), ("photos.v2", "photos.v2"), ("my photos", "my-photos-01234567"), ("é", "-01234567")],
)
def test_dataset_type_has_characters_that_the_hub_accepts(name: str, type: str):
    assert _dataset_type(name, "0123456789ab") == type


def test_eval_results_of_several_datasets_survive_a_round_trip(tmp_path: Path):
    test = RESULT["reference"] | {"split": "test"}
    write_results(make_run(tmp_path), RESULT, RESULT | {"reference": test}, COPIES)
    write_card(tmp_path)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert results == eval_results(read_evaluation(tmp_path))
    assert results is not None
    assert [r.dataset_split for r in results] == ["train", "train", "test"]


def test_results_of_other_weights_are_left_out(tmp_path: Path):
    make_run(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"weights")
    write_results(tmp_path, RESULT, weights=hashlib.sha256(b"weights").hexdigest())
    assert "KID" in write_card(tmp_path).read_text(encoding="utf-8").split("## Evaluation")[1]
    file.write_bytes(b"others")
    assert read_evaluation(tmp_path) == []
    (tmp_path / "figures" / "bound.png").write_bytes(b"")
    card = write_card(tmp_path).read_text(encoding="utf-8")
    assert "## Evaluation" not in card
    assert "bound.png" not in card
    assert "eval_results" not in ModelCard(card).data.to_dict()
