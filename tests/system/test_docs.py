"""What README and the card tell people to type is what the package takes."""

import json
import re
import shlex
import shutil
from pathlib import Path
from textwrap import dedent

import pytest
from diffusers import UNet2DModel
from typer.main import get_command
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.training.posthoc import TRACKED_STDS, snapshot_bytes, snapshot_path
from tests.support.command_line import parse_config
from tests.support.hub_server import HubServer, run_client
from tests.support.networks import smallest_unet_config

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program):
    lines = [part for block in blocks("bash") for line in block.splitlines() for part in line.split(" && ")]
    return [shlex.split(line) for line in lines if line.startswith(program)]


@pytest.fixture(autouse=True)
def in_a_folder_with_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")  # parsing asks whether there is one
    monkeypatch.chdir(tmp_path)
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    unet = UNet2DModel(**smallest_unet_config(channels=1))
    DDPMPipeline(unet, scheduler).save_pretrained("ddpm-model")
    for images in (50, 100):
        write_atomically(
            snapshot_path(Path("ddpm-model"), images),
            snapshot_bytes(images, {std: dict(unet.named_parameters()) for std in TRACKED_STDS}),
        )


TRAINING = [c for c in [*commands("accelerate launch"), *commands("torchrun")] if "train_accelerate.py" in c]


@pytest.mark.parametrize("command", TRAINING, ids=" ".join)
def test_readme_training_commands_parse(command, tmp_path):
    shutil.rmtree("ddpm-model")
    arguments = command[command.index("train_accelerate.py") + 1 :]
    if "--config" in arguments:
        (tmp_path / "runs/photos/checkpoint-500").mkdir(parents=True)
        (tmp_path / "runs/photos/config.yaml").write_text("output_dir: runs/photos\n")
    assert parse_config(arguments)


@pytest.mark.parametrize("command", commands("hf-ddpm"), ids=" ".join)
def test_readme_commands_run(command):
    if command[1] in ("sample", "average") and command[2] == "ddpm-model":
        result = CliRunner().invoke(app, ["4" if word in ("64", "50000") else word for word in command[1:]])
        assert result.exit_code == 0, result.output
    else:  # they need data and a feature network
        group = get_command(app)
        group.commands[command[1]].make_context(command[1], command[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [code for code in blocks("python") if "me/digits" not in code], ids=lambda code: code.split("\n")[0]
)
@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_readme_python_runs(code, tmp_path):
    smaller = "max_train_steps=1, ddpm_num_steps=10, eval_batch_size=1, model_config_name_or_path='ddpm-model/unet'"
    code = code.replace("max_train_steps=200", smaller)
    code = code.replace("max_train_steps=20,", "max_train_steps=1, ddpm_num_steps=10, ddpm_num_inference_steps=2,")
    code = code.replace("(batch_size=16)", "(batch_size=2, num_inference_steps=10)")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_readme_sharing_and_loading_work(tmp_path, image_folder):
    section = README.partition("## Share it")[2].partition("\n## ")[0]
    lines = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()
    # Features of 24 images instead of 1,797, and of 8 instead of 64.
    few = {"--dataset_name digits": f"--dataset_name {image_folder}", "--num_images 64": "--num_images 8"}
    (index,) = (i for i, line in enumerate(lines) if " evaluate " in line)
    for words, fewer in few.items():
        assert words in lines[index]
        lines[index] = lines[index].replace(words, fewer)
    (tmp_path / "unet.json").write_text(json.dumps(smallest_unet_config(channels=1)))
    code = f"""
        import shlex
        from hf_ddpm.cli import app
        for line in {lines!r}:
            words = shlex.split(line)
            if words[0] == "accelerate":
                words = words[3:] + ["--max_train_steps=2", "--eval_batch_size=2", "--cache_dir=cache"]
                words += ["--no_save_figures"]
                if "--init_from" not in words:
                    words += ["--model_config_name_or_path=unet.json", "--ddpm_num_steps=4"]
                app(["train", *words], standalone_mode=False)
            else:
                app(words[1:], standalone_mode=False)
        example = {re.findall("```python(.*?)```", section, re.DOTALL)[0].strip()!r}
        exec(example.replace("batch_size=16", "batch_size=2, num_inference_steps=4"))
        assert len(images) == 2
    """
    with HubServer(tokens={"hf_me": "me"}) as hub:
        run_client(hub, dedent(code), tmp_path, "hf_me")
        repo = hub.repo("me/digits")
    assert repo.private
    assert "Step 2, 128 images" in [commit.title for commit in repo.commits]
    assert len(list((tmp_path / "shared").glob("0*.png"))) == 16
    assert (tmp_path / "measured" / "evaluation.json").is_file()
    assert "init_from: me/digits" in (tmp_path / "further" / "config.yaml").read_text()


def test_readme_pictures_and_links_exist():
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
