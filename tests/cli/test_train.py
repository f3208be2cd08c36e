"""`hf-ddpm train` itself: several processes, one exit code, and what it says at its end."""

import json
import os
from pathlib import Path

import pytest

from hf_ddpm.runtime import launch
from tests.support.forks import python
from tests.support.networks import smallest_unet_config

ROOT = Path(__file__).parents[2]
LAUNCHERS = (*launch.RANK_VARIABLES, *launch.MPI_VARIABLES, *launch.LAUNCHER_VARIABLES)


@pytest.mark.slow
def test_run_of_two_processes_ends_once(tmp_path):
    file = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    (tmp_path / "unet.json").write_text(json.dumps(smallest_unet_config(channels=1)))
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = ["-m", "hf_ddpm", "train"]
    command += ["--dataset_name", "digits", "--output-dir", "run"]
    command += ["--model_config_name_or_path", "unet.json", "--ddpm_num_steps", "3", "--eval_batch_size", "2"]
    command += ["--max_train_steps", "2", "--train_batch_size", "2", "--lr_warmup_steps", "0", "--no_use_ema"]
    command += ["--ema_snapshots", "0", "--no_save_figures"]
    process = python(command, tmp_path, environment, tmp_path / "said.txt")  # the two that it starts are fresh ones
    process.start()
    process.join(600)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 0, said
    assert said.count("The model is in run, with its card") == 1
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["training"]["num_processes"] == 2
