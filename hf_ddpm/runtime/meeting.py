"""The ways between the processes of a run: they meet before they work, and one that is lost is told in one line.

Processes meet at the port MASTER_PORT of the machine MASTER_ADDR. Torch waits there for one that does not come as
long as for one that works, hours here, and in silence. Then each process opens connections to all others over gloo,
which takes the address that the name of its machine stands for. On many machines that is one of the machine itself,
as 127.0.1.1 in Debian's /etc/hosts, at which no other machine can reach it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from ipaddress import ip_address
from itertools import count
from pathlib import Path

import torch.distributed as dist

from hf_ddpm.runtime.errors import RunError, UsageError, in_one_line
from hf_ddpm.runtime.format import format_duration
from hf_ddpm.runtime.launch import environment_number, is_main_process, is_on_several_machines

MEETING_TIME = timedelta(minutes=10)
# A connection through which nothing comes for so long is lost.
LONGEST_SILENCE = timedelta(minutes=5)
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_GLOO_ERROR = re.compile(r"\[\S*/gloo/\S*:\d+\] (.+?)(?:\. This is typically .*)?$", re.DOTALL)
_PORTS = range(1, 65536)
# An agent of torchrun keeps what was said at an earlier meeting of the same processes.
_numbers = count()
_SECONDS_BETWEEN_TRIES = 0.2
# Of TEST-NET-1, in which there is no machine: what leads there leads out of this one.
_ADDRESS_ELSEWHERE = "192.0.2.1"


@contextmanager
def meeting(longest: timedelta = MEETING_TIME) -> Iterator[None]:
    """Meet the other processes that a launcher started, and keep the meeting point open for a `with` block.

    In the block they form the process groups that they work with.

    Args:
        longest: The longest time to wait for a process.

    Raises:
        UsageError: When the place where they meet is not known, or its port is in use.
        RunError: When a process does not come, or cannot be reached.
    """
    size, rank = environment_number("WORLD_SIZE", 1), environment_number("RANK", 0)
    if size == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    host, port = _meeting_point()
    time_text = format_duration(longest.total_seconds())
    remedy = "start all with the same MASTER_ADDR and MASTER_PORT, on machines that reach each other on every port"
    # An agent of torchrun keeps the meeting point open for its workers.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if is_on_several_machines():
        _choose_interface(host)
        if is_main_process():
            text = f"{size} processes meet at {host}:{port}; they wait for each other for {time_text}"
            interface = os.environ.get(INTERFACE_VARIABLE)
            through = "" if interface is None else f", and talk through the interface {interface}"
            print(text + through, file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        if is_host:
            _require_free(port)
        else:
            _wait_for(host, port, longest)
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=longest)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own_store = dist.PrefixStore(f"meeting-{attempt}-{next(_numbers)}", store)
        dist.init_process_group("gloo", store=own_store, rank=rank, world_size=size, timeout=longest)
        # One that closed its connections now could meet a process that is still opening its own.
        own_store.set(f"met-{rank}", "")
        own_store.wait([f"met-{other}" for other in range(size)], longest)
    except (RuntimeError, OSError, UnicodeError) as error:  # the last of a name that is none
        reason = in_one_line(error).partition(" Exception raised from")[0]
        raise RunError(
            f"process {rank} of {size} could not meet the others at {host}:{port}, after "
            f"{format_duration(time.monotonic() - started)}: {reason.rstrip('.')}; {remedy}"
        ) from error
    dist.destroy_process_group()
    yield


def limit_silence() -> None:
    """Let the connections of this process end when the other machine is out of reach for `LONGEST_SILENCE`.

    gloo has no such limit: where the network is cut, a process that waits for another one would wait for hours. Linux
    asks the other machine instead, and ends the connection if no answer comes. Other systems are left as they are.
    """
    folder = Path("/proc/self/fd")
    if not is_on_several_machines() or not folder.is_dir():
        return
    seconds = int(LONGEST_SILENCE.total_seconds())
    for name in os.listdir(folder):
        copy = -1
        try:
            copy = os.dup(int(name))
            connection = socket.socket(fileno=copy)  # options are those of the connection, not of the copy
        except OSError:  # no socket, or the descriptor of the list itself, which is closed
            if copy >= 0:
                os.close(copy)
            continue
        with closing(connection):
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds // 5)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds // 10)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)


@contextmanager
def explain_lost_process(remedy: str) -> Iterator[None]:
    """Raise what gloo and NCCL say of a process that is gone, or cannot be reached, as a RunError with a remedy.

    Args:
        remedy: What the user can do about it, a sentence or more.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no type of their own. Each begins with the place in its code.
        gloo = _GLOO_ERROR.match(str(error))
        if gloo is None and not isinstance(error, dist.DistError):
            raise
        reason = in_one_line(error) if gloo is None else " ".join(gloo[1].split())
        reason = reason.partition(" Exception raised from")[0].rstrip(".")
        lost = "the connection to another process is lost"
        what = "the processes cannot talk to each other" if gloo is None else lost
        raise RunError(f"{what}: {reason}. {remedy}") from error


def _meeting_point() -> tuple[str, int]:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UsageError(
                f"{name} must be set where WORLD_SIZE is {os.environ['WORLD_SIZE']}: start the command by `accelerate "
                "launch`, torchrun or srun, which set both"
            )
    port = environment_number("MASTER_PORT", 0)
    if port not in _PORTS:
        raise UsageError(f"MASTER_PORT must be in [1, 65535], got {port}: set another one for all processes")
    return os.environ["MASTER_ADDR"], port


def _require_free(port: int) -> None:
    """Check that no other program listens on the port.

    Raises:
        UsageError: One does.
        OSError: This process may not listen on it.
    """
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UsageError(
            f"MASTER_PORT must be a free port of the machine of process 0, got {port}, which is in use: set "
            "another one for all processes"
        ) from error


def _wait_for(host: str, port: int, longest: timedelta) -> None:
    """Wait until something listens on the port.

    Raises:
        OSError: Nothing did in time.
    """
    end = time.monotonic() + longest.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _choose_interface(host: str) -> None:
    """Let gloo use the network interface that leads to the other machines, unless the user has chosen one.

    It is the one that leads to `host`, where the processes meet. On that machine itself its name may stand for an
    address that others cannot reach; then it is the one that leads out of it.
    """
    if INTERFACE_VARIABLE in os.environ:
        return
    for target in (host, _ADDRESS_ELSEWHERE):
        address = _own_address(target)
        if address is not None and not ip_address(address).is_loopback:
            name = _interface_of(address)
            if name is not None:
                os.environ[INTERFACE_VARIABLE] = name
                return


def _own_address(target: str) -> str | None:
    """Return the address of this machine that others see when it sends to `target`; None if no way leads there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as sender:
            sender.connect(address)  # sends nothing
            return str(sender.getsockname()[0])
    except (OSError, UnicodeError):
        return None


def _interface_of(address: str) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address.partition("%")[0] == address for own in addresses):
            return name
    return None
