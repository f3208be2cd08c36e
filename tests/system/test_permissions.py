"""Paths that the user who calls may not look at, and those that no system can: one line names the setting.

Whoever may read everything runs these as another user, in a process of its own.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from hf_ddpm.cli import app
from tests.support.forks import Process
from tests.support.networks import smallest_unet_config

NOBODY = 65534
LONG = "x" * 5000
pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")


@pytest.fixture
def place():
    """A folder that every user may write to; what pytest makes is for its own user alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    for name in ("locked", "open", "run", "readme"):
        (folder / name).mkdir()
    for name in ("locked", "open"):
        Image.new("L", (8, 8)).save(folder / name / "a.png")
    (folder / "model.json").write_text(json.dumps(smallest_unet_config(channels=1)))
    (folder / "settings.yaml").write_text("max_train_steps: 1\n")
    (folder / "run" / "config.yaml").write_text("max_train_steps: 1\n")
    (folder / "run" / "checkpoint-1").mkdir()
    (folder / "readme" / "README.md").write_text("# mine\n")
    for path in ("model.json", "settings.yaml", "run/config.yaml", "readme/README.md", "locked/a.png"):
        (folder / path).chmod(0)
    (folder / "locked").chmod(0)
    yield folder
    (folder / "locked").chmod(0o700)
    shutil.rmtree(folder)


def answers(place: Path, commands: list[list[str]], out: Path) -> None:
    """Run commands one after the other as a user of no rights, and write what each said."""
    if os.geteuid() == 0:
        for path in (place / "run", place / "readme", place / "open"):
            os.chown(path, NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.chdir(place)
    huggingface_hub.constants.HF_HOME = str(place / "hf")
    huggingface_hub.constants.HF_TOKEN_PATH = str(place / "locked" / "token")
    for number, command in enumerate(commands):
        with open(out / f"{number}.txt", "w") as said:
            sys.stdout = sys.stderr = said
            try:
                app(command, prog_name="hf-ddpm")
            except SystemExit as end:
                print(f"exit {end.code}")
            except BaseException as error:
                print(f"Traceback: {type(error).__name__}: {error}")


CASES = [
    ("--train_data_dir locked", "train_data_dir must be readable, got 'locked': you lack the permission"),
    ("--dataset_name locked/a", "dataset_name must be a path that can be looked at, got 'locked/a': Perm"),
    ("--train_data_dir open --output_dir locked/run", "output_dir must be a path that can be looked at"),
    ("--output_dir locked", "output_dir must be readable"),
    ("--output_dir /", "output_dir must be a folder that can be written, got '/'"),
    ("--config settings.yaml", "config must be readable, got 'settings.yaml'"),
    ("--config locked/settings.yaml", "config must be a path that can be looked at"),
    ("--model_config_name_or_path model.json", "model_config_name_or_path must be readable, got 'model.json'"),
    ("--init_from locked", "init_from must be readable, got 'locked'"),
    ("--init_from locked/model", "init_from must be a path that can be looked at"),
    ("--cache_dir locked/cache", "cache_dir must be a path that can be looked at"),
    ("--cache_dir locked", "cache_dir must be readable"),
    ("--cache_dir /sys/cache --train_data_dir open", "cache_dir must be a folder that can be written"),
    ("--output_dir run --resume_from_checkpoint latest", "config must be readable, got 'run/config.yaml'"),
    ("--output_dir readme", "README.md cannot be read: [Errno 13] Permission denied"),
    (f"--output_dir {LONG}", "output_dir must be a path that can be looked at"),
    (f"--train_data_dir {LONG}", "train_data_dir must be a path that can be looked at"),
    (f"--dataset_name {LONG}", "dataset_name must be a path that can be looked at"),
    (f"--init_from {LONG}", "init_from must be a path that can be looked at"),
    (f"--model_config_name_or_path {LONG}", "model_config_name_or_path must be a path that can be looked at"),
    (f"--config {LONG}", "config must be a path that can be looked at"),
    (f"--cache_dir {LONG}", "cache_dir must be a path that can be looked at"),
    ("--output_dir ~nobody-of-that-name/x", "output_dir must be a path of a user of this machine"),
    ("--train_data_dir ~nobody-of-that-name", "train_data_dir must be a path of a user of this machine"),
    ("--output_dir=", "output_dir must not be empty"),
    ("--train_data_dir=", "train_data_dir must not be empty"),
]
OTHERS = [
    ("sample locked --out x", "model must be readable, got 'locked'"),
    ("sample locked/model --out x", "model must be a path that can be looked at"),
    (f"sample {LONG} --out x", "model must be a path that can be looked at"),
    ("evaluate locked", "model must be readable"),
    ("schedule locked/m", "model must be a path that can be looked at"),
    ("reference open --out locked/x", "out must be a path that can be looked at"),
    ("reference locked --out x", "dataset_name must be readable"),
    ("info locked", "model must be readable"),
    ("info locked/m", "model must be a path that can be looked at"),
    ("average locked --std 0.1", "Invalid value for 'run': path 'locked' is not readable"),
    ("push locked name", "Invalid value for 'run': path 'locked' is not readable"),
    ("space locked me/space --model_id me/model --out x", "model must be readable"),
]


@pytest.mark.slow
def test_what_may_not_be_looked_at_is_named_in_a_line(place, tmp_path):
    commands = [["train", "--max_train_steps", "1", *case.split()] for case, _ in CASES]
    commands += [case.split() for case, _ in OTHERS]
    out = Path(tempfile.mkdtemp(dir=place))
    out.chmod(0o777)
    child = Process(target=answers, args=(place, commands, out))
    child.start()
    child.join()
    wrong = []
    for number, (case, message) in enumerate([*CASES, *OTHERS]):
        said = (out / f"{number}.txt").read_text()
        lines = [line for line in said.splitlines() if "examples/s" not in line]
        if not (len(lines) == 2 and lines[0].startswith("error: ") and message in lines[0] and lines[1] == "exit 2"):
            wrong.append(f"{case[:80]}: {said[:600]}")
    assert not wrong, "\n".join(wrong)
    assert not (place / "ddpm-model").exists()
