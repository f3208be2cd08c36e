"""The tuning of a trained model for few sampling steps: its settings, and the teacher whose guidance it takes over.

`hf-ddpm tune` trains as `hf-ddpm train` does, from the weights of `init_from` and with the objective of `consistency`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.guidance import Guidance, combine
from hf_ddpm.hub.download import find_model
from hf_ddpm.labels import Labels
from hf_ddpm.network import accept_labels_in_any_type, compile_network, load_unet
from hf_ddpm.objective import Objective
from hf_ddpm.pipeline import GUIDE_FOLDER, check_guide
from hf_ddpm.prediction import hidden_labels
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training import sharding
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.finetuning import network_of, no_weaker_error, require_place_for_labels


@dataclass(frozen=True)
class Teacher:
    """A model as it was before it was tuned.

    Args:
        objective: How its network is evaluated.
        network: Its network.
        weaker: The weaker network of guidance; None: the network itself, without a label.
        labels: Its labels; None for a model without labels.
        guidance: How it is guided; None: it is not.
    """

    objective: Objective
    network: Any
    weaker: Any
    labels: Labels | None
    guidance: Guidance | None

    def __call__(
        self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Return the prediction, (B, C, H, W), guided where it is; see `ConsistencyObjective`."""
        x_t = x_t if condition is None else torch.cat([x_t, condition], dim=1)
        if self.guidance is None:
            return self.objective.output_of(self.network, x_t, t, class_labels)
        if self.weaker is None:
            assert self.labels is not None
            assert class_labels is not None
            hidden = hidden_labels(self.labels, len(x_t), x_t.device)
            # Both in one batch, which takes less time than two.
            both = torch.cat([x_t] * 2), torch.cat([t] * 2), torch.cat([class_labels, hidden])
            prediction, weaker = self.objective.output_of(self.network, *both).chunk(2)
        else:
            prediction, weaker = (
                self.objective.output_of(network, x_t, t, class_labels) for network in (self.network, self.weaker)
            )
        guided, _ = combine(self.guidance, prediction, weaker)
        if self.guidance.interval is None:
            return guided
        low, high = self.guidance.interval
        sigma = self.objective.scheduler.snr(t).rsqrt()
        return torch.where(((sigma > low) & (sigma <= high)).view(-1, 1, 1, 1), guided, prediction)


def open_teacher(
    config: TrainingConfig, scheduler: DDPMScheduler, labels: Labels | None, device: torch.device
) -> Teacher:
    """Load the model of `init_from`, frozen, with its weaker network if it is guided.

    Raises:
        UsageError: When it cannot be guided.
    """
    assert config.init_from is not None
    if labels is not None:  # also of images that were passed to `train`
        require_place_for_labels(config.init_from)
    unet = load_unet(network_of(config.init_from), f"init_from {config.init_from!r}")
    network = frozen(unet, device, config.compile is True)
    weaker = guidance = None
    if config.guidance_scale is not None and config.is_guided:
        interval: Any = None if config.guidance_interval is None else tuple(config.guidance_interval)
        guidance = Guidance(config.guidance_scale, interval)
        if needs_weaker(config, labels):
            weaker = _load_weaker(find_model(config.init_from)[0], config.init_from, unet)
            weaker = frozen(weaker, device, config.compile is True)
    objective = Objective(scheduler, autocast_dtype=sharding.AUTOCAST[config.mixed_precision or "no"])
    return Teacher(objective, network, weaker, labels, guidance)


def num_teachers(config: TrainingConfig, labels: Labels | None) -> int:
    """Return the number of frozen networks that a run holds beside the one that it trains."""
    return 0 if config.tuned_steps is None else 1 + needs_weaker(config, labels)


def needs_weaker(config: TrainingConfig, labels: Labels | None) -> bool:
    """Return whether the teacher is guided by a network of its own, as its labels leave it no unconditional one."""
    return config.is_guided and (labels is None or not labels.has_unconditional)


def checksum_of_teacher(config: TrainingConfig, labels: Labels | None, known: str | None) -> str | None:
    """Return the checksum of the weights that teach a run, its weaker network's after it; None: the run tunes nothing.

    Args:
        config: The settings.
        labels: The labels of the run; None: it has none.
        known: That of the start that a resumed run goes on from; None: the run is new.

    Raises:
        UsageError: When they are others than those.
    """
    if config.tuned_steps is None or config.init_from is None:
        return None
    folder, _ = find_model(config.init_from)
    parts = [weights_sha256(folder)] + [weights_sha256(folder / GUIDE_FOLDER)] * needs_weaker(config, labels)
    checksum = " ".join(part for part in parts if part)
    if known not in (None, checksum):
        raise UsageError(
            f"init_from must have the weights that it had when this run began, got others in {config.init_from!r}: "
            "bring them back, since they teach the run to its end"
        )
    return checksum


def frozen(unet: Any, device: torch.device, compile: bool) -> Any:
    """Return a network on a device that is not trained, and compiled if the trained one is."""
    accept_labels_in_any_type(unet)
    unet = unet.to(device).eval().requires_grad_(False)
    return compile_network(unet, unet, device) if compile else unet


def _load_weaker(folder: Path, model: str, network: Any) -> Any:
    """Load the weaker network in a model's folder.

    Raises:
        UsageError: When it keeps none.
    """
    if not (folder / GUIDE_FOLDER).is_dir():
        raise no_weaker_error(model)
    weaker = load_unet(folder / GUIDE_FOLDER, f"the folder {GUIDE_FOLDER!r} of {model!r}")
    check_guide(weaker, network)
    return weaker
