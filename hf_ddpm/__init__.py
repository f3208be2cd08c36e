"""Train, measure and share pixel-space diffusion models on the Hugging Face stack.

`DDPMPipeline` and `DDPMScheduler` are imported when they are first asked for: `import hf_ddpm` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ddpm._version import __version__

if TYPE_CHECKING:
    from hf_ddpm.pipeline import DDPMPipeline
    from hf_ddpm.scheduler import DDPMScheduler

__all__ = ["DDPMPipeline", "DDPMScheduler", "__version__"]

_MODULE_OF = {"DDPMPipeline": "hf_ddpm.pipeline", "DDPMScheduler": "hf_ddpm.scheduler"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
