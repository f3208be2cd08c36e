"""The meeting of processes before they work, and what they find out there."""

import os
import re
import socket
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.launch import LAUNCHER_VARIABLES, MPI_VARIABLES, RANK_VARIABLES
from hf_ddpm.runtime.meeting import (
    INTERFACE_VARIABLE,
    LONGEST_SILENCE,
    _choose_interface,
    explain_lost_process,
    limit_silence,
    meeting,
)
from tests.support.forks import python

KNOWN = (*RANK_VARIABLES, *LAUNCHER_VARIABLES, *MPI_VARIABLES, "LOCAL_WORLD_SIZE", INTERFACE_VARIABLE)
SECOND = timedelta(seconds=1)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def place(rank: int, port: int, size: int = 2) -> dict[str, str]:
    """The environment of a process that works on a machine of its own."""
    others = {name: value for name, value in os.environ.items() if name not in KNOWN}
    own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {**others, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}


def meet(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", environment)
    with meeting(SECOND):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "reason"), [(0, "1/2 clients joined"), (1, "Connection refused")])
def test_process_that_does_not_come_is_told_in_one_line(rank, reason, monkeypatch):
    port = free_port()
    with pytest.raises(RunError) as error:
        meet(place(rank, port), monkeypatch)
    text = str(error.value)
    assert re.match(rf"process {rank} of 2 could not meet the others at 127\.0\.0\.1:{port}, after \d+ s: ", text)
    assert reason in text
    assert "\n" not in text
    assert not dist.is_initialized()


def test_meeting_point_must_be_free_and_known(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"MASTER_PORT must be a free port .* got {port}, which is in use"):
            meet(place(0, port), monkeypatch)
    with pytest.raises(UsageError, match=r"MASTER_PORT must be in \[1, 65535\], got 70000"):
        meet(place(0, 70000), monkeypatch)
    with pytest.raises(RunError, match=r"could not meet the others at a\.\.b:"):
        meet({**place(1, port), "MASTER_ADDR": "a..b"}, monkeypatch)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(UsageError, match=f"{name} must be set where WORLD_SIZE is 2"):
            meet({**place(0, port), name: ""}, monkeypatch)
    with pytest.raises(RunError, match=r"at no\.such\.machine\.invalid:\d+, after .* s: .*(known|resolution)"):
        meet({**place(1, port), "MASTER_ADDR": "no.such.machine.invalid"}, monkeypatch)


def test_one_process_meets_nobody(monkeypatch):
    meet({**place(0, 0, size=1), "MASTER_ADDR": "no.such.machine.invalid"}, monkeypatch)


def test_interface_leads_to_other_machines(monkeypatch):
    """gloo would take the address of the machine's own name, which may be one that others cannot reach."""
    outer = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    }
    for host in ("127.0.0.1", *outer):
        monkeypatch.setattr(os, "environ", {})
        _choose_interface(host)
        chosen = os.environ.get(INTERFACE_VARIABLE)
        assert chosen in (outer.values() if host.startswith("127.") and outer else [outer.get(host)])
    monkeypatch.setattr(os, "environ", {INTERFACE_VARIABLE: "mine"})
    _choose_interface("127.0.0.1")
    assert os.environ == {INTERFACE_VARIABLE: "mine"}


@pytest.mark.skipif(sys.platform != "linux", reason="options of Linux")
def test_connection_to_a_machine_out_of_reach_ends(monkeypatch):
    """A cut network says nothing: without a limit the process waits for hours, see benchmarks/machines."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as own:
        before = os.listdir("/proc/self/fd")
        monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
        limit_silence()
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"})
        limit_silence()
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * LONGEST_SILENCE.total_seconds()
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < LONGEST_SILENCE.total_seconds()
        assert os.listdir("/proc/self/fd") == before
        own.send(b"as before")


def test_only_a_lost_process_is_told_as_one():
    gloo = "[/src/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:80: Connection timed out"
    for error in (RuntimeError(f"{gloo}. This is typically caused by\nbugs"), dist.DistBackendError("NCCL")):
        with pytest.raises(RunError) as told, explain_lost_process("Start again."):
            raise error
        reason = "the processes cannot talk to each other: NCCL"
        if not isinstance(error, dist.DistError):
            reason = f"the connection to another process is lost: {gloo.partition('] ')[2]}"
        assert str(told.value) == f"{reason}. Start again."
    with pytest.raises(RuntimeError, match="shapes") as other, explain_lost_process(""):
        raise RuntimeError("shapes")
    assert not isinstance(other.value, RunError)


def train_on_two_machines(tmp_path: Path, *flags: str, code: str = "") -> list[str]:
    """Train in two processes, each in a folder of its own, and return the last line of each; both end with code 2.

    Args:
        flags: What the second one is told beyond what both are.
        code: What it does before.
    """
    port, processes = free_port(), []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir(exist_ok=True)
        words = ["train", "--output_dir", "run", "--max_train_steps", "1", *(flags if rank == 1 else ())]
        command = f"{code if rank == 1 else ''}\nimport runpy, sys\nsys.argv[1:] = {words}\n"
        command += "runpy.run_module('hf_ddpm', run_name='__main__', alter_sys=True)"
        environment = {**place(rank, port), "ACCELERATE_USE_CPU": "true"}
        processes.append(python(["-c", command], folder, environment, folder / "said.txt"))
        processes[-1].start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [2, 2]
    assert [[path.name for path in (tmp_path / name).iterdir()] for name in "01"] == [["said.txt"]] * 2
    return [(tmp_path / str(rank) / "said.txt").read_text().splitlines()[-1] for rank in range(2)]


@pytest.mark.slow
def test_folder_that_machines_do_not_share_and_clocks_that_differ_are_found_out_before_the_first_step(tmp_path):
    lines = train_on_two_machines(tmp_path, code="import time; now = time.time; time.time = lambda: now() + 90")
    host = socket.gethostname()
    said = (tmp_path / "0" / "said.txt").read_text()
    assert re.search(rf"the clock of {host} is 1 min \d+ s ahead of that of {host}", said)
    assert all("output_dir must be a folder that all machines share, got 'run'" in line for line in lines)


@pytest.mark.slow
def test_settings_and_versions_of_all_processes_must_agree(tmp_path):
    lines = train_on_two_machines(tmp_path, "--learning_rate", "0.5")
    assert all("settings must be the same in all processes, got learning_rate = " in line for line in lines)
    assert all("and 0.5 in process 1" in line for line in lines)
    about = tmp_path / "other" / "diffusers-0.1.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.1\n")
    lines = train_on_two_machines(tmp_path, code=f"import sys; sys.path.insert(0, {str(tmp_path / 'other')!r})")
    assert all("versions must be the same in all processes, got diffusers = " in line for line in lines)
    assert all("and '0.1' in process 1" in line for line in lines)
