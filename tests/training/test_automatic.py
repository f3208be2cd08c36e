"""`auto`: what the processor, a launcher and a resumed run decide, and what a run says of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from textwrap import dedent

import pytest
import torch

from hf_ddpm.training.automatic import MIN_COMPILED_STEPS, choose_compile, choose_precision
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config
from tests.support.forks import Process
from tests.support.runs import child, said

CPU, ENOUGH = torch.device("cpu"), 10**6
AUTO = {"mixed_precision": "auto", "compile": "auto"}


def of_run(config, num_steps=ENOUGH, device=CPU):
    """What both settings are, and what is said of them."""
    config, of_precision = choose_precision(config)
    compile, of_compile = choose_compile(config, device, num_steps, (28, 28), 1)
    return config.mixed_precision, compile, of_precision, of_compile


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("precision", [None, "no", "fp16"])
def test_explicit_values_stay_as_they_are(precision, compile):
    config = TrainingConfig(mixed_precision=precision, compile=compile)
    assert of_run(config, num_steps=1) == (precision, compile, None, None)
    assert TrainingConfig() == replace(config, mixed_precision=None, compile=False)


def test_precision_of_the_launcher_comes_before_the_processor(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    precision, _, reason, _ = of_run(TrainingConfig(**AUTO))
    assert (precision, reason) == ("fp16", "mixed_precision auto is fp16: as the launcher says")


@pytest.mark.parametrize(
    ("num_steps", "device", "reason"),
    [
        (MIN_COMPILED_STEPS - 1, CPU, "compile auto is off: "),
        (ENOUGH, torch.device("cuda"), "compile auto is off: on GPUs"),
    ],
)
def test_compile_is_chosen_by_the_length_of_the_run_and_the_device(num_steps, device, reason):
    _, compile, _, line = of_run(TrainingConfig(mixed_precision="no", compile="auto"), num_steps, device)
    assert compile is False
    assert line.startswith(reason)


@pytest.mark.parametrize(("precision", "compile"), [("no", True), ("bf16", False)])
def test_resumed_run_keeps_what_it_had(tmp_path, monkeypatch, precision, compile):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # which would decide
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    save_config(TrainingConfig(mixed_precision=precision, compile=compile), run / "config.yaml")
    config = TrainingConfig(**AUTO, output_dir=str(run))
    assert of_run(config, num_steps=1)[:2] == ("fp16", False)
    resumed = replace(config, resume_from_checkpoint="latest")
    for device, num_steps in ((CPU, 1), (CPU, ENOUGH), (torch.device("cuda"), 1)):
        assert of_run(resumed, num_steps, device)[:2] == (precision, compile)
    assert "as in this run until now" in of_run(resumed)[3]


def test_resumed_run_chooses_what_its_config_leaves_open(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    (tmp_path / "checkpoint-1").mkdir()
    save_config(TrainingConfig(**AUTO), tmp_path / "config.yaml")
    config = TrainingConfig(**AUTO, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    assert of_run(config, num_steps=1)[:2] == ("fp16", False)


@pytest.mark.slow
def test_run_records_and_says_what_was_chosen(tiny_settings, tmp_path):
    """In two starts: the second one could choose otherwise."""
    runs = [
        ({"max_train_steps": 3}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "as the launcher says"),
        ({"resume_from_checkpoint": "latest"}, {"ACCELERATE_MIXED_PRECISION": "no"}, "as in this run until now"),
    ]
    for changes, environment, reason in runs:
        config = TrainingConfig(**{**tiny_settings, **AUTO, **changes})
        process = Process(target=child, args=(config, None, 0, 0, environment))
        process.start()
        process.join()
        assert process.exitcode == 0, said(config)
        assert f"mixed_precision auto is bf16: {reason}" in said(config)
        training = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
        assert (training["mixed_precision"], training["compile"]) == ("bf16", False)


@pytest.mark.slow
def test_processor_without_bfloat16_takes_float32():
    """The variables make torch and oneDNN take this processor for a smaller one."""
    code = """
        from hf_ddpm.training.automatic import choose_compile, choose_precision
        from hf_ddpm.training.config import TrainingConfig
        for precision in ("auto", "bf16"):
            config, line = choose_precision(TrainingConfig(mixed_precision=precision, compile="auto"))
            print(config.mixed_precision, line)
        import torch
        print(choose_compile(config, torch.device("cpu"), 10**6, (28, 28), 1)[1])
    """
    smaller = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", dedent(code)]
    done = subprocess.run(command, env={**os.environ, **smaller}, capture_output=True, text=True, check=True)
    chosen, given, compiled = done.stdout.splitlines()
    assert chosen.startswith("no mixed_precision auto is no: float32")
    assert given.startswith("bf16 mixed_precision bf16 is slower than float32 on this processor")
    assert compiled.startswith("compile auto is off: compiled steps pay with AVX-512")
