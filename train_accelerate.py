"""What `accelerate launch` starts: parse the settings, train."""

import sys

from hf_ddpm.config import parse_config
from hf_ddpm.errors import RunError, UsageError
from hf_ddpm.launch import follow_launcher, hide, start_missing_processes
from hf_ddpm.sources import check_source

if __name__ == "__main__":
    config = parse_config()
    try:
        check_source(config)
        start_missing_processes()
        follow_launcher()
        hide(config.hub_token)
        # After parsing, so that a wrong setting is answered before torch is imported.
        from hf_ddpm.training import train

        train(config)
    except (UsageError, RunError) as error:
        sys.exit(f"error: {error}")
