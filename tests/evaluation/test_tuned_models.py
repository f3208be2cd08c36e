"""What a model that was tuned for few steps is not: a chain of all timesteps, and a model to guide."""

from pathlib import Path

import pytest

from hf_ddpm.classes import Classes
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.hub.space_app.model import Model
from hf_ddpm.sampling.image_set import write_samples
from tests.support.tuned import tuned_pipeline


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    classes = Classes(("dark", "light"), has_unconditional=True)
    tuned_pipeline(classes=classes, num_train_timesteps=40).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_evaluation_of_its_likelihood_or_by_another_scheduler_is_refused(tuned: Path):
    with pytest.raises(ValueError, match="nll must be left out for a model that was tuned for few steps"):
        evaluate(tuned, metrics=["nll"])
    with pytest.raises(
        ValueError, match="scheduler must be 'lcm' for a model that was tuned for few steps, got 'ddpm'"
    ):
        evaluate(tuned, metrics=["kid"], network="efficientnet-lite0", schedulers=["ddpm"])
    assert not (tuned / "evaluation.json").exists()


def test_guidance_of_a_set_is_refused_before_it_begins(tuned: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="guidance must be left out for a model that was tuned for few steps"):
        write_samples(str(tuned), tmp_path / "samples", num_images=2, guidance_scale=2.0)
    assert not (tmp_path / "samples").exists()


def test_page_offers_few_steps_alone(tuned: Path):
    assert Model(str(tuned)).max_steps == 20
