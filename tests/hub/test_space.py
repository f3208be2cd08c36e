"""The page of a model samples what the package samples, needs nothing of it, and shows in a browser without errors."""

import ast
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import SpaceCard
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("gradio")

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app as cli
from hf_ddpm.hub import space
from hf_ddpm.hub.readme import BEGIN, END
from hf_ddpm.hub.space_app import app
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.sampler import sample_images
from hf_ddpm.sampling.schedulers import SCHEDULERS, default_scheduler, named_scheduler
from tests.support.hub_server import HubServer, run_client
from tests.support.networks import tiny_unet_config

# So few steps that rounding, which random networks magnify at each, stays below a level.
T, SEEDS = 20, [5, 6, 7]
SETTINGS = {
    "v_prediction": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "epsilon": {"variance_type": "fixed_large"},
    "sample": {"prediction_type": "sample", "timestep_spacing": "linspace", "variance_type": "fixed_large_log"},
    "unclipped": {"prediction_type": "v_prediction", "clip_sample": False},
    "thresholded": {"prediction_type": "sample", "thresholding": True, "sample_max_value": 2.0},
    "zero_snr": {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    "sigmoid": {"beta_schedule": "sigmoid", "beta_end": 0.999, "prediction_type": "sample"},
    "learned_range": {"variance_type": "learned_range"},
    "learned": {"variance_type": "learned", "prediction_type": "sample"},
    "classes": {"prediction_type": "v_prediction"},
    "previous_sample": {"prediction_type": "previous_sample"},
    "saved with a solver": {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True, "predict_x0": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small random models, saved."""
    found = {}
    for name, settings in SETTINGS.items():
        torch.manual_seed(0)
        changes: dict = {"out_channels": 6} if name.startswith("learned") else {}
        changes |= {"num_class_embeds": 4} if name == "classes" else {}
        unet = UNet2DModel(**tiny_unet_config(3, **changes))
        scheduler = DDPMScheduler.from_config(
            {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2", **settings}
        )
        found[name] = tmp_path_factory.mktemp("models") / name
        DDPMPipeline(unet, scheduler).save_pretrained(found[name])
    return found


def ours(folder: Path, sampler: str, steps: int, **arguments) -> torch.Tensor:
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = named_scheduler(sampler, pipeline.scheduler.config, steps)
    images = sample_images(pipeline, SEEDS, batch_size=3, num_inference_steps=steps, **arguments)
    return (images * 255).round()


def levels(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in app.to_images(x)]).float()


CASES = [
    (name, sampler, steps)
    for name in SETTINGS
    for sampler in SCHEDULERS
    for steps in (7, T)
    if sampler == "ddpm" or name not in ("sigmoid", "previous_sample")
    if steps == T or name != "previous_sample"
]


@pytest.mark.parametrize(("name", "sampler", "steps"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:sampling starts from")
def test_the_page_samples_what_the_package_samples(folders, name, sampler, steps):
    model, labels = app.Model(str(folders[name])), [3, 0, 1] if name == "classes" else None
    assert sampler in model.samplers
    assert model.samplers[0] == default_scheduler(model.config)
    x_0, states = model.sample(sampler, steps, SEEDS, labels)
    expected = ours(folders[name], sampler, steps, class_labels=labels)
    assert (levels(x_0) - expected).abs().max() <= 1
    assert len(states) == min(steps, app.SHOWN_STEPS)
    assert torch.equal(states[0].x_t[0], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(SEEDS[0])))


def test_a_step_denoiser_is_iterated_alone_too(folders):
    model = app.Model(str(folders["previous_sample"]))
    assert model.samplers == ["ddpm", app.NOISELESS]
    x_0, _ = model.sample(app.NOISELESS, 7, SEEDS)  # however few steps are asked for
    assert (levels(x_0) - ours(folders["previous_sample"], "ddpm", T, deterministic=True)).abs().max() <= 1
    x_t = model._randn([torch.Generator().manual_seed(seed) for seed in SEEDS])
    with torch.no_grad():
        for t in reversed(range(T)):
            x_t = model.unet(x_t, t).sample
    torch.testing.assert_close(x_0, x_t, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["v_prediction", "epsilon", "sample", "learned_range", "previous_sample"])
def test_formulas_are_those_of_the_scheduler(folders, name):
    model = app.Model(str(folders[name]))
    scheduler = DDPMPipeline.from_pretrained(folders[name]).scheduler
    x_0, eps = torch.rand(1, 3, 8, 8) * 2 - 1, model.noise(3)
    assert torch.equal(eps, model.noise(3))
    assert not torch.equal(eps, model.noise(4))
    for t in (0, 1, 10, T - 1):
        x_t = model.add_noise(x_0, eps, t)
        torch.testing.assert_close(x_t, scheduler.add_noise(x_0, eps, t))
        target = scheduler.training_target(x_0, eps, t)
        expected = scheduler.predict_original(target, x_t, t)
        torch.testing.assert_close(model.predict_original(target, x_t, t), expected, rtol=1e-3, atol=1e-3)


def test_an_image_of_any_shape_and_mode_becomes_x_0(folders):
    model = app.Model(str(folders["epsilon"]))
    for mode in ("L", "RGB", "RGBA", "P"):
        x_0 = model.from_image(Image.new(mode, (30, 17), 0))
        assert x_0.shape == (1, 3, 8, 8)
        assert x_0.max() == x_0.min() == -1
    assert model.from_image(Image.new("RGB", (8, 8), (255, 255, 255))).unique().tolist() == [1]


def test_small_images_are_enlarged_by_a_whole_factor():
    assert app.picture(torch.zeros(1, 1, 28, 28), "<t>").count("&lt;t&gt;") == 1
    assert app.grid(torch.zeros(3, 3, 8, 8), SEEDS).count("<img") == 3


# What a Space has, besides requirements.txt's packages and what they bring.
ALONE = """
import sys
for name in ("hf_ddpm", "accelerate", "datasets", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
torch.set_num_threads(1)
import app
model = app.Model(app.MODEL)
app.build(app.MODEL)
torch.save(model.sample("dpmsolver++", 7, [5, 6, 7])[0], "x_0.pt")
"""


def test_a_space_is_whole_and_needs_nothing_of_the_package(folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders["v_prediction"], folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A model\n")
    (folder / "config.yaml").write_text("hub_model_id: me/photos\n")
    out = tmp_path / "space"
    for _ in range(2):  # the second time over the first
        result = CliRunner().invoke(cli, ["space", str(folder), "me/demo", "--out", str(out)])
        assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "app.py", "requirements.txt"]

    source, written = Path(app.__file__).read_text(), (out / "app.py").read_text()
    changed = [b for a, b in zip(source.splitlines(), written.splitlines(), strict=True) if a != b]
    assert changed == ['MODEL = os.environ.get("MODEL", "me/photos")  # a Hub id, or a folder']

    expected = ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    expected += [f"{name}~={version(name).split('+')[0]}" for name in ("torch", "diffusers", "gradio")]
    assert (out / "requirements.txt").read_text().splitlines() == expected

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

    environment = {**os.environ, "MODEL": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE], cwd=out, env=environment, check=True)
    x_0 = torch.load(out / "x_0.pt", weights_only=True)
    assert (levels(x_0) - ours(folder, "dpmsolver++", 7)).abs().max() <= 1


def test_the_models_id_comes_from_the_run(folders, tmp_path):
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


def test_a_space_is_pushed_in_one_commit_and_says_what_is_left_to_do(tmp_path):
    files = {
        "app.py": "print()",
        "requirements.txt": "gradio",
        "README.md": "---\nsdk: gradio\n---\n",
        "notes": "mine",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
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
                print(repr(push_space(Path("."), *names, **settings)))
            except (UsageError, PushError) as error:
                print(repr(str(error)))
        push("demo", "alice/open")
        push("demo", "alice/open")
        push("seen", "alice/photos", public=True)
        push("seen", "alice/photos")
        push("demo", "alice/absent")
        push("bob/demo", "alice/open")
    """
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        said = [ast.literal_eval(line) for line in run_client(hub, dedent(code), tmp_path, "hf_alice").splitlines()]
        space, seen = hub.repo("alice/demo", "space"), hub.repo("alice/seen", "space")
        assert said[0] == said[1] == f"{hub.url}/spaces/alice/demo"
    assert (space.private, space.sdk, seen.private) == (True, "gradio", False)
    assert [commit.title for commit in space.commits[1:]] == ["Show the model"]
    assert space.files.keys() == {".gitattributes", "app.py", "requirements.txt", "README.md"}
    assert "alice/photos is private: add a secret HF_TOKEN" in said[2]
    assert "alice/seen exists and is public: give --public" in said[3]
    assert "must be on the Hub, where the Space loads it, got 'alice/absent'" in said[4]
    assert "the token may not write to bob/demo" in said[5]


def test_what_cannot_be_shown_is_refused_first(folders, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "app.py").write_text("mine\n")
    result = CliRunner().invoke(cli, ["demo", str(tmp_path)])
    assert result.exit_code == 2
    assert "model_index.json" in result.output
    assert "has not saved its model yet" in result.output
    with pytest.raises(UsageError, match="a folder or a Hub id, got 'nothing'"):
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


def test_a_browser_shows_it(folders, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from hf_ddpm.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "demo", str(folders["classes"]), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    playwright.expect.set_options(timeout=60_000)
    errors, hosts = [], set()
    with server, playwright.sync_playwright() as api:
        try:
            assert server.stdout is not None
            assert any(f"http://127.0.0.1:{port}" in line for line in server.stdout)
            page = api.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
            page.set_default_timeout(60_000)
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
            page.goto(f"http://127.0.0.1:{port}")

            image, sources = page.locator("#images img").first, []
            sources.append(image.get_attribute("src"))
            page.get_by_label("Seed", exact=True).fill("7")
            page.get_by_role("button", name="Sample").click()
            playwright.expect(image).not_to_have_attribute("src", sources[0])
            assert image.get_attribute("alt") == "seed 7"
            assert page.locator("#images img").count() == 16
            assert page.locator("#chain img").count() == 2 * (app.SHOWN_STEPS + 1)

            page.get_by_role("tab", name="Forward process").click()
            noised = page.locator("#noised img").last
            sources.append(noised.get_attribute("src"))
            page.get_by_label("range slider for Timestep t").press("End")
            playwright.expect(noised).to_have_attribute("alt", f"x_t, t = {T - 1}")
            assert noised.get_attribute("src") != sources[1]
            playwright.expect(page.locator("#numbers")).to_contain_text("dB")

            clean = page.locator("#noised img").first
            sources.append(clean.get_attribute("src"))
            Image.new("L", (30, 20), 128).save(tmp_path / "gray.png")
            page.locator("input[type=file]").set_input_files(tmp_path / "gray.png")
            playwright.expect(clean).not_to_have_attribute("src", sources[2])
        finally:
            server.terminate()
    assert errors == []
    assert hosts <= {f"127.0.0.1:{port}", ""}  # data: addresses have none
