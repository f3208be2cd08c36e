"""Train a model: the script that `accelerate launch` starts. `hf-ddpm train` takes the same flags."""

import sys

from hf_ddpm.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]], prog_name="hf-ddpm")
