"""metrics.jsonl, with a line for each logged step, and eval.jsonl, with one for each validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.runtime.files import append_lines
from hf_ddpm.runtime.processes import Processes


class Meter:
    """The mean loss and the speed since the last reading; nothing leaves the device until then.

    Args:
        losses: What `state()` returned for the checkpoint that the run resumes from.
        seconds: The seconds of the run at the last reading.
    """

    def __init__(self, processes: Processes, device: torch.device, losses: list[list[float]], seconds: float) -> None:
        self.processes = processes
        if len(losses) != processes.size:  # the checkpoint is of another number of processes
            losses = [[sum(column) for column in zip(*losses, strict=True)] or [0.0, 0.0]]
        own = losses[processes.rank] if processes.rank < len(losses) else [0.0, 0.0]
        self.totals = torch.tensor(own, dtype=torch.float32, device=device)
        self.images, self.seconds = 0, seconds

    def add(self, losses: list[Tensor], is_bad: Tensor) -> None:
        """Add the losses of a step on this process, unless the step was skipped."""
        count = sum(len(loss) for loss in losses)
        total = sum((loss.sum() for loss in losses[1:]), losses[0].sum())
        step = torch.stack([total, torch.full_like(total, count)])
        self.totals = torch.where(is_bad, self.totals, self.totals + step)
        self.images += count

    def state(self) -> list[list[float]]:
        """Return the sum and the count of each process, for a checkpoint."""
        return self.processes.gather(lambda: self.totals.tolist())

    def read(self, seconds: float) -> dict[str, float | None]:
        """Return the mean loss over all processes, the run's seconds and its images per second, and start anew.

        The loss is None if every step was skipped.
        """
        total, count = torch.tensor(self.state(), dtype=torch.float32).sum(dim=0).tolist()
        speed = self.images * self.processes.size / max(seconds - self.seconds, 1e-9)
        self.totals.zero_()
        self.images, self.seconds = 0, seconds
        loss = total / count if count else None
        return {"loss": loss, "seconds": round(seconds, 3), "images_per_second": round(speed, 3)}


class LinesFile:
    """A file of JSON lines that keep their order; while the disk is full they wait in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def write(self, record: dict[str, Any] | None = None) -> str | None:
        """Append the lines that wait and then a record.

        Returns:
            Why they could not be written, and wait; None if they were.
        """
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
