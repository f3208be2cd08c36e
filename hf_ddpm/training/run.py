"""What the modules of training share: the run, and how it speaks to whoever started it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.shards import ImageStream
from hf_ddpm.hub.background import Pusher
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.checkpoint import TrainingState
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.validation import Monitor

if TYPE_CHECKING:
    from accelerate import Accelerator

FREE_SPACE = "Free space on that disk or make it writable; what was written before is untouched"
FINISHES = "then the same command with --resume_from_checkpoint latest finishes the run"


@dataclass(frozen=True)
class Run:
    """What the loop works with.

    Args:
        config: with what data and launcher decided; `train_batch_size` and `gradient_accumulation_steps` are those of
            this start.
        pusher: of the first process, if the run goes to the Hub.
        model, optimizer: as Accelerate prepared them; `state` holds those within.
        schedule: images seen -> learning rate.
        decays: (images seen, images of the step) -> decay of each average.
        total_images: where the run ends.
        global_batch_size: images per step of this start.
    """

    config: TrainingConfig
    output_dir: Path
    accelerator: Accelerator
    processes: Processes
    images: ImageCache | ImageStream
    scheduler: DDPMScheduler
    model: Any
    optimizer: Any
    state: TrainingState
    objective: Objective
    monitor: Monitor | None
    pusher: Pusher | None
    schedule: Callable[[int], float]
    decays: Callable[[int, int], dict[str, float]]
    total_images: int
    global_batch_size: int

    @property
    def average(self) -> list[Tensor] | None:
        """The one of previews and of the saved model."""
        return next(iter(self.state.ema.averages.values())) if self.state.ema is not None else None

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.state.unet.named_parameters()]

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.state.unet.parameters())


def say(processes: Processes, text: str) -> None:
    """Once, above the progress bar."""
    if processes.rank == 0:
        tqdm.write(text, file=sys.stderr)


def try_to_write(run: Run, write: Callable[[], None]) -> bool:
    """Whether it could be written. Without it the run can go on, so it does where the disk is full."""
    try:
        write()
        return True
    except (OSError, SafetensorError) as error:
        say(run.processes, f"a file could not be written, the run goes on: {error}. {FREE_SPACE}")
        return False


def try_to_track(run: Run, track: Callable[[], None]) -> None:
    """Trackers raise what they like: nothing that happens in one may end a training."""
    try:
        track()
    except Exception as error:
        say(run.processes, f"a tracker failed, the run goes on: {error!r}")
