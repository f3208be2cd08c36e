"""Classes have names, which a pipeline takes and keeps, and one embedding may stand for every class."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, UsageError
from hf_ddpm.classes import CLASSES_FILE, Classes, numbered_classes, read_classes, write_classes

CLOTHES = Classes(("T-shirt", "Ankle boot", "bag"), has_unconditional=True)


@pytest.fixture
def pipeline(make_unet) -> DDPMPipeline:
    pipeline = DDPMPipeline(make_unet(num_class_embeds=4), DDPMScheduler(10, prediction_type="sample"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.classes = CLOTHES
    return pipeline


def images(pipeline, **arguments) -> torch.Tensor:
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images


@pytest.mark.parametrize(
    ("label", "number"), [("bag", 2), ("ankle boot", 1), (" ANKLE BOOT", 1), (2, 2), ("2", 2), (torch.tensor(1), 1)]
)
def test_class_is_named_or_numbered(label, number):
    assert CLOTHES.number_of(label) == number


def test_name_counts_before_number():
    assert Classes(("1", "2")).number_of("1") == 0
    assert Classes(("a", "A")).number_of("A") == 1


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("ancle boot", "class_labels must name a class, got 'ancle boot': do you mean 'Ankle boot'"),
        ("zebra", "got 'zebra': the classes are T-shirt, Ankle boot, bag"),
        (3, r"class_labels must be in \[0, 3\), got 3: the classes are T-shirt"),
        ("3", r"must be in \[0, 3\), got 3"),
        (-1, "got -1"),
        (0.5, "class_labels must be names or whole numbers, got 0.5"),
        (None, "got None"),
    ],
)
def test_label_that_is_no_class_is_refused(label, message):
    with pytest.raises(UsageError, match=message):
        CLOTHES.number_of(label)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_pipeline_takes_names_and_numbers_alike(pipeline):
    named = images(pipeline, batch_size=3, class_labels=["bag", "t-shirt", 1])
    assert torch.equal(named, images(pipeline, batch_size=3, class_labels=[2, 0, 1]))
    assert torch.equal(named, images(pipeline, batch_size=3, class_labels=torch.tensor([2, 0, 1])))
    assert torch.equal(
        images(pipeline, batch_size=2, class_labels="bag"), images(pipeline, batch_size=2, class_labels=2)
    )
    with pytest.raises(ValueError, match="do you mean 'bag'"):
        pipeline(class_labels=["bug"])


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_images_without_class_are_those_of_the_unconditional_embedding(pipeline):
    without = images(pipeline)
    with torch.no_grad():
        table = pipeline.unet.class_embedding.weight
        table[2] = table[3]
    assert torch.equal(without, images(pipeline, class_labels="bag"))
    pipeline.classes = numbered_classes(4)
    with pytest.raises(ValueError, match="class_labels must be given: the model is conditioned on 4 classes"):
        pipeline()


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_saved_pipeline_keeps_its_classes_where_stock_does_not_look(pipeline, tmp_path, caplog):
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert loaded.classes == CLOTHES
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == {"unet", "scheduler"}
    stock = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [2], "num_inference_steps": 10, "output_type": "pt"}
    theirs = stock(generator=torch.Generator().manual_seed(0), **arguments).images
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(theirs, images(loaded, class_labels="bag"))
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_network_that_nobody_has_named_has_numbered_classes(make_unet):
    assert DDPMPipeline(make_unet(num_class_embeds=3), DDPMScheduler()).classes == Classes(
        ("0", "1", "2"), is_named=False
    )
    assert DDPMPipeline(make_unet(), DDPMScheduler()).classes is None
    angle = make_unet(class_embed_type="timestep", num_class_embeds=1)
    assert DDPMPipeline(angle, DDPMScheduler()).classes is None


@pytest.mark.parametrize(
    "content",
    ['{"names": ["a"]}', '{"names": [1], "has_unconditional": true}', '{"names": [], "has_unconditional": 1}', "["],
)
def test_damaged_classes_are_named(tmp_path: Path, content):
    path = tmp_path / CLASSES_FILE
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UsageError, match=r"classes\.json cannot be read.*remove it"):
        read_classes(tmp_path)


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_classes_of_another_network_are_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    write_classes(tmp_path, Classes(("a", "b")))
    with pytest.raises(UsageError, match=r"classes\.json must be of the model's network, got 2 classes for 4 embed"):
        DDPMPipeline.from_pretrained(tmp_path)
