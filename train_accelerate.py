# /// script
# requires-python = ">=3.10,<3.15"
# # Until there is a release: "hf_ddpm @ git+https://..." with the address of a repository of your own.
# dependencies = ["hf_ddpm"]
#
# # `hf jobs uv run train_accelerate.py ...` starts with these; its flags count before them.
# [tool.hf-jobs]
# flavor = "t4-small"
# timeout = "2h"
# secrets = ["HF_TOKEN"]
# ///
"""Train a model: the script that `accelerate launch` starts. `hf-ddpm train` takes the same flags."""

from hf_ddpm.cli import app
from hf_ddpm.runtime.launch import take_token_from_argv

if __name__ == "__main__":
    app(["train", *take_token_from_argv()], prog_name="hf-ddpm")
