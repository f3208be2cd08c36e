"""The page of a model samples what the package samples, and runs where only its own files are."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import SpaceCard
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app as cli
from hf_ddpm.hub import space
from hf_ddpm.hub.readme import BEGIN, END
from hf_ddpm.hub.space_app.model import NOISELESS, NUM_SHOWN_STEPS
from hf_ddpm.hub.space_app.pictures import grid, picture
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.solvers import default_scheduler, named_scheduler, tuned_scheduler
from hf_ddpm.timesteps import SearchedTimesteps, write_searched
from tests.support.hub_server import HubServer, run_client
from tests.support.networks import smallest_unet_config

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "hf_ddpm[demo]"')

T, SEEDS = 20, [5, 6, 7]
SETTINGS: dict[str, dict[str, Any]] = {
    "v_prediction": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "epsilon": {"variance_type": "fixed_large"},
    "clipped to 2": {"clip_sample_range": 2.0},
    "sigmoid": {"beta_schedule": "sigmoid", "beta_end": 0.999, "prediction_type": "sample"},
    "learned_range": {"variance_type": "learned_range"},
    "learned": {"variance_type": "learned", "prediction_type": "sample"},
    "classes": {"prediction_type": "v_prediction"},
    "previous_sample": {"prediction_type": "previous_sample"},
    "tuned": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "saved with a solver": {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True, "predict_x0": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models, saved."""
    folders = {}
    for name, settings in SETTINGS.items():
        torch.manual_seed(0)
        channels, num_classes = 6 if name.startswith("learned") else 3, 4 if name == "classes" else None
        unet = UNet2DModel(**smallest_unet_config(3, out_channels=channels, num_class_embeds=num_classes))
        scheduler = DDPMScheduler.from_config(
            {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2", **settings}
        )
        folders[name] = tmp_path_factory.mktemp("models") / name
        if name == "tuned":
            scheduler = tuned_scheduler(scheduler.config)
        DDPMPipeline(unet, scheduler).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def app() -> Any:
    """The page; gradio, which takes seconds to import, is not imported while tests are collected."""
    return import_module("hf_ddpm.hub.space_app.app")


@cache
def load_with_package(folder: Path) -> tuple[DDPMPipeline, Any]:
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def sample_with_package(
    folder: Path, sampler: str, num_steps: int, labels: list[int] | None = None, deterministic: bool = False
) -> list[np.ndarray]:
    pipeline, config = load_with_package(folder)
    pipeline.scheduler = named_scheduler(sampler, config, num_steps)
    output = pipeline(
        batch_size=len(SEEDS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=num_steps,
        class_labels=labels,
        deterministic=deterministic,
    )
    return [np.asarray(image) for image in output.images]


def samplers_of(name: str) -> list[str]:
    if name == "tuned":
        return ["lcm"]
    return ["ddpm"] if name in ("sigmoid", "previous_sample") else [*UNTUNED_SCHEDULERS]


CASES = [
    *((name, sampler, T if name == "previous_sample" else 7) for name in SETTINGS for sampler in samplers_of(name)),
    *(("epsilon", sampler, T) for sampler in UNTUNED_SCHEDULERS),
]

# In a folder that holds the Space and nothing else. Importing a package of which there is None raises ImportError.
ALONE = """
import functools, json, sys
from pathlib import Path
folder = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(folder))
for name in ("accelerate", "datasets", "transformers", "matplotlib"):
    sys.modules[name] = None
import numpy, torch
torch.set_num_threads(1)
import app
from PIL import Image
load = functools.lru_cache(app.Model)
for name, model_folder, sampler, num_steps, labels in json.loads(sys.argv[2]):
    model = load(model_folder)
    images = model.sample(sampler, num_steps, [5, 6, 7], labels).images
    numpy.save(f"{name}-{sampler}-{num_steps}.npy", numpy.stack([numpy.asarray(image) for image in images]))
app.build(model_folder)
assert app.Handlers(model, 1).show_edits(None, 0.5, None, 1.0, 0, 2).count("<img") == 5
files = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "hf_ddpm"}
assert files and all(Path(file).resolve().is_relative_to(folder / "hf_ddpm") for file in files.values()), files
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sampling starts from")
def test_space_samples_what_the_package_samples_with_its_own_files_alone(folders: dict[str, Path], tmp_path: Path):
    out = tmp_path / "space"
    space.write_space(str(folders["epsilon"]), "me/photos", out)
    labels = {"classes": [3, 0, 1]}
    cases = [(name, str(folders[name]), *case, labels.get(name)) for name, *case in CASES]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-W", "ignore", "-c", ALONE, str(out), json.dumps(cases)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, sampler, num_steps in CASES:
        images = np.load(tmp_path / f"{name}-{sampler}-{num_steps}.npy")
        expected = sample_with_package(folders[name], sampler, num_steps, labels.get(name))
        assert np.array_equal(images, expected), (name, sampler, num_steps)


@pytest.mark.parametrize("name", SETTINGS)
def test_samplers_are_those_that_can_sample_the_model(app: Any, folders: dict[str, Path], name: str):
    model = app.Model(str(folders[name]))
    assert model.samplers[0] == default_scheduler(model.scheduler.config)
    assert {name for name in model.samplers if name != NOISELESS} == set(samplers_of(name))


@pytest.mark.slow
def test_sample_returns_some_states_of_the_first_image(app: Any, folders: dict[str, Path]):
    model, steps = app.Model(str(folders["epsilon"])), []
    samples = model.sample("ddim", T, SEEDS, on_step=lambda step, num_steps: steps.append((step, num_steps)))
    assert steps == [(step, T) for step in range(1, T + 1)]
    assert len(samples.states) == NUM_SHOWN_STEPS
    assert len(model.sample("ddim", 3, SEEDS).states) == 3
    t, x_t, x_0_hat = samples.states[0]
    assert t == T - 1
    assert torch.equal(x_t[0], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(SEEDS[0])))
    assert x_0_hat.shape == (1, 3, 8, 8)


@pytest.mark.slow
def test_sample_iterates_a_step_denoiser_alone_too(app: Any, folders: dict[str, Path]):
    model = app.Model(str(folders["previous_sample"]))
    assert model.samplers == ["ddpm", NOISELESS]
    images = model.sample(NOISELESS, 7, SEEDS).images  # however few steps are asked for
    expected = sample_with_package(folders["previous_sample"], "ddpm", T, deterministic=True)
    assert np.array_equal([np.asarray(image) for image in images], expected)


def test_sample_uses_searched_timesteps(app: Any, folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(folders["v_prediction"], folder)
    searched = SearchedTimesteps("dpmsolver++", (19, 4, 1), 0.1, 0.2, num_images=2, seed=0, reference_steps=10)
    write_searched(folder, [searched], weights_sha256(folder))
    model = app.Model(str(folder))
    assert [t for t, _, _ in model.sample("dpmsolver++", 3, SEEDS).states] == [19, 4, 1]


def test_add_noise_is_the_forward_process(app: Any, folders: dict[str, Path]):
    model = app.Model(str(folders["epsilon"]))
    scheduler, x_0 = DDPMPipeline.from_pretrained(folders["epsilon"]).scheduler, torch.rand(1, 3, 8, 8) * 2 - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))
    for t in (0, 1, 10, T - 1):
        assert torch.equal(model.add_noise(x_0, 3, t), scheduler.add_noise(x_0, eps, t))
    assert "SNR" in import_module("hf_ddpm.hub.space_app.actions").describe_noise_level(model, T - 1)


def test_from_image_makes_x_0_of_any_shape_and_mode(app: Any, folders: dict[str, Path]):
    model = app.Model(str(folders["epsilon"]))
    for mode in ("L", "RGB", "RGBA", "P"):
        x_0 = model.from_image(Image.new(mode, (30, 17), 0))
        assert x_0.shape == (1, 3, 8, 8)
        assert x_0.max() == x_0.min() == -1
    assert model.from_image(Image.new("RGB", (8, 8), (255, 255, 255))).unique().tolist() == [1]


def test_pictures_are_escaped_and_stand_in_a_grid():
    assert picture(Image.new("L", (28, 28)), "<t>").count("&lt;t&gt;") == 1
    assert grid([Image.new("RGB", (8, 8))] * 3, SEEDS).count("<img") == 3


@pytest.mark.slow
def test_write_space_writes_the_page_and_what_it_imports(app: Any, folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(folders["v_prediction"], folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A model\n")
    (folder / "config.yaml").write_text("hub_model_id: me/photos\n")
    out = tmp_path / "space"
    for _ in range(2):  # the second time over the first
        result = CliRunner().invoke(cli, ["space", str(folder), "me/demo", "--out", str(out)])
        assert result.exit_code == 0, result.output
        (out / "hf_ddpm/old.py").touch()
    (out / "hf_ddpm/old.py").unlink()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "app.py", "hf_ddpm", "requirements.txt"]

    modules = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("hf_ddpm/**/*.py")}
    assert {"hf_ddpm/scheduler.py", "hf_ddpm/pipeline.py", "hf_ddpm/solvers.py"} <= modules.keys()
    rooms = {name.split("/")[1] for name in modules if name.count("/") > 1}
    assert rooms == {"data", "hub", "recipes", "runtime"}
    of_hub = {name.removeprefix("hf_ddpm/hub/") for name in modules if name.startswith("hf_ddpm/hub/")}
    assert of_hub == {
        "__init__.py",
        *(f"space_app/{name}.py" for name in ("__init__", "actions", "model", "pictures")),
    }
    assert all((space.PACKAGE.parent / name).read_bytes() == content for name, content in modules.items())
    source, written = Path(app.__file__).read_text(), (out / "app.py").read_text()
    changed = [b for a, b in zip(source.splitlines(), written.splitlines(), strict=True) if a != b]
    assert changed == ['MODEL = os.environ.get("MODEL", "me/photos")  # a Hub id, or a folder']

    packages = ("diffusers", "gradio", "huggingface_hub", "numpy", "pillow", "pyyaml", "safetensors", "torch")
    assert (out / "requirements.txt").read_text().splitlines() == [
        "--extra-index-url https://download.pytorch.org/whl/cpu",
        *(f"{name}~={version(name).split('+')[0]}" for name in packages),
    ]

    card = SpaceCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["sdk"] == "gradio"
    assert data["sdk_version"] == version("gradio")
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert data["app_file"] == "app.py"
    assert data["models"] == ["me/photos"]
    assert data["license"] == "cc-by-4.0"
    assert len(data["short_description"]) <= 60
    assert "https://huggingface.co/me/photos" in card.text


def test_imported_modules_leave_out_what_only_type_checkers_import(tmp_path: Path):
    code = """
        from typing import TYPE_CHECKING
        from hf_ddpm.runtime import errors
        if TYPE_CHECKING:
            from hf_ddpm.training.config import TrainingConfig
        else:
            import hf_ddpm.runtime.seeds
        def draw():
            from hf_ddpm.recipes import names
    """
    (tmp_path / "script.py").write_text(dedent(code))
    paths = space.imported_modules(tmp_path / "script.py")
    names = {path.relative_to(space.PACKAGE).as_posix() for path in paths}
    assert {"__init__.py", "_version.py", "runtime/__init__.py", "runtime/errors.py"} <= names
    assert {"runtime/seeds.py", "recipes/__init__.py"} <= names
    assert not [name for name in names if name.startswith("training")]


def test_model_id_of_comes_from_the_run(folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(folders["epsilon"], folder)
    with pytest.raises(UsageError, match=r"by namespace/name, got None for .*upload the model, and give --model_id"):
        space.model_id_of(str(folder))
    with pytest.raises(UsageError, match="got 'photos'"):
        space.model_id_of(str(folder), "photos")
    (folder / "README.md").write_text(f'{BEGIN}\nDDPMPipeline.from_pretrained("me/of-the-card")\n{END}')
    assert space.model_id_of(str(folder)) == "me/of-the-card"
    (folder / "config.yaml").write_text("hub_model_id: me/photos\n")
    assert space.model_id_of(str(folder)) == "me/photos"
    assert space.model_id_of(str(folder), "me/other") == "me/other"
    assert space.model_id_of("google/ddpm-cifar10-32") == "google/ddpm-cifar10-32"


@pytest.mark.slow
def test_push_space_makes_one_commit_and_says_what_is_left_to_do(tmp_path: Path):
    files = {
        "app.py": "print()",
        "requirements.txt": "gradio",
        "README.md": "---\nsdk: gradio\n---\n",
        "hf_ddpm/scheduler.py": "",
        "hf_ddpm/runtime/files.py": "",
        "notes": "mine",
    }
    for name, content in files.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_text(content)
    code = """
        from pathlib import Path
        from huggingface_hub import HfApi
        from hf_ddpm.runtime.errors import UsageError
        from hf_ddpm.hub.space import push_space
        from hf_ddpm.runtime.errors import PushError
        HfApi().create_repo("alice/open", private=False)
        HfApi().create_repo("alice/photos", private=True)
        def push(*names, **settings):
            try:
                print(repr(push_space(Path("space"), *names, **settings)))
            except (UsageError, PushError) as error:
                print(repr(str(error)))
        push("demo", "alice/open")
        push("demo", "alice/open")
        Path("space/hf_ddpm/runtime/files.py").unlink()
        push("demo", "alice/open")
        push("seen", "alice/photos", public=True)
        push("seen", "alice/photos")
        push("demo", "alice/absent")
        push("bob/demo", "alice/open")
    """
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        said = [ast.literal_eval(line) for line in run_client(hub, dedent(code), tmp_path, "hf_alice").splitlines()]
        space, seen = hub.repo("alice/demo", "space"), hub.repo("alice/seen", "space")
        assert said[0] == said[1] == said[2] == f"{hub.url}/spaces/alice/demo"
    assert (space.private, space.sdk, seen.private) == (True, "gradio", False)
    assert [commit.title for commit in space.commits[1:]] == ["Show the model", "Show the model"]
    assert space.commits[1].files.keys() == {".gitattributes", *files} - {"notes"}
    assert space.files.keys() == {".gitattributes", *files} - {"notes", "hf_ddpm/runtime/files.py"}
    assert "alice/photos is private: add a secret HF_TOKEN" in said[3]
    assert "alice/seen exists and is public: give --public" in said[4]
    assert "must be on the Hub, where the Space loads it, got 'alice/absent'" in said[5]
    assert "the token may not write to bob/demo" in said[6]


@pytest.mark.slow
def test_demo_and_space_refuse_what_cannot_be_shown(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "app.py").write_text("mine\n")
    result = CliRunner().invoke(cli, ["demo", str(tmp_path)])
    assert result.exit_code == 2
    assert "model_index.json" in result.output
    assert "has not saved its model yet" in result.output
    with pytest.raises(UsageError, match="or a Hub id, which is NAMESPACE/NAME, got 'nothing'"):
        space.run_demo("nothing")
    with pytest.raises(UsageError, match=r"a new folder or one of a Space, got .*another app\.py"):
        space.write_space(str(folders["epsilon"]), "me/photos", tmp_path)
    assert (tmp_path / "app.py").read_text() == "mine\n"
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        f"from hf_ddpm.cli import app; app(['demo', {str(folders['epsilon'])!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'pip install "hf_ddpm[demo]"' in result.stderr
