"""metrics.jsonl, a line for each logged step, and eval.jsonl, one for each measurement; written by one process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ddpm.runtime.files import append_lines, read_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator


class Meter:
    """Mean loss and speed since the last reading; nothing leaves the device until then.

    Args:
        losses: `state()` of a run that goes on.
        seconds: of the run at the last reading.
    """

    def __init__(self, accelerator: Accelerator, losses: list[list[float]], seconds: float):
        self.accelerator = accelerator
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        if len(losses) != num_processes:  # another number of processes went before
            losses = [[sum(column) for column in zip(*losses, strict=True)] or [0.0, 0.0]]
        mine = losses[rank] if rank < len(losses) else [0.0, 0.0]
        self.totals = torch.tensor(mine, dtype=torch.float32, device=accelerator.device)
        self.images, self.seconds = 0, seconds

    def add(self, losses: list[Tensor], is_bad: Tensor) -> None:
        """Losses of a step on this process; those of one that is skipped do not count."""
        step = torch.stack([sum(loss.sum() for loss in losses), self.totals.new_tensor(sum(map(len, losses)))])  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.totals = torch.where(is_bad, self.totals, self.totals + step)
        self.images += sum(map(len, losses))

    def state(self) -> list[list[float]]:
        """What a checkpoint keeps: sum and count of each process."""
        gathered: Any = self.accelerator.gather(self.totals[None])
        return gathered.tolist()

    def read(self, seconds: float) -> dict[str, float | None]:
        """Mean loss over all processes (None if every step was skipped), the run's seconds, its images per second."""
        total, count = self._sum().tolist()
        speed = self.images * self.accelerator.num_processes / max(seconds - self.seconds, 1e-9)
        self.totals.zero_()
        self.images, self.seconds = 0, seconds
        loss = total / count if count else None
        return {"loss": loss, "seconds": round(seconds, 3), "images_per_second": round(speed, 3)}

    def _sum(self) -> Tensor:
        total: Any = self.accelerator.reduce(self.totals, reduction="sum")
        return total


class MetricsFile:
    """Lines that reach the file in their order, later if the disk is full now."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []

    def take_up(self, lines: Iterable[str]) -> None:
        """Those that waited when a checkpoint was written; some may have reached the file after that."""
        there = {record["step"] for record in read_metrics(self.path)}
        self.waiting = [line for line in lines if json.loads(line)["step"] not in there]
        self.write()

    def write(self, record: dict[str, Any] | None = None) -> str | None:
        """Appends a record after those that wait; returns why it has to wait too."""
        if record is not None:
            self.waiting.append(json.dumps(record))
        if not self.waiting:
            return None
        try:
            append_lines(self.path, self.waiting)
        except OSError as error:
            return str(error)
        self.waiting = []
        return None
