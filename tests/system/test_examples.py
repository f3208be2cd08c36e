"""The notebooks and the script in examples/ run from their first line to their last, at a small size."""

import ast
import json
import re
import runpy
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from tests.support.networks import smallest_unet_config

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
# Text of a notebook -> what a test writes in its place.
SMALL_RUN = (
    "load_config(max_train_steps=2, ddpm_num_steps=20, ddpm_num_inference_steps=4, eval_batch_size=4, "
    "train_batch_size=4, model_config_name_or_path='unet.json', cache_dir='cache', train_data_dir='images', "
    "output_dir="
)
SMALLER = {
    "train_in_two_minutes.ipynb": {
        'load_config(recipe="digits", output_dir=': SMALL_RUN,
        "batch_size=32": "batch_size=2",
        "num_inference_steps=50": "num_inference_steps=4",
    },
    "mathematics.ipynb": {"NUM_STEPS = 400": "NUM_STEPS = 2", "20_000": "200"},
    "use_measure_share.ipynb": {
        'load_config(recipe="digits", output_dir=': SMALL_RUN,
        "num_inference_steps=100": "num_inference_steps=10",
        "(5, 10, 20, 50)": "(2, 3)",
        "range(16)": "range(8)",
        "num_images=128": "num_images=8",
    },
}


def cells_of(name: str, kind: str = "code") -> list[dict]:
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def shown_by(code: str, namespace: dict):
    """Execute a cell as IPython does, without its magics, and return the value of its last line."""
    tree = ast.parse(re.sub(r"^( *)%.*", r"\1pass", code, flags=re.MULTILINE))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


@pytest.fixture
def without_token(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive", "ignore:alpha_bar_T")
def test_notebook_runs_and_shows_its_pictures(name, tmp_path, image_folder, monkeypatch, without_token, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(image_folder)
    (tmp_path / "unet.json").write_text(json.dumps(smallest_unet_config(channels=1)))
    codes = ["".join(cell["source"]) for cell in cells_of(name)]
    for text, smaller in SMALLER[name].items():
        assert any(text in code for code in codes), text
        codes = [code.replace(text, smaller) for code in codes]
    namespace = {}
    values = [shown_by(code, namespace) for code in codes]
    for picture in (value for value in values if isinstance(value, Image.Image)):
        picture.load()  # which closes its file
    pyplot.close("all")
    # What is stored was made by the same cells.
    for cell, value in zip(cells_of(name), values, strict=True):
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", ())}
        assert not isinstance(value, Image.Image | Figure) or "image/png" in kinds, "".join(cell["source"])
    if name == "use_measure_share.ipynb":
        assert "equal, bit for bit: True" in capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_holds_the_outputs_of_a_whole_run_in_order(name):
    cells = cells_of(name)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_installs_the_package_where_it_is_missing(name):
    condition, command = "".join(cells_of(name)[0]["source"]).splitlines()[-2:]
    assert condition.startswith('if importlib.util.find_spec("hf_ddpm") is None:')
    assert re.fullmatch(r'    %pip install -q ("hf_ddpm\[evaluation\]"|hf_ddpm)', command)


@pytest.mark.slow
def test_own_loop_saves_what_stock_diffusers_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"](1)
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path / "disks").unet) is diffusers.UNet2DModel
    assert "drew disks/samples.png" in capsys.readouterr().out
    with Image.open(tmp_path / "disks" / "samples.png") as picture:
        assert picture.size == (4 * 64 + 3 * 2, 4 * 64 + 3 * 2)
