"""Devices: which one a process computes on, whether torch has it, and what it is called."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.launch import environment_number


def process_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device that this process computes on.

    Args:
        device: None: the CPU if `accelerate launch --cpu` says so, else the best there is. Of several CUDA devices,
            "cuda" and None are the one with the number of this process on its machine.

    Raises:
        ValueError: When torch does not find this device.
    """
    device = require_device(process_device_type() if device is None else device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", environment_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    return device


def process_device_type() -> str:
    """Return cpu if `accelerate launch --cpu` says so, else the best type there is; no device is touched."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return "cpu" if on_cpu else best_device()


def require_device(device: str | torch.device) -> torch.device:
    """Return the device of this name.

    Raises:
        ValueError: When torch does not find this device.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter if it was built without the device
        reason = in_one_line(error)
        raise ValueError(f"device must be one that torch finds here, as cpu, got {str(device)!r}: {reason}") from error
    return checked


def best_device() -> str:
    """Return cuda or mps if torch finds one, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device's memory, whoever holds them now; of a CPU those of the machine with its swap."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total + psutil.swap_memory().total


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that this process can have now; of a CPU those without swap.

    A limit on the memory of a group of processes, as containers and SLURM set it, counts where Linux shows it
    (cgroup v2).
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return min(
        [psutil.virtual_memory().available, *_left_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    )


def _left_in_groups(root: Path, membership: Path) -> Iterator[int]:
    """Yield the bytes that each limited group of this process has left, from its own to the outermost.

    Pages of files that nobody has used of late count as left: Linux takes them back.

    Args:
        root: The folder of all groups.
        membership: The file that names the group of this process.
    """
    try:
        lines = membership.read_text().splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
        for folder in (root / own, *(root / own).parents):
            limit = folder / "memory.max"
            if limit.is_file() and limit.read_text().strip() != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
                yield max(0, int(limit.read_text()) - used)
    except (OSError, ValueError):
        return


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16, by its flags.

    Of a CPU, `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2` in the environment count: they make it a smaller
    one, also for torch.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # With AVX-512 alone oneDNN takes bfloat16, too, and is slow.
    has_units = has_avx512() and torch.cpu._is_avx512_bf16_supported() if _is_x86() else True
    return has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_avx512() -> bool:
    """Return whether torch uses AVX-512 of the CPU."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def has_amx() -> bool:
    """Return whether the CPU has Intel's units for products of matrices."""
    return _is_x86() and torch.cpu._is_amx_tile_supported()


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "x86", "i386", "i686")


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile finds what it compiles a network with.

    Raises:
        UsageError: When there is no compiler, or a CPU's lacks Python's header files.
    """
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    names = [os.environ.get("CXX", default)]
    if device.type != "cpu":  # Triton takes one of C, too
        names += [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, names)):
        raise UsageError(
            f"compile needs a compiler of C++, got none called {names[0]!r}: install it (Debian: apt install g++), "
            "name one in CXX, or leave --compile out"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if device.type == "cpu" and not header.is_file():
        raise UsageError(
            f"compile needs the header files of Python, got no {header}: install them (Debian: apt install "
            "python3-dev), or leave --compile out"
        )


def device_name(device: torch.device) -> str:
    """Return the name that its maker gave the device; of a CPU also the number of threads per process."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if device.type != "cpu":
        return f"{device.type} {name}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads per process"
