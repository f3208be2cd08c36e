"""Train a model: the script that `accelerate launch` starts. `hf-ddpm train` takes the same flags."""

from hf_ddpm.cli import app
from hf_ddpm.runtime.launch import take_token_from_argv

if __name__ == "__main__":
    app(["train", *take_token_from_argv()], prog_name="hf-ddpm")
