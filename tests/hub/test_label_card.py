"""Models of numbers and of several columns outside of their run: their card, the Hub, the page."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.info import model_info
from hf_ddpm.hub.space_app.model import Model
from hf_ddpm.hub.upload import push
from hf_ddpm.labels import Columns, values_of
from hf_ddpm.network import make_unet
from hf_ddpm.runtime.errors import UsageError
from tests.support.cards import snippets
from tests.support.hub_runs import NAME, UPLOAD_WARNING
from tests.support.hub_server import HubServer
from tests.support.networks import smallest_unet_config

MASS = values_of("mass", np.linspace(1000, 1003, 31), has_unconditional=True)
BOTH = Columns((("kind", Classes(("a|b", "dog"), True)), ("mass", MASS)), has_unconditional=True)


@pytest.fixture(params=[MASS, BOTH], ids=["number", "columns"])
def model(request, tmp_path) -> tuple[Any, Path]:
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(smallest_unet_config(channels=1)))
    pipeline = DDPMPipeline(
        make_unet(1, (8, 8), labels=request.param, model_config=str(path)),
        DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"),
    )
    pipeline.labels = request.param
    pipeline.save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
def test_card_says_how_to_ask_for_a_label(model, one_thread):
    labels, folder = model
    card = write_card(folder, str(folder)).read_text(encoding="utf-8")
    assert "| mass | 1000 to 1003 |" in card
    assert "conditioned on `mass`" in card if labels is MASS else "conditioned on `kind`, `mass`" in card
    assert "without `class_labels` the images are without a label" in card
    assert "scheduler/labels.npz" in card or labels is MASS
    codes = snippets(card)
    assert len(codes) == (2 if labels is MASS else 1)
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        assert [image.size for image in names["images"]] == [(8, 8)] * 16
    # What it tells to type is a label of the model, also where few digits would leave the range.
    text = card.split('--class_label "')[1].split('"')[0]
    assert labels.number_of(text)
    # Measured again, it is the same but for nothing.
    assert write_card(folder, str(folder)).read_text(encoding="utf-8") == card


def test_info_says_the_labels(model):
    labels, folder = model
    info = model_info(str(folder))
    assert info["classes"] is None
    assert info["labels"] == ("mass: 1000 to 1003" if labels is MASS else "kind: 2 classes; mass: 1000 to 1003")


def test_page_draws_labels_in_turn(model):
    labels, folder = model
    page = Model(str(folder))
    drawn = page.labels(None, [0, 1, 6])
    assert drawn == [labels.in_turn[0], labels.in_turn[1], labels.in_turn[1]]
    samples = page.sample(page.samplers[0], 2, [0, 1], page.labels(None, [0, 1]), 1.0)
    assert len(samples.images) == 2


def test_page_takes_labels_that_it_offers_and_that_are_typed(model):
    labels, folder = model
    page = Model(str(folder))
    offered = dict(page.label_choices)
    assert page.labels(offered["without a label"], [0, 1]) is None
    assert page.labels(offered[labels.titles[1]], [5, 6]) == [labels.in_turn[1]] * 2
    typed = "1001.5" if labels is MASS else "mass = 1001.5"
    (label,) = page.labels(typed, [0]) or []
    assert labels.number_of(label) == labels.number_of(typed)
    with pytest.raises(UsageError, match="range of the training images"):
        page.labels(typed.replace("1001.5", "7"), [0])
    with pytest.raises(UsageError, match="that the page offers, got number 99"):
        page.labels(99, [0])


@pytest.mark.slow
@pytest.mark.filterwarnings(UPLOAD_WARNING)
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # diffusers gives it
def test_model_comes_back_from_the_hub_with_its_labels_and_its_guide(server: HubServer, model, caplog):
    labels, folder = model
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.guide = make_unet(1, (8, 8), labels=labels, model_config=str(folder / "unet/config.json"), seed=1)
    pipeline.save_pretrained(folder)
    push(folder, NAME)
    label = labels.in_turn[1]
    images = []
    for name in (folder, NAME):
        loaded = DDPMPipeline.from_pretrained(name).load_guide()
        assert loaded.labels == labels
        loaded.set_progress_bar_config(disable=True)
        arguments: Any = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
        images.append(loaded(class_labels=label, generator=torch.Generator().manual_seed(0), **arguments).images)
    assert np.array_equal(*images)
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        stock = diffusers.DDPMPipeline.from_pretrained(NAME)
    diffusers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records if "diffusers" in record.name] == []
    assert DDPMPipeline.from_pipe(stock).labels == labels
