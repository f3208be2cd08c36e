"""What `accelerate launch` starts: parse the settings, train."""

import sys

from hf_ddpm.data.sources import check_source
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.launch import follow_launcher, hide, start_missing_processes
from hf_ddpm.training.parsing import parse_config

if __name__ == "__main__":
    config = parse_config()
    try:
        check_source(config, config.output_dir)
        start_missing_processes()
        follow_launcher()
        hide(config.hub_token)
        # After parsing, so that a wrong setting is answered before torch is imported.
        from hf_ddpm.training.loop import train

        train(config)
    except (UsageError, RunError) as error:
        sys.exit(f"error: {error}")
