"""`python -m hf_ddpm` is `hf-ddpm`: `accelerate launch -m hf_ddpm COMMAND` starts it in each of several processes."""

from __future__ import annotations

import sys

from hf_ddpm.cli import app
from hf_ddpm.runtime.launch import follow_launcher, start_missing_processes
from hf_ddpm.runtime.processes import share_cores


def main() -> None:
    """Close the gaps of launchers, then run the command line."""
    try:
        start_missing_processes()
    except ValueError as error:
        sys.exit(f"error: {error}")
    follow_launcher()
    share_cores()
    app(prog_name="hf-ddpm")


if __name__ == "__main__":
    main()
