"""`train` in a process that lives on, as that of a notebook does: a run leaves nothing, however it ends."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tqdm.auto import tqdm

from hf_ddpm import RunError, TrainingConfig, UsageError, train
from hf_ddpm.runtime.signals import LAUNCHER_ENDED, SIGNALS, StopRequest


def raise_in_callback(name, error):
    def callback(event, run):
        if event.name == name:
            raise error

    return callback


def interrupt(event, run):
    if event.name == "log":
        os.kill(os.getpid(), signal.SIGINT)


def interrupt_twice(event, run):
    interrupt(event, run)
    interrupt(event, run)


def state_of_the_process() -> dict:
    numbers = [*SIGNALS, LAUNCHER_ENDED] if LAUNCHER_ENDED is not None else SIGNALS
    return {
        "signals": {number: signal.getsignal(number) for number in numbers},
        "accelerate": [dict(kind._shared_state) for kind in (AcceleratorState, GradientState)],
        "threads": torch.get_num_threads(),
        "bars": len(getattr(tqdm, "_instances", ())),
    }


@pytest.fixture(autouse=True)
def process_of_a_notebook():
    """Let Ctrl-C interrupt, which a shell lets jobs in its background ignore, and forget what other tests began."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    AcceleratorState._reset_state()
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (raise_in_callback("log", KeyError("mine")), RunError, "the same command with --resume_from_checkpoint"),
        (raise_in_callback("log", KeyboardInterrupt()), KeyboardInterrupt, None),
        (raise_in_callback("end", KeyboardInterrupt()), KeyboardInterrupt, None),
        (interrupt, RunError, "SIGINT was noticed: the run ends after step 1"),
        (interrupt_twice, KeyboardInterrupt, None),
    ],
    ids=["failed", "interrupted", "interrupted at the end", "stopped", "interrupted twice"],
)
def test_run_that_ends_early_leaves_nothing_and_a_second_one_works(
    tiny_settings, callback, error, message, monkeypatch
):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    settings = tiny_settings | {"logger": "tensorboard", "max_train_steps": 2, "cpu_threads_per_process": 2}
    before, runs = state_of_the_process(), []
    with pytest.raises(error, match=message):
        train(TrainingConfig(**settings), callbacks=[lambda event, run: runs.append(run), callback])
    assert state_of_the_process() == before
    assert runs[0].trackers[0].writer.all_writers is None  # closed
    again = TrainingConfig(**settings, mixed_precision="bf16", overwrite_output_dir=True)
    assert train(again) is not None
    assert state_of_the_process() == before
    assert (Path(settings["output_dir"]) / "run.json").is_file()


@pytest.mark.slow
def test_accelerator_of_the_user_outlives_a_run(tiny_settings):
    own = Accelerator(mixed_precision="bf16")
    train(TrainingConfig(**tiny_settings | {"max_train_steps": 1}))
    assert own.mixed_precision == "bf16"
    AcceleratorState._reset_state()
    with pytest.raises(UsageError, match="holds a run"):
        train(TrainingConfig(**tiny_settings))
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state()


def test_second_ctrl_c_ends_a_command_at_once(monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number, signal.getsignal(number))))
    with StopRequest(None, 0.0):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]
