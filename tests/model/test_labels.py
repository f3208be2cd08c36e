"""Numbers and several columns as labels: what a pipeline takes, what its network gets, and what stock makes of it."""

import json
import logging
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, UsageError
from hf_ddpm.classes import Classes
from hf_ddpm.label_embedding import EMBEDDING_FILE, PREFIX, embedding_of, empty_copy, read_embedding
from hf_ddpm.labels import (
    HIDDEN,
    LABELS_FILE,
    Columns,
    NetworkLabel,
    Values,
    read_labels,
    values_of,
    with_unconditional,
    write_labels,
)
from hf_ddpm.network import make_unet
from tests.support.networks import smallest_unet_config

SLANT = values_of("slant", np.linspace(-1, 1, 101), has_unconditional=True)
DIGIT = Classes(("zero", "one", "two"), has_unconditional=True)
BOTH = Columns((("digit", DIGIT), ("slant", SLANT)), has_unconditional=True)
SCHEDULER = {"num_train_timesteps": 10, "beta_end": 0.9, "prediction_type": "sample"}


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(smallest_unet_config(channels=1)))
    return str(path)


def pipeline_of(labels, config, seed: int = 0) -> DDPMPipeline:
    unet = make_unet(1, (8, 8), labels=labels, model_config=config, seed=seed)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)  # which begins at zero
    pipeline = DDPMPipeline(unet.eval(), DDPMScheduler(**SCHEDULER))
    pipeline.labels = labels
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, **arguments) -> torch.Tensor:
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images


def test_number_stands_on_the_scale_of_a_timestep():
    assert SLANT.number_of(SLANT.mean) == 500
    assert SLANT.number_of(SLANT.mean + SLANT.std) == pytest.approx(600)
    assert SLANT.number_of("0.5") == SLANT.number_of(0.5) == SLANT.number_of(np.float32(0.5))
    assert SLANT.quantiles == pytest.approx((-1, -0.5, 0, 0.5, 1))
    assert SLANT.in_turn == SLANT.quantiles
    assert SLANT.unconditional == HIDDEN
    assert with_unconditional(SLANT, False).unconditional is None


def test_printed_end_of_a_range_may_be_asked_for():
    values = values_of("x", np.array([0.1, 0.9], np.float32).astype(np.float64))
    assert values.range == "0.1 to 0.9"
    assert values.read(0.9) == 0.9 > values.quantiles[-1]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (1.5, "class_labels must be in the range of the training images, for 'slant' -1 to 1, got 1.5: ask for"),
        (float("nan"), "must be in the range of the training images, for 'slant' -1 to 1, got nan"),
        ("left", "class_labels must be numbers for 'slant', got 'left': give one from -1 to 1"),
        (None, "must be numbers for 'slant', got None"),
        (True, "must be numbers for 'slant', got True"),
    ],
)
def test_wrong_number_is_refused_with_the_range(label, message):
    with pytest.raises(UsageError, match=message):
        SLANT.number_of(label)


def test_constant_column_is_refused():
    with pytest.raises(UsageError, match="label_column must hold more than one number, got 3 for all 5 images in 'x'"):
        values_of("x", np.full(5, 3.0))


def test_columns_take_a_mapping_or_a_text():
    expected = (2.0, SLANT.number_of(0.2))
    assert BOTH.number_of({"slant": 0.2, "digit": "two"}) == expected
    assert BOTH.number_of({"digit": 2, "slant": "0.2"}) == expected
    assert BOTH.number_of("digit=two, slant=0.2") == expected
    assert BOTH.number_of("slant = 0.2,digit = 2") == expected
    assert BOTH.number_of(NetworkLabel((1.0, 7.0))) == (1.0, 7.0)
    assert BOTH.number_of("digit=two") == BOTH.number_of({"digit": 2, "slant": None}) == (2.0, HIDDEN)
    assert BOTH.number_of({}) == BOTH.unconditional == (3.0, HIDDEN)
    commas = Columns((("kind", Classes(("cat, black", "dog"))), ("slant", SLANT)))
    assert commas.read("kind=cat, black, slant=1") == {"kind": "cat, black", "slant": 1.0}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("digt=2, slant=0", "class_labels must name columns of the model, got 'digt': do you mean 'digit'"),
        ({"mass": 2}, "got 'mass': the columns are digit, slant"),
        ("digit=3, slant=0", r"must be in \[0, 3\), got 3: the classes are zero, one, two; the column is 'digit'"),
        ("digit=2, slant=7", "for 'slant' -1 to 1, got 7"),
        ("two", "class_labels must say the column of each label once, got 'two': write COLUMN=LABEL"),
        ("digit=2, digit=1", "must say the column of each label once"),
        (2, "class_labels must say the column of each label, got 2: give a mapping, as"),
    ],
)
def test_wrong_label_of_columns_is_refused(label, message):
    with pytest.raises(UsageError, match=message):
        BOTH.number_of(label)


def test_column_may_be_left_out_only_where_it_was_hidden_in_training():
    with pytest.raises(UsageError, match="must hold all columns of the model, got none for 'slant': give it, or take"):
        with_unconditional(BOTH, False).number_of({"digit": "two"})


def test_rows_of_a_grid_go_through_each_column():
    rows = BOTH.in_turn
    assert [row["digit"] for row in rows] == ["zero", "one", "two", "zero", "one"]
    assert [row["slant"] for row in rows] == [*SLANT.quantiles]
    assert BOTH.titles[1] == "digit = one, slant = -0.5"
    assert SLANT.titles[0] == "slant = -1"
    assert BOTH.table(rows)["digit"] == ["zero", "one", "two", "zero", "one"]


@pytest.mark.parametrize("labels", [SLANT, BOTH, DIGIT, with_unconditional(BOTH, False)])
def test_labels_are_kept_whole(labels, tmp_path):
    write_labels(tmp_path, labels)
    assert read_labels(tmp_path) == labels
    assert (tmp_path / LABELS_FILE).exists() == (labels is not DIGIT)


@pytest.mark.parametrize(
    "content", ["{", '{"columns": []}', '{"columns": [{"name": "x"}], "has_unconditional": true}']
)
def test_damaged_labels_are_named(content, tmp_path):
    (tmp_path / LABELS_FILE).parent.mkdir()
    (tmp_path / LABELS_FILE).write_text(content)
    with pytest.raises(UsageError, match=r"labels\.json.*save or download the model again"):
        read_labels(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [SLANT, BOTH])
def test_pipeline_is_saved_whole_and_stock_loads_its_network_without_a_warning(labels, config, tmp_path, caplog):
    pipeline = pipeline_of(labels, config)
    label: Any = 0.3 if labels is SLANT else {"digit": "one", "slant": 0.3}
    expected = images(pipeline, batch_size=2, class_labels=label)
    pipeline.save_pretrained(tmp_path / "model")
    assert torch.equal(images(pipeline, batch_size=2, class_labels=label), expected)  # its embedding is back

    loaded = DDPMPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == labels
    assert loaded.classes is None
    assert torch.equal(images(loaded, batch_size=2, class_labels=label), expected)
    assert torch.equal(images(DDPMPipeline.from_pipe(loaded), batch_size=2, class_labels=label), expected)

    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "model" / "unet")
        stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model")
    diffusers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records] == []
    again = DDPMPipeline.from_pipe(stock)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again, batch_size=2, class_labels=label), expected)

    # The network's own input is that of stock: the number, or the sum of the embeddings.
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    numbers = torch.tensor([labels.number_of(label)] * 2)
    with torch.no_grad():
        ours = pipeline.unet(x_t, t, class_labels=numbers).sample
        embedding = embedding_of(pipeline.unet)
        stock_labels = numbers if embedding is None else embedding(numbers)
        assert torch.equal(unet.eval()(x_t, t, class_labels=stock_labels).sample, ours)


def test_stock_consistency_pipeline_takes_numbers(config, tmp_path):
    """It takes the network's own number, as a tensor, and gives the same bits."""
    pipeline = pipeline_of(SLANT, config)
    pipeline.save_pretrained(tmp_path)
    stock = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        batch_size=2,
        num_inference_steps=10,
        class_labels=torch.full((2,), SLANT.number_of(0.3)),
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    ours = images(pipeline, batch_size=2, num_inference_steps=10, class_labels=0.3)
    assert np.array_equal(theirs, ours.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("labels", [SLANT, BOTH])
def test_each_image_has_its_label(labels, config):
    pipeline = pipeline_of(labels, config)
    rows = labels.in_turn[:2]
    both = images(pipeline, batch_size=2, class_labels=[*rows])
    alone = images(pipeline, batch_size=2, class_labels=rows[1])
    assert torch.allclose(both[1], alone[1], atol=1e-5)
    assert not torch.allclose(both[0], alone[0], atol=1e-3)
    hidden = images(pipeline, batch_size=2)
    assert torch.equal(hidden, images(pipeline, batch_size=2, class_labels=NetworkLabel(labels.unconditional)))
    guided = images(pipeline, batch_size=2, class_labels=[*rows], guidance_scale=2.0)
    assert not torch.allclose(guided, both, atol=1e-3)
    pipeline.labels = with_unconditional(labels, False)
    with pytest.raises(ValueError, match=r"class_labels must be given: the model is conditioned on .*slant: -1 to 1"):
        images(pipeline)
    with pytest.raises(ValueError, match="class_labels must hold batch_size = 3 labels, got 2"):
        images(pipeline, batch_size=3, class_labels=[*rows])


@pytest.mark.parametrize("labels", [SLANT, BOTH])
def test_half_precision_takes_labels(labels, config):
    pipeline = pipeline_of(labels, config)
    label = labels.in_turn[0]
    expected = images(pipeline, class_labels=label)
    pipeline.unet.to(torch.bfloat16)
    assert torch.allclose(images(pipeline, class_labels=label), expected, atol=0.1)


def test_empty_copy_has_the_same_weights_by_name(config):
    unet = make_unet(1, (8, 8), labels=BOTH, model_config=config)
    with torch.device("meta"):
        copy = empty_copy(unet)
    assert {n: p.shape for n, p in copy.named_parameters()} == {n: p.shape for n, p in unet.named_parameters()}


def test_guide_keeps_its_embedding(config, tmp_path):
    pipeline = pipeline_of(BOTH, config)
    pipeline.guide = pipeline_of(BOTH, config, seed=1).unet
    arguments: Any = {"batch_size": 2, "class_labels": "digit=one, slant=0", "guidance_scale": 2.0}
    expected = images(pipeline, **arguments)
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path).load_guide()
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded, **arguments), expected)
    others = Columns((("digit", Classes(("a", "b"), True)), ("slant", SLANT)), has_unconditional=True)
    pipeline.guide = make_unet(1, (8, 8), labels=others, model_config=config)
    with pytest.raises(ValueError, match="guide must have the model's columns of labels, got others"):
        images(pipeline, **arguments)


def test_file_without_its_labels_is_named(config, tmp_path):
    pipeline_of(BOTH, config).save_pretrained(tmp_path)
    (tmp_path / LABELS_FILE).unlink()
    write_labels(tmp_path, SLANT)
    with pytest.raises(UsageError, match=r"labels\.json must be of the model's network, got slant: -1 to 1 for a"):
        DDPMPipeline.from_pretrained(tmp_path)


def test_embedding_is_named_as_in_the_network(config, tmp_path):
    pipeline = pipeline_of(BOTH, config)
    pipeline.save_pretrained(tmp_path)
    names = {name for name in pipeline.unet.state_dict() if name.startswith(PREFIX)}
    assert {*read_embedding(tmp_path / EMBEDDING_FILE)} == names
    assert names
    content = (tmp_path / EMBEDDING_FILE).read_bytes()
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / EMBEDDING_FILE).read_bytes() == content
    for damaged in (content[:-100], content[:10], b""):
        (tmp_path / EMBEDDING_FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"labels\.npz must hold whole arrays of numpy"):
            DDPMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "labels", "message"),
    [
        ({"num_class_embeds": 3}, SLANT, "class_embed_type of .* must be timestep, for the labels of label_column"),
        ({"class_embed_type": "timestep", "num_class_embeds": 1}, BOTH, "class_embed_type of .* must be identity"),
        ({"time_embedding_type": "fourier"}, SLANT, "time_embedding_type of .* must be positional, as a number is"),
        ({"class_embed_type": "identity"}, None, "class_embed_type of .* must be None, as the labels are classes"),
    ],
)
def test_model_config_without_a_place_for_the_labels_is_refused(changes, labels: Values | None, message, tmp_path):
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(smallest_unet_config(channels=1, **changes)))
    with pytest.raises(UsageError, match=message):
        make_unet(1, (8, 8), labels=labels, model_config=str(path))
