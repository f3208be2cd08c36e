"""Models that are conditioned on numbers and on several columns are measured with the labels of their data."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, UsageError
from hf_ddpm.classes import Classes
from hf_ddpm.data.batches import epoch_order, fixed_pixels
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.inspected import inspect
from hf_ddpm.evaluation.job import load_job
from hf_ddpm.evaluation.likelihood import bits_per_dimension, sum_bound_terms
from hf_ddpm.evaluation.request import Request
from hf_ddpm.evaluation.search import search_timesteps
from hf_ddpm.labels import Columns, NetworkLabel, values_of, with_unconditional
from hf_ddpm.network import make_unet
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config
from tests.support.labeled_images import labeled_images
from tests.support.networks import smallest_unet_config

COUNT = 24
NUMBERS = np.linspace(40, 215, COUNT) / 255
LIGHT = values_of("light", NUMBERS, has_unconditional=True)
BOTH = Columns((("kind", Classes(("even", "odd"), True)), ("light", LIGHT)), has_unconditional=True)


@pytest.fixture(params=[LIGHT, BOTH], ids=["number", "columns"])
def run(request, tmp_path) -> tuple[Any, Path]:
    """A model in the folder of a run, with data of two splits; some held-out numbers are outside of the range."""
    labels = request.param
    splits: Any = {"train": labeled_images(COUNT), "test": labeled_images(6, light=[0.1 * i for i in range(6)])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(smallest_unet_config(channels=1)))
    unet = make_unet(1, (8, 8), labels=labels, model_config=str(path))
    unet.conv_out.reset_parameters()
    pipeline = DDPMPipeline(
        unet.eval(), DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    )
    pipeline.labels = labels
    pipeline.save_pretrained(tmp_path / "model")
    config = TrainingConfig(
        dataset_name=str(tmp_path / "data"),
        cache_dir=str(tmp_path / "cache"),
        label_column="light" if labels is LIGHT else "kind,light",
        output_dir=str(tmp_path / "model"),
    )
    save_config(config, tmp_path / "model/config.yaml")
    return labels, tmp_path / "model"


def number_of(labels: Any, kind: str, light: float) -> Any:
    """The network's label, which has 32 bits."""
    number = np.float32(LIGHT.encode(light)).item()
    return number if labels is LIGHT else (float(("even", "odd").index(kind)), number)


@pytest.mark.slow
def test_samples_take_the_labels_of_training_images_and_likelihood_those_of_held_out_ones(run):
    labels, folder = run
    settings: Any = {"metrics": ("nll",), "num_images": 6, "timesteps_per_image": 20, "device": "cpu"}
    with load_job(Request(model=folder, **{**settings, "num_images": 30})) as job:
        order = np.resize(epoch_order(0, 0, COUNT), 30)
        kinds = [("even", "odd")[i % 2] for i in order]
        expected = [number_of(labels, kind, NUMBERS[i]) for kind, i in zip(kinds, order, strict=True)]
        assert job.class_labels == [NetworkLabel(each) for each in expected]
        assert job.class_choice == "as in train"
        assert job.held_out is not None
        held_out = [number_of(labels, ("even", "odd")[i % 2], 0.1 * i) for i in range(6)]
        assert np.array_equal(job.held_out.labels, np.array(held_out, np.float32))
        pixels, of_network = fixed_pixels(job.held_out).copy(), job.held_out.labels
        pipeline: Any = job.pipeline
        images = pipeline(2, class_labels=job.class_labels[:2], num_inference_steps=2, output_type="np").images
        assert np.isfinite(images).all()

    (row,) = evaluate(folder, **settings)["results"]
    order = epoch_order(0, 0, 6)
    sums = sum_bound_terms(
        pipeline.unet, pipeline.scheduler, pixels[order], seed=0, batch_size=6, class_labels=of_network[order]
    )
    assert row["value"] == pytest.approx(bits_per_dimension(sums).bits_per_dimension, rel=1e-5)
    others = sum_bound_terms(
        pipeline.unet, pipeline.scheduler, pixels[order], seed=0, batch_size=6, class_labels=of_network[order[::-1]]
    )
    assert abs(row["value"] - bits_per_dimension(others).bits_per_dimension) > 1e-4 * row["value"]


@pytest.mark.slow
def test_guidance_by_the_label_and_by_a_weaker_model_is_measured(run, tmp_path):
    """By what the model keeps, and by what is asked for; one scale without guidance stands beside the others."""
    labels, folder = run
    pipeline: Any = DDPMPipeline.from_pretrained(folder)
    torch.manual_seed(1)
    pipeline.guide = make_unet(1, (8, 8), labels=labels, model_config=str(tmp_path / "unet.json"))
    pipeline.use("ddim", 2, guidance_scale=2.0, guidance_interval=(0.1, 9.0), autoguidance_scale=1.5)
    pipeline.save_pretrained(folder)
    settings: Any = {"metrics": ["kid"], "network": "efficientnet-lite0", "num_images": 8, "device": "cpu"}
    settings |= {"guidance_scales": [1.0, 3.0]}
    kept = evaluate(folder, **settings)["results"]
    asked = evaluate(folder, **settings, guidance_interval=(0.2, 9.0), autoguidance_scale=3.0)["results"]
    guided = [row["sampling"]["guidance"] for row in [*kept, *asked]]
    assert guided[0] == guided[2] is None
    assert [(each["scale"], each["interval"], each["autoguidance_scale"]) for each in guided[1::2]] == [
        (3.0, [0.1, 9.0], 1.5),
        (3.0, [0.2, 9.0], 3.0),
    ]
    assert len({row["value"] for row in [*kept, *asked[1:]]}) == 3
    assert "--autoguidance_scale 3.0" in asked[1]["command"]


def test_data_without_the_models_columns_are_refused(run):
    labels, folder = run
    data = DataConfig(dataset_name=str(folder.parent / "data"), cache_dir=str(folder.parent / "cache"))
    column = "kind" if labels is LIGHT else "light"
    message = "label_column must (hold what the model takes, light|name the columns that the model takes, kind,light)"
    given = DataConfig(**{**vars(data), "label_column": column})
    with pytest.raises(UsageError, match=message), load_job(Request(model=folder, metrics=("nll",), data=given)):
        pass
    with (
        pytest.raises(UsageError, match="label_column must name the labels for the nll of a model of labels"),
        load_job(Request(model=folder, metrics=("nll",), data=data)),
    ):
        pass


@pytest.mark.slow
def test_timesteps_are_searched_with_labels_in_turn(run):
    _, folder = run
    pipeline = DDPMPipeline.from_pretrained(folder)
    (found,) = search_timesteps(pipeline, [3], schedulers=["unipc"], num_images=6, batch_size=6, reference_steps=6)
    assert len(found.timesteps) == 3


def test_anomaly_maps_do_without_a_label_or_are_refused(run):
    labels, folder = run
    pipeline = DDPMPipeline.from_pretrained(folder)
    settings = {"dataset_name": str(folder.parent / "data"), "cache_dir": str(folder.parent / "cache")}
    data = DataConfig(**settings, label_column="kind")
    images = load_images(data)
    inspected = inspect(images, data, "train", ["even"], pipeline, folder)
    assert inspected.class_labels is None
    assert inspected.is_anomalous is not None
    assert int(inspected.is_anomalous.sum()) == COUNT // 2
    pipeline.labels = with_unconditional(labels, False)
    with pytest.raises(UsageError, match=r"the model must do without a label, got one that needs .*light"):
        inspect(images, data, "train", [], pipeline, folder)
    numbers = DataConfig(**settings, label_column="light")
    with pytest.raises(UsageError, match="label_column must be one column of classes, which are normal or not, got"):
        inspect(load_images(numbers), numbers, "train", [], pipeline, folder)
