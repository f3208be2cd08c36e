"""Runs on numbers and several columns in processes of their own, on the Hub, and with what else a run can do."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline
from hf_ddpm.cli import app
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.label_embedding import EMBEDDING_FILE, read_embedding
from hf_ddpm.network import make_unet
from hf_ddpm.sampling.conditional_set import sample_from_images
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.labeled_images import labeled_images, save_labeled
from tests.support.runs import said, start, trace

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
}


@pytest.fixture
def config(tiny_settings, tmp_path) -> TrainingConfig:
    del tiny_settings["train_data_dir"]
    return TrainingConfig(
        **tiny_settings, dataset_name=save_labeled(tmp_path / "images"), label_column="kind,light", class_dropout=0.4
    )


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP], ids=["DDP", "FSDP"])
def test_two_processes_train_the_model_of_one(variables, config):
    whole = replace(config, train_batch_size=8, output_dir=f"{config.output_dir}-whole")
    divided = replace(config, train_batch_size=2, gradient_accumulation_steps=2)
    assert start(whole) == [0], said(whole)
    assert start(divided, 2, **variables) == [0, 0], said(divided)
    a, b = (trace(each.output_dir) for each in (whole, divided))
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], abs=1e-5)
    for file, load in ((EMBEDDING_FILE, read_embedding), ("unet/diffusion_pytorch_model.safetensors", load_file)):
        weights, others = (load(Path(each.output_dir) / file) for each in (whole, divided))
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fsdp_in_bfloat16_keeps_labels_that_bfloat16_has_not(config, tmp_path):
    """The numbers 257 and 301 of classes would become 256 and 300, of which there are no images."""
    whole = [str(1000 + i) for i in range(302)]
    many = [whole[257 if i % 2 else 301] for i in range(len(whole))]
    kinds = datasets.Features(kind=datasets.ClassLabel(names=whole))
    data = labeled_images(len(whole), kind=many).cast_column("kind", kinds["kind"])
    data.save_to_disk(str(tmp_path / "many"))
    changes = {
        "dataset_name": str(tmp_path / "many"),
        "mixed_precision": "bf16",
        "train_batch_size": 2,
        "adam_weight_decay": 0.0,
    }
    config = replace(config, **changes, class_dropout=0.0, use_ema=False, ema_snapshots=0)
    assert start(config, 2, **FSDP) == [0, 0], said(config)
    table = read_embedding(Path(config.output_dir) / EMBEDDING_FILE)["class_embedding.columns.0.weight"]
    at_first = make_unet(
        1,
        (8, 8),
        model_config=config.model_config_name_or_path,
        seed=config.seed,
        labels=DDPMPipeline.from_pretrained(config.output_dir).labels,
    )
    begun = at_first.state_dict()["class_embedding.columns.0.weight"]
    assert [*(table != begun).any(dim=1).nonzero()[:, 0].tolist()] == [257, 301]


@pytest.mark.slow
def test_dry_run_counts_a_network_of_columns(config, capsys):
    assert train(replace(config, dry_run=True)) is None
    assert "FLOPs per image" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("column", ["light", "kind,light"])
def test_streaming_run_sees_labels(column, config, tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    labeled_images().to_parquet(folder / "train.parquet")
    changes = {"dataset_name": str(folder), "streaming": True, "label_column": column, "shuffle_buffer_images": 8}
    pipeline = train(replace(config, **changes, ema_snapshots=0))
    assert pipeline is not None
    cached = train(replace(config, label_column=column, output_dir=f"{config.output_dir}-cached", ema_snapshots=0))
    assert cached is not None
    assert pipeline.labels == cached.labels


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_model_of_images_and_labels_is_trained_sampled_and_measured(streaming, config, tmp_path):
    """Super-resolution that is told a number: the images of previews and the held-out ones have theirs."""
    config = replace(config, super_resolution=2, label_column="light", model_config_name_or_path=None, ema_snapshots=0)
    config = replace(config, streaming=streaming, eval_steps=1, eval_split="train", eval_num_images=4)
    pipeline = train(config)
    assert isinstance(pipeline, ConditionalDDPMPipeline)
    folder = Path(config.output_dir)
    image = labeled_images(1)[0]["image"]
    image.save(tmp_path / "image.png")
    arguments = {"num_inference_steps": 2, "device": "cpu", "class_label": "0.5"}
    (sample,) = sample_from_images(str(folder), tmp_path / "image.png", tmp_path / "out", **arguments)
    assert sample.is_file()
    settings = {"metrics": ("psnr",), "num_images": 8, "num_inference_steps": [2], "test_split": "train"}
    (row,) = evaluate(folder, **settings, device="cpu")["results"]
    assert np.isfinite(row["value"])
    assert row["sampling"]["classes"] == "of the images"


@pytest.mark.slow
def test_command_trains_and_samples(config, tmp_path):
    words = ["train", "--dataset_name", config.dataset_name, "--label_column", "light", "--output_dir", tmp_path / "m"]
    words += ["--model_config_name_or_path", config.model_config_name_or_path, "--cache_dir", config.cache_dir]
    words += ["--max_train_steps", "2", "--train_batch_size", "4", "--ddpm_num_steps", "20", "--eval_batch_size", "10"]
    result = CliRunner().invoke(app, [*map(str, words), "--no_save_figures", "--lr_warmup_steps", "1"])
    assert result.exit_code == 0, result.output
    sample = ["sample", str(tmp_path / "m"), "--class_label", "0.3", "--num_images", "2", "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(app, sample)
    assert result.exit_code == 0, result.output
