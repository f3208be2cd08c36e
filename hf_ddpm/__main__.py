"""`python -m hf_ddpm` is `hf-ddpm`: `accelerate launch -m hf_ddpm COMMAND` starts it in each of several processes."""

from hf_ddpm.cli import app

if __name__ == "__main__":
    app(prog_name="hf-ddpm")
