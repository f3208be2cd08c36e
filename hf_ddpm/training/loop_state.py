"""The state of the loop besides `Progress`, and the outcome of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.data.shard_batches import BlockStart
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.metrics import LinesFile, Meter
from hf_ddpm.training.run import Run, num_steps_left


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step; tensors stay on the device.

    Args:
        step: The number of optimizer steps done after it.
        is_bad: Whether it was skipped, bool ().
        grad_norm: The norm of the gradients before clipping, ().
        learning_rate: The learning rate of the step.
        decays: The decay of each average, by its name.
        evaluated: Loss, t and positions of each forward pass of this process, each (B,).
    """

    step: int
    is_bad: Tensor
    grad_norm: Tensor
    learning_rate: float
    decays: dict[str, float]
    evaluated: list[tuple[Tensor, Tensor, np.ndarray]]


class LoopState:
    """The state of the loop besides `Progress`: sums and files of metrics, unread steps, the progress bar.

    Attributes:
        first: The progress at the start of this process.
        unread: The results of the steps since the last logged one.
        saved_step: The step of the newest checkpoint; 0 without any.
        block_starts: The newest block start of each substream of a stream that this process has read.
    """

    def __init__(self, run: Run, progress: Progress) -> None:
        self.first = progress
        self.started = time.perf_counter()
        self.meter = Meter(run.processes, run.device, progress.losses, progress.seconds)
        self.metrics = LinesFile(run.output_dir / "metrics.jsonl")
        self.evaluations = LinesFile(run.output_dir / "eval.jsonl")
        self.unread: list[StepResult] = []
        self.saved_step = progress.step
        self.block_starts: dict[int, BlockStart] = {}
        self.bar = tqdm(
            initial=progress.step,
            total=progress.step + num_steps_left(run, progress),
            disable=not run.accelerator.is_local_main_process,
        )

    def seconds(self) -> float:
        """Return the seconds spent in the run's steps, over all starts."""
        return self.first.seconds + time.perf_counter() - self.started
