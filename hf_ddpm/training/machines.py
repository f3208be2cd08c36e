"""What the processes of a run must have in common, on one machine or several, found out before the first step."""

from __future__ import annotations

import platform
import socket
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_ddpm._version import __version__
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.format import format_duration
from hf_ddpm.runtime.launch import is_on_several_machines
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.settings import settings_of
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.run import print_once

# Settings of the machine. Paths may differ, too: what they hold is compared when it is read.
_OWN_SETTINGS = ("hub_token", "local_rank", "cpu_threads_per_process")
_PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "numpy")
_LONGEST_CLOCK_SECONDS = 10


def check_machines(config: TrainingConfig, processes: Processes) -> None:
    """Check that all processes have the same settings, and all machines the same versions and output folder.

    Raises:
        UsageError: They have not.
    """
    if processes.size == 1:
        return
    _require_equal(processes, "settings", "start all processes by the same command", _common_settings(config))
    if not is_on_several_machines():
        return
    _require_equal(processes, "versions", "install the same ones on all machines", _versions())
    _compare_clocks(processes)
    if not config.dry_run:
        processes.require_shared_folder("output_dir", Path(config.output_dir))


def _common_settings(config: TrainingConfig) -> dict[str, Any]:
    names = [name for name, _, info in settings_of(config) if not info.is_path and name not in _OWN_SETTINGS]
    return {name: getattr(config, name) for name in names}


def _versions() -> dict[str, Any]:
    packages = {package: version(package) for package in _PACKAGES}
    return {"Python": platform.python_version(), "hf_ddpm": __version__, **packages}


def _require_equal(processes: Processes, what: str, remedy: str, values: dict[str, Any]) -> None:
    everyones = processes.gather(lambda: (socket.gethostname(), values))
    host, firsts = everyones[0]
    for rank, (other_host, others) in enumerate(everyones):
        for name, first in firsts.items():
            if others[name] != first:
                raise UsageError(
                    f"{what} must be the same in all processes, got {name} = {first!r} in process 0 on {host} and "
                    f"{others[name]!r} in process {rank} on {other_host}: {remedy}"
                )


def _compare_clocks(processes: Processes) -> None:
    """Say which clocks of machines differ. Nothing that is computed depends on them."""
    processes.gather(lambda: None)  # so that all look at once
    clocks = processes.gather(lambda: (time.time(), socket.gethostname()))
    (first, first_host), (last, last_host) = min(clocks), max(clocks)
    if last - first > _LONGEST_CLOCK_SECONDS:
        print_once(
            processes,
            f"the clock of {last_host} is {format_duration(last - first)} ahead of that of {first_host}, and the "
            "times of files and of trackers with it: set them, by NTP for example",
        )
