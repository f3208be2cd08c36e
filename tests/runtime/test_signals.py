"""What asks a run to end, and what does not."""

import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from hf_ddpm.runtime.signals import LAUNCHER_ENDED, Output, StopRequest


def test_end_of_the_launcher_is_never_a_second_signal():
    if LAUNCHER_ENDED is None:
        pytest.skip("no such signal here")
    with StopRequest(None, 0.0) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(LAUNCHER_ENDED)
        assert stop.reason(0) == "SIGTERM was noticed"


def test_hangup_that_nohup_lets_be_ignored_ends_nothing(monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(None, 0.0) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason(0) is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_output_on_a_full_disk_is_dropped_and_ends_nothing():
    if not Path("/dev/full").exists():
        pytest.skip("no such device here")
    lost = []
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 closing it fails, too
    output = Output(full, lambda: lost.append(1))
    print("a line", file=output, flush=True)
    with suppress(OSError):
        full.close()
    assert not lost


def test_output_is_that_of_the_stream_and_given_back(capsys):
    streams = sys.stdout, sys.stderr
    with StopRequest(None, 0.0):
        print("heard")
        assert (sys.stdout.encoding, sys.stdout.isatty()) == (streams[0].encoding, streams[0].isatty())
    assert (sys.stdout, sys.stderr) == streams
    assert capsys.readouterr().out == "heard\n"
