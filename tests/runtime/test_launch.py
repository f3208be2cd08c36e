"""Processes that are started, what they are told, and the one exit code of all of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.runtime import launch
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.launch import WAIT_VARIABLES, let_threads_sleep
from hf_ddpm.runtime.signals import STOPPED
from tests.support.forks import Process, python

WORKER = """
import ctypes, json, os, signal, sys, time
from pathlib import Path
from hf_ddpm.runtime.command_line import exit_code_of
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.launch import report_outcome, start_processes
from hf_ddpm.runtime.signals import StoppedOnPurpose, StopRequest

def work():
    code = start_processes()
    if code is not None:
        return code
    rank, action, folder = os.environ.get("RANK", "alone"), sys.argv[1], Path(sys.argv[2])
    signal_at_parent_end = ctypes.c_int(0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(2, ctypes.byref(signal_at_parent_end))  # PR_GET_PDEATHSIG
    told = {**os.environ, "signal_at_parent_end": signal_at_parent_end.value}
    (folder / rank).write_text(json.dumps(told))
    (folder / f"ready-{rank}").touch()
    # The launcher ends the others when one fails: no process may fail before all are here.
    while len(list(folder.glob("ready-*"))) < int(os.environ.get("WORLD_SIZE", "1")):
        time.sleep(0.05)
    if action == "fail" and rank == "1":
        raise RunError("no disk")
    if action == "usage":
        raise UsageError("a setting")
    if action == "stop":
        raise StoppedOnPurpose("asked")
    if action == "signal":
        with StopRequest(None, 0.0) as stop:
            os.write(1, b"listening\\n")  # at once: several write to one pipe
            while stop.reason(0) is None:
                time.sleep(0.05)
        raise StoppedOnPurpose("asked")

sys.exit(report_outcome(exit_code_of(work)))
"""
CONFIG = "compute_environment: LOCAL_MACHINE\ndistributed_type: {type}\nnum_processes: {count}\nuse_cpu: true\n"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function: action and accelerate's config -> the words of a worker, whose folder is tmp_path."""
    for name in (*launch.RANK_VARIABLES, *launch.MPI_VARIABLES, *launch.LAUNCHER_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parents[2]))
    (tmp_path / "worker.py").write_text(WORKER)

    def make(action: str, count: int) -> list[str]:
        file = tmp_path / "hf" / "accelerate" / "default_config.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CONFIG.format(type="MULTI_CPU" if count > 1 else "NO", count=count))
        return [str(tmp_path / "worker.py"), action, str(tmp_path)]

    return make


@pytest.fixture
def begin(command, tmp_path):
    """Return a function: the same -> the worker, as a process that has begun; the workers it starts are fresh ones."""

    def begin(action: str, count: int, errors: Path | None = None) -> Process:
        process = python(command(action, count), tmp_path, None, tmp_path / "said.txt", errors)
        process.start()
        return process

    return begin


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("action", "code"), [("finish", 0), ("stop", STOPPED), ("usage", 2), ("fail", 1)])
def test_all_processes_end_with_one_code(begin, action, code, tmp_path):
    process = begin(action, 2)
    process.join()
    assert process.exitcode == code, said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    for rank in ("0", "1"):
        environment = json.loads((tmp_path / rank).read_text())
        assert (environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("2", rank)
        assert environment["ACCELERATE_USE_CPU"] == "true"
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert not (tmp_path / "2").exists()


@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_gets_the_processes_it_left_out(command, tmp_path):
    launcher = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run([*launcher, *command("finish", 1)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert [environment["WORLD_SIZE"] for environment in told] == ["2", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signal_reaches_all_processes(begin, name, tmp_path):
    os.mkfifo(tmp_path / "said.txt")
    parent = begin("signal", 2, tmp_path / "complained.txt")
    with open(tmp_path / "said.txt") as pipe:
        assert [pipe.readline() for _ in range(2)] == ["listening\n"] * 2
        workers = psutil.Process(parent.pid).children(recursive=True)
        os.kill(parent.pid, getattr(signal, name))
        parent.join(60)
    assert parent.exitcode == STOPPED, (tmp_path / "complained.txt").read_text()
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_config_of_one_process_starts_none(begin, tmp_path):
    process = begin("finish", 1)
    process.join()
    assert process.exitcode == 0, said(tmp_path)
    told = json.loads((tmp_path / "alone").read_text())
    assert told["ACCELERATE_USE_CPU"] == "true"
    assert told["signal_at_parent_end"] == 0  # It does not end with the shell that started it.


def test_launched_process_starts_none(monkeypatch):
    for name in (*launch.MPI_VARIABLES, *launch.LAUNCHER_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name in launch.RANK_VARIABLES:
        monkeypatch.setenv(name, "0")
        assert launch.start_processes() is None
        monkeypatch.delenv(name)


class Parent:
    def __init__(self, *words):
        self.words = words

    def cmdline(self):
        return ["accelerate", "launch", "--cpu", *self.words]


@pytest.mark.parametrize(
    ("words", "number"), [(("--num_processes", "3"), 3), (("--num-processes=2", "--num_machines", "1"), 2)]
)
def test_missing_processes_of_accelerate_launch_are_counted(words, number, monkeypatch):
    told_of_several_on_cpu(monkeypatch, words)
    started = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    monkeypatch.setattr("sys.argv", ["train_accelerate.py", "--seed", "1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert launch.start_missing_processes() == 0
    assert started[0][-4:] == [str(number), "train_accelerate.py", "--seed", "1"]
    monkeypatch.setattr("sys.argv", ["hf-ddpm", "train"])
    launch.start_missing_processes()
    assert started[1][-4:] == [str(number), "-m", "hf_ddpm", "train"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", launch.__spec__)
    launch.start_missing_processes()
    assert started[2][-4:] == [str(number), "-m", "hf_ddpm.runtime.launch", "train"]


@pytest.mark.parametrize("words", [(), ("--num_processes", "4", "--num_machines", "2")])
def test_missing_processes_that_cannot_be_counted_are_refused(words, monkeypatch):
    told_of_several_on_cpu(monkeypatch, words)
    with pytest.raises(UsageError, match=r"torchrun --nproc_per_node N"):
        launch.start_missing_processes()


def told_of_several_on_cpu(monkeypatch, words):
    """Set what `accelerate launch --cpu` tells the one process that it starts of several."""
    for name in (*launch.RANK_VARIABLES, *launch.MPI_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(psutil.Process, "parent", lambda self: Parent(*words))
    monkeypatch.setattr(launch, "_signal_at_parent_end", lambda number: None)  # of the tests' own parent


def test_outcome_of_worker_is_written_for_its_parent(tmp_path, monkeypatch):
    monkeypatch.delenv(launch.OUTCOME_VARIABLE, raising=False)
    assert [launch.report_outcome(code) for code in (0, 1, STOPPED)] == [0, 1, STOPPED]
    monkeypatch.setenv(launch.OUTCOME_VARIABLE, str(tmp_path / "outcomes"))
    assert [launch.report_outcome(code) for code in (0, 1, STOPPED)] == [0, 1, 0]
    assert (tmp_path / "outcomes").read_text().split() == ["0", "1", "75"]


@pytest.mark.parametrize("form", [["--hub_token", "hf_secret"], ["--hub-token=hf_secret"], ["--hub_token"]])
def test_token_is_taken_from_argv(form, monkeypatch):
    words = ["train", "--seed", "1", *form]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert launch.take_token_from_argv() == words
    assert sys.argv == ["train.py", "train", "--seed", "1"]


def test_workers_find_the_token_in_the_environment_alone(monkeypatch):
    told_of_several_on_cpu(monkeypatch, ("--num_processes", "2"))
    seen = []
    monkeypatch.setattr("torch.distributed.run.main", lambda words: seen.append((words, os.environ["HF_TOKEN"])))
    monkeypatch.setattr("sys.argv", ["train_accelerate.py", "--hub_token", "hf_secret", "--seed", "1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    launch.take_token_from_argv()
    launch.start_missing_processes("hf_secret")
    ((words, token),) = seen
    assert words[-3:] == ["train_accelerate.py", "--seed", "1"]
    assert "hf_secret" not in " ".join(words)
    assert token == "hf_secret"
    assert os.environ.get("HF_TOKEN") != "hf_secret"


def test_main_process_speaks(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert launch.is_main_process()
    monkeypatch.setattr(os, "environ", {"RANK": "1"})
    assert not launch.is_main_process()


def test_commands_let_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch):
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert CliRunner().invoke(app, ["train", "--no_such_flag"]).exit_code != 0
    assert os.environ.pop("OMP_WAIT_POLICY") == "PASSIVE"
    assert os.environ.pop("GOMP_SPINCOUNT") == "5000"
    for name in WAIT_VARIABLES:
        monkeypatch.setenv(name, "1")
        let_threads_sleep()
        assert {other: os.environ[other] for other in WAIT_VARIABLES if other in os.environ} == {name: "1"}
        monkeypatch.delenv(name)
