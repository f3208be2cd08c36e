"""What README, the pages of `docs/` and the card tell people to type is what the package takes."""

import json
import re
import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from diffusers import UNet2DModel
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import hf_ddpm
from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.cli import app
from hf_ddpm.condition import Condition
from hf_ddpm.labels import Columns, values_of
from hf_ddpm.network import make_unet
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.runtime.settings import settings_of
from hf_ddpm.solvers import Sampler, tuned_scheduler
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.posthoc import TRACKED_STDS, snapshot_bytes, snapshot_path
from tests.support import pages
from tests.support.command_line import parse_config
from tests.support.hub_server import HubServer, run_client
from tests.support.networks import smallest_unet_config

LABEL_MODELS = ("angle-model", "slanted-model")
MODELS = ("ddpm-model", "ddpm-model-tuned", "clothes-model", "digits-2x", *LABEL_MODELS)
API = sorted((pages.ROOT / "docs/api").glob("*.md"))
COMMANDS = pages.distinct_commands()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    unet = UNet2DModel(**smallest_unet_config(channels=1))
    DDPMPipeline(unet, DDPMScheduler(timestep_spacing="trailing")).save_pretrained(folder)
    for images in (50, 100):
        write_atomically(
            snapshot_path(folder, images),
            snapshot_bytes(images, {std: dict(unet.named_parameters()) for std in TRACKED_STDS}),
        )
    unet.save_pretrained(folder / "guide")
    return folder


@pytest.fixture(scope="module")
def class_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class-model")
    unet = UNet2DModel(**smallest_unet_config(channels=1, num_class_embeds=4))
    pipeline = DDPMPipeline(unet, DDPMScheduler(timestep_spacing="trailing"))
    pipeline.classes = Classes(("shirt", "ankle boot", "bag"), has_unconditional=True)
    pipeline.save_pretrained(folder)
    unet.save_pretrained(folder / "guide")
    return folder


@pytest.fixture(scope="module")
def label_models(tmp_path_factory):
    """A model of numbers and one of two columns, by their names on the pages."""
    folder = tmp_path_factory.mktemp("label-models")
    config = folder / "unet.json"
    config.write_text(json.dumps(smallest_unet_config(channels=1)))
    angle, slant = (values_of(name, np.linspace(-1.5, 1.5, 9), True) for name in ("angle", "slant"))
    both = Columns((("digit", Classes(("3", "7"), True)), ("slant", slant)), has_unconditional=True)
    for name, labels in (("angle-model", angle), ("slanted-model", both)):
        unet = make_unet(1, (8, 8), labels=labels, model_config=str(config))
        pipeline = DDPMPipeline(unet, DDPMScheduler(timestep_spacing="trailing"))
        pipeline.labels = labels
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def conditional_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    unet = UNet2DModel(**smallest_unet_config(channels=1, in_channels=2))
    pipeline = ConditionalDDPMPipeline(unet, DDPMScheduler(timestep_spacing="trailing"))
    pipeline.condition = Condition(1, super_resolution=2)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline = DDPMPipeline(UNet2DModel(**smallest_unet_config(channels=1)), tuned_scheduler(scheduler.config))
    pipeline.kept_sampler = Sampler("lcm", 4)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def in_a_folder_with_a_model(model, class_model, label_models, conditional_model, tuned_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")  # parsing asks whether there is one
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "ddpm-model")
    shutil.copytree(class_model, "clothes-model")
    shutil.copytree(conditional_model, "digits-2x")
    shutil.copytree(tuned_model, "ddpm-model-tuned")
    for name in LABEL_MODELS:
        shutil.copytree(label_models / name, name)
    Image.linear_gradient("L").resize((4, 4)).save("small.png")
    Image.linear_gradient("L").resize((8, 8)).save("digit.png")
    Image.linear_gradient("L").resize((8, 8)).save("mask.png")


def arguments_of(command, program):
    """The words after `program`, two words or one; None if the command does not start it."""
    words = program.split()
    for i in range(len(command) - len(words) + 1):
        if command[i : i + len(words)] == words:
            return command[i + len(words) :]
    return None


def is_known(command):
    """Whether a command that starts nothing of ours does what it says: installs an extra that exists, and so on."""
    line = " ".join(command)
    if extra := re.fullmatch(r"pip install -e \.\[(\w+)\]", line):
        return f"\n{extra[1]} = [" in (pages.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if module := re.match(r"python -m (benchmarks\.\w+\.\w+)\b", line):
        return find_spec(module[1]) is not None
    return line in ("pip install -e .", "python -m pytest", "accelerate config", "hf auth login")


TRAINING = [c for c in COMMANDS if "train_accelerate.py" in c or c[:2] == ["hf-ddpm", "train"]]
OURS = [c for c in COMMANDS if c not in TRAINING and (c[0] == "hf-ddpm" or "hf_ddpm" in c)]
OTHERS = [c for c in COMMANDS if c not in TRAINING and c not in OURS]


@pytest.mark.parametrize("command", TRAINING, ids=" ".join)
@pytest.mark.usefixtures("in_a_folder_with_a_model")
def test_training_commands_parse(command):
    arguments = arguments_of(command, "train_accelerate.py") or arguments_of(command, "hf-ddpm train") or []
    shutil.rmtree("clothes-model")
    if "ddpm-model" not in arguments:
        shutil.rmtree("ddpm-model")
    for name in ("digits-2x", *LABEL_MODELS):  # which commands train
        shutil.rmtree(name)
    if "--config" in arguments:
        config = Path(arguments[arguments.index("--config") + 1])
        (config.parent / "checkpoint-500").mkdir(parents=True)
        config.write_text(f"output_dir: {config.parent}\n")
    assert parse_config(arguments)


@pytest.mark.parametrize("command", OURS, ids=" ".join)
@pytest.mark.usefixtures("in_a_folder_with_a_model")
def test_commands_run(command):
    arguments = arguments_of(command, "hf-ddpm") or arguments_of(command, "-m hf_ddpm") or []
    if "samples/000000.png" in arguments:  # what the command before it wrote
        Path("samples").mkdir()
        Path("digit.png").rename("samples/000000.png")
    if arguments[0] in ("sample", "edit", "average") and arguments[1] in MODELS:
        result = CliRunner().invoke(app, ["4" if word in ("64", "50000") else word for word in arguments])
        assert result.exit_code == 0, result.output
    elif arguments != ["--help"]:  # they need data, a feature network or the Hub
        group = get_command(app)
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_other_commands_are_known(command):
    assert is_known(command), (
        "give it a comment before its block, <!-- not run: reason -->, or say here what checks it"
    )


def python_blocks(page):
    # The test of README's section about sharing runs the block with a model of the Hub.
    on_hub = 'from_pretrained("me/digits")' if page == pages.README else None
    return [b for b in pages.blocks(page, "python") if b.reason is None and (on_hub is None or on_hub not in b.text)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages.PAGES if python_blocks(page)], ids=pages.name_of)
@pytest.mark.filterwarnings("ignore:alpha_bar_T")
@pytest.mark.usefixtures("in_a_folder_with_a_model")
def test_python_runs(page):
    """The blocks of a page share their names, as in a notebook."""
    names = {}
    for block in python_blocks(page):
        lines = "\n" * (block.line - 1)  # a traceback names the line of the page
        exec(compile(lines + pages.with_small_sizes(block.text), str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder_with_a_model")
def test_readme_sharing_and_loading_work(tmp_path, image_folder):
    section = pages.README.read_text(encoding="utf-8").partition("## Share it")[2].partition("\n## ")[0]
    lines = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()
    # Features of 24 images instead of 1,797, and of 8 instead of 5,000.
    few = {"--dataset_name digits": f"--dataset_name {image_folder}", "--num_images 5000": "--num_images 8"}
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
            if words[1] == "train":
                words = words[2:] + ["--max_train_steps=2", "--eval_batch_size=2", "--cache_dir=cache"]
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


@pytest.mark.parametrize("page", [*pages.PAGES, *API], ids=pages.name_of)
def test_pictures_and_links_exist(page):
    assert not [target for target in pages.links(page) if not (page.parent / target).exists()]


def test_api_reference_has_every_public_name():
    text = "\n".join(page.read_text(encoding="utf-8") for page in API)
    documented = re.findall(r"^\.\. auto(?:class|function|exception):: hf_ddpm\.(\w+)(?:\(.*\))?$", text, re.MULTILINE)
    assert sorted([*documented, "__version__"]) == sorted(hf_ddpm.__all__)


def test_table_of_settings_has_every_setting_once():
    table = runpy.run_path(str(pages.ROOT / "docs/_settings.py"))
    names = re.findall(r"^\| `(\w+)` \|", table["tables"](), re.MULTILINE)
    assert sorted(names) == sorted(name for name, _, _ in settings_of(TrainingConfig))
    assert table["PLACE"] in (pages.ROOT / "docs/settings.md").read_text(encoding="utf-8")
