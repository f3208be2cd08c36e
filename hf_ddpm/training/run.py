"""Run: what the modules of training share; and how a run speaks to whoever started it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.classes import Classes
from hf_ddpm.condition import Condition
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.given import GivenImages
from hf_ddpm.data.shards import ImageStream
from hf_ddpm.hub.background import Pusher
from hf_ddpm.labels import Labels
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.errors import in_one_line
from hf_ddpm.runtime.format import format_duration
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.checkpoint import Progress, TrainingState
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

FREE_SPACE = "Free space on that disk or make it writable; what was written before is untouched"
FINISHES = "then the same command with --resume_from_checkpoint latest finishes the run"


@dataclass(frozen=True)
class Tracked:
    """The values that a tracker held when a run resumed.

    Args:
        values: Step and name of each that is known.
        before: It holds all values of the steps below this one.
    """

    values: set[tuple[int, str]] = field(default_factory=set)
    before: int = 0

    def holds(self, step: int, name: str) -> bool:
        """Return whether the value is one of them."""
        return step < self.before or (step, name) in self.values


@dataclass(frozen=True)
class Run:
    """A run as the loop sees it.

    Args:
        config: The settings, with what data and launcher decided; `train_batch_size` and
            `gradient_accumulation_steps` are those of this start.
        model: The network as Accelerate prepared it; `state` holds the network itself.
        optimizer: The optimizer as Accelerate prepared it; `state` holds the optimizer itself.
        loss: The training loss: `objective`, or what was passed to `train` in its place.
        labels: The labels that the network is conditioned on; None for a network without labels.
        condition: What the images are made from; None: from noise alone.
        validation: The held-out images; None if the run validates nothing.
        pusher: The background upload of the model, on the first process of a run that goes to the Hub.
        checkpoint_pusher: That of checkpoints, with `hub_strategy checkpoint`.
        trackers: Accelerate's trackers, on the first process.
        tracked: What each of them, by its name, held when the run resumed.
        callbacks: What is called with each event; see `train`.
        learning_rate: A function from the images seen to the learning rate.
        decays: A function from (images seen, images of the step) to the decay of each average, by its name.
        total_images: The number of images after which the run ends.
        global_batch_size: The images per step of this start.
    """

    config: TrainingConfig
    output_dir: Path
    accelerator: Accelerator
    processes: Processes
    images: ImageCache | ImageStream | GivenImages
    scheduler: DDPMScheduler
    model: Any
    optimizer: Any
    state: TrainingState
    objective: Objective
    loss: Callable[..., Tensor]
    labels: Labels | None
    condition: Condition | None
    validation: Validation | None
    learning_rate: Callable[[int], float]
    decays: Callable[[int, int], dict[str, float]]
    total_images: int
    global_batch_size: int
    pusher: Pusher | None = None
    checkpoint_pusher: Pusher | None = None
    trackers: tuple[Any, ...] = ()
    tracked: dict[str, Tracked] = field(default_factory=dict)
    callbacks: Sequence[Callable[[Any, Any], None]] = ()

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def classes(self) -> Classes | None:
        """The labels, if they are one column of classes."""
        return self.labels if isinstance(self.labels, Classes) else None

    @property
    def is_main(self) -> bool:
        """True on the process that writes."""
        return self.processes.rank == 0

    @property
    def average(self) -> list[Tensor] | None:
        """The average that previews and the saved model use; None without averages."""
        return next(iter(self.state.ema.averages.values())) if self.state.ema is not None else None

    @cached_property
    def names(self) -> list[str]:
        """The names of the network's parameters."""
        return [name for name, _ in self.state.unet.named_parameters()]

    @cached_property
    def parameters(self) -> list[Tensor]:
        """The network's parameters, in the order of `names`. To find them takes a millisecond of each step."""
        return list(self.state.unet.parameters())


def num_steps_left(run: Run, progress: Progress) -> int:
    """Return the number of steps from `progress` to the end of the run."""
    return math.ceil((run.total_images - progress.images) / run.global_batch_size)


def describe_start(run: Run, progress: Progress, next_preview: int) -> str:
    """Return in words how large a run is, where it writes, and after which step there is something to look at."""
    last = progress.step + num_steps_left(run, progress)
    seen = f"{last * run.global_batch_size:,} images"
    if run.images.num_images is not None:
        seen += f", {last * run.global_batch_size / run.images.num_images:,.1f} epochs"
    begun = f"after step {progress.step:,} of {last:,}" if progress.step else f"for {last:,} steps"
    return (
        f"a network of {sum(p.numel() for p in run.parameters):,} parameters trains {begun} of "
        f"{run.global_batch_size:,} images ({seen}) on {device_name(run.device)}; it is written to {run.output_dir}, "
        f"the next preview after step {next_preview:,}"
    )


def print_once(processes: Processes, text: str) -> None:
    """Print a line above the progress bar, on the first process."""
    if processes.rank == 0:
        tqdm.write(text, file=sys.stderr)


@contextmanager
def naming_compilation(run: Run, is_first_step: bool) -> Iterator[None]:
    """Say that the first step compiles the network, and after the `with` block around it how long that took."""
    if not (is_first_step and run.config.compile):
        yield
        return
    text = "the first step compiles the network: a minute or more, less where that was done before"
    print_once(run.processes, text)
    started = time.perf_counter()
    yield
    print_once(run.processes, f"the network is compiled: {format_duration(time.perf_counter() - started)}")


def try_to_write(run: Run, write: Callable[[], Any]) -> bool:
    """Write a file that a run can do without, and return whether that succeeded."""
    try:
        write()
        return True
    except (OSError, SafetensorError) as error:
        text = f"a file could not be written, the run continues: {error}. {FREE_SPACE}"
        print_once(run.processes, text)
        send_alert(run, "a file could not be written", text)
        return False


def try_to_track(run: Run, track: Callable[[], None]) -> None:
    """Call a tracker; whatever it raises is printed and does not end the training."""
    try:
        track()
    except Exception as error:
        print_once(run.processes, f"a tracker failed, the run continues: {in_one_line(error, with_type=True)}")


def send_alert(run: Run, title: str, text: str) -> None:
    """Send an alert to the trackers that have alerts, as Trackio has; the dashboard shows it, or a webhook."""
    for tracker in run.trackers:
        if tracker.name == "trackio":
            try_to_track(run, lambda tracker=tracker: tracker.tracker.alert(title, text))


def track_values(run: Run, values: dict[str, Any], step: int) -> None:
    """Give the values that are known to all trackers that lack them."""
    for tracker in run.trackers:
        known_values = {
            name: value for name, value in values.items() if value is not None and lacks(run, tracker, step, name)
        }
        if known_values:
            try_to_track(run, lambda tracker=tracker, known=known_values: tracker.log(known, step=step))


def lacks(run: Run, tracker: Any, step: int, name: str) -> bool:
    """Return whether a tracker lacks a value: a resumed run takes steps again that it may hold."""
    return tracker.name not in run.tracked or not run.tracked[tracker.name].holds(step, name)
