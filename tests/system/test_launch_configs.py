"""What `accelerate launch --config_file launch_configs/*.yaml` tells the processes, and when a job is requeued."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hf_ddpm.runtime.signals import STOPPED
from tests.support.command_line import parse_config
from tests.support.forks import python

ROOT = Path(__file__).parents[2]
JOB = ROOT / "launch_configs/slurm.sbatch"
SAID = {
    "ddp": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D,Attention",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
}
# What would decide over the settings of the run.
LEFT_OUT = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_USE_CPU")
SCRIPT = """
import json, os, sys
from pathlib import Path
(Path(sys.argv[1]) / os.environ["RANK"]).write_text(json.dumps(dict(os.environ)))
"""


def test_every_launch_config_has_a_test():
    tested = {JOB.name, *(f"{name}.yaml" for name in SAID)}
    assert {path.name for path in (ROOT / "launch_configs").iterdir()} == tested


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_launch_config_trains(name, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    config = ROOT / f"launch_configs/{name}.yaml"
    assert f"accelerate launch --config_file launch_configs/{name}.yaml train_accelerate.py" in config.read_text()
    words = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    words += ["--num_processes", "2", "--main_process_port", "0", str(script), str(out)]
    launcher = python(words, tmp_path, None, tmp_path / "said.txt")
    launcher.start()
    launcher.join()
    assert launcher.exitcode == 0, (tmp_path / "said.txt").read_text()
    for rank in ("0", "1"):
        environment = json.loads((out / rank).read_text())
        assert environment["WORLD_SIZE"] == "2"
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
        assert {key: environment.get(key) for key in SAID[name]} == SAID[name]
        assert not [key for key in LEFT_OUT if environment.get(key, "none").lower() != "none"]
        engines = {key for key, value in environment.items() if key.startswith("ACCELERATE_USE_") and value == "true"}
        assert engines == {key for key in SAID[name] if key.startswith("ACCELERATE_USE_")}


@pytest.mark.parametrize("code", [0, 1, 2, STOPPED, 137, 143])
def test_job_that_was_stopped_is_requeued_and_no_other(code, tmp_path):
    """Programs named as SLURM's write down what they are asked for."""
    for name, ending in [("srun", f"exit {code}"), ("scontrol", "")]:
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $@" >> asked\n{ending}\n')
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", str(JOB)], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code
    started, *requeued = (tmp_path / "asked").read_text().splitlines()
    assert started.startswith("srun --cpus-per-task=8 hf-ddpm train")
    assert requeued == (["scontrol requeue 41"] if code in (STOPPED, 143) else [])


def test_job_resumes_its_run():
    command = re.search(r"hf-ddpm train (.*)", JOB.read_text())
    assert command is not None
    assert parse_config(shlex.split(command[1])).resume_from_checkpoint == "latest"
