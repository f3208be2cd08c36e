"""The loading of torch and diffusers, which is most of what a short command does."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Load modules in a `with` block while Python looks for no garbage, neither then nor later among what was loaded.

    torch and diffusers make 700,000 objects that stay, and Python visits them again and again as they become more:
    benchmarks/first_minute. A command loads them so; a program that imports the package decides for itself. Where
    nothing is new, all stays as it is.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
