"""What `accelerate launch` starts: parse the settings, train."""

import sys

from hf_ddpm.config import UsageError, parse_config

if __name__ == "__main__":
    config = parse_config()
    # After parsing, so that a wrong flag is answered before torch is imported.
    from hf_ddpm.training import train

    try:
        train(config)
    except UsageError as error:
        sys.exit(f"error: {error}")
