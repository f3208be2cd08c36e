"""Processes that a launcher did not start."""

import sys
from importlib.util import find_spec

from hf_ddpm.runtime import launch


def test_missing_processes_are_started_for_a_module_too(monkeypatch):
    started = []
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.execv", lambda _, arguments: started.append(arguments))
    monkeypatch.setattr("sys.argv", ["sampling.py", "model"])
    line = ["accelerate", "launch", "--cpu", "--num_processes", "3", "-m", "hf_ddpm", "model"]
    parent = type("Parent", (), {"cmdline": lambda self: line})()
    monkeypatch.setattr(launch.psutil.Process, "parent", lambda self: parent)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", find_spec("hf_ddpm.__main__"))
    launch.start_missing_processes()
    assert started[0][-4:] == ["3", "-m", "hf_ddpm.__main__", "model"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    launch.start_missing_processes()
    assert started[1][-3:] == ["3", "sampling.py", "model"]
