"""Train, measure and share pixel-space diffusion models on the Hugging Face stack.

The public names are imported when they are first asked for: `import hf_ddpm` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ddpm._version import __version__

if TYPE_CHECKING:
    from hf_ddpm.bound import variational_bound
    from hf_ddpm.conditional import ConditionalDDPMPipeline
    from hf_ddpm.display import plot_metrics, show
    from hf_ddpm.editing import DDPMImg2ImgPipeline, DDPMInpaintPipeline
    from hf_ddpm.evaluation.evaluate import evaluate
    from hf_ddpm.evaluation.search import search_timesteps
    from hf_ddpm.guidance import Guidance
    from hf_ddpm.hub.card import write_card
    from hf_ddpm.hub.upload import push
    from hf_ddpm.objective import Objective
    from hf_ddpm.pipeline import DDPMPipeline
    from hf_ddpm.runtime.errors import PushError, RunError, UsageError
    from hf_ddpm.sampling.image_set import write_samples as sample
    from hf_ddpm.scheduler import DDPMScheduler
    from hf_ddpm.training.config import TrainingConfig
    from hf_ddpm.training.loop import train
    from hf_ddpm.training.parsing import load_config

__all__ = [
    "ConditionalDDPMPipeline",
    "DDPMImg2ImgPipeline",
    "DDPMInpaintPipeline",
    "DDPMPipeline",
    "DDPMScheduler",
    "Guidance",
    "Objective",
    "PushError",
    "RunError",
    "TrainingConfig",
    "UsageError",
    "__version__",
    "evaluate",
    "load_config",
    "plot_metrics",
    "push",
    "sample",
    "search_timesteps",
    "show",
    "train",
    "variational_bound",
    "write_card",
]

# A public name -> its module, and its name there.
_PUBLIC = {
    "ConditionalDDPMPipeline": ("hf_ddpm.conditional", "ConditionalDDPMPipeline"),
    "DDPMImg2ImgPipeline": ("hf_ddpm.editing", "DDPMImg2ImgPipeline"),
    "DDPMInpaintPipeline": ("hf_ddpm.editing", "DDPMInpaintPipeline"),
    "DDPMPipeline": ("hf_ddpm.pipeline", "DDPMPipeline"),
    "DDPMScheduler": ("hf_ddpm.scheduler", "DDPMScheduler"),
    "Guidance": ("hf_ddpm.guidance", "Guidance"),
    "Objective": ("hf_ddpm.objective", "Objective"),
    "PushError": ("hf_ddpm.runtime.errors", "PushError"),
    "RunError": ("hf_ddpm.runtime.errors", "RunError"),
    "TrainingConfig": ("hf_ddpm.training.config", "TrainingConfig"),
    "UsageError": ("hf_ddpm.runtime.errors", "UsageError"),
    "evaluate": ("hf_ddpm.evaluation.evaluate", "evaluate"),
    "load_config": ("hf_ddpm.training.parsing", "load_config"),
    "plot_metrics": ("hf_ddpm.display", "plot_metrics"),
    "push": ("hf_ddpm.hub.upload", "push"),
    "sample": ("hf_ddpm.sampling.image_set", "write_samples"),
    "search_timesteps": ("hf_ddpm.evaluation.search", "search_timesteps"),
    "show": ("hf_ddpm.display", "show"),
    "train": ("hf_ddpm.training.loop", "train"),
    "variational_bound": ("hf_ddpm.bound", "variational_bound"),
    "write_card": ("hf_ddpm.hub.card", "write_card"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own_name = _PUBLIC[name]
    value = getattr(import_module(module), own_name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
