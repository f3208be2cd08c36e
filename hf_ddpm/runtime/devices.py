"""Devices: which one to use, whether it is there, what it is called."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def require_device(device: str | torch.device) -> torch.device:
    """Raises: ValueError if torch has no such device here."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without it
        reason = " ".join(str(error).split())
        raise ValueError(f"device must be one that torch finds here, as cpu, got {str(device)!r}: {reason}") from error
    return place


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name(device: torch.device) -> str:
    """The processor that trained, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return (
        f"{name}, {torch.get_num_threads()} threads per process" if device.type == "cpu" else f"{device.type} {name}"
    )
