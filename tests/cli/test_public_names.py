"""`import hf_ddpm`: the public names, and that no module of the package relies on them."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ddpm

PACKAGE = Path(hf_ddpm.__file__).parent
CLASSES = {
    "ConditionalDDPMPipeline",
    "DDPMImg2ImgPipeline",
    "DDPMInpaintPipeline",
    "DDPMPipeline",
    "DDPMScheduler",
    "Guidance",
    "Objective",
    "PushError",
    "RunError",
    "TrainingConfig",
    "UsageError",
}
FUNCTIONS = {
    "evaluate",
    "load_config",
    "plot_metrics",
    "push",
    "sample",
    "search_timesteps",
    "show",
    "train",
    "variational_bound",
    "write_card",
}


def test_public_names_are_classes_and_functions():
    assert set(hf_ddpm.__all__) == {*CLASSES, *FUNCTIONS, "__version__"}
    assert all(inspect.isclass(getattr(hf_ddpm, name)) for name in CLASSES)
    assert all(inspect.isfunction(getattr(hf_ddpm, name)) for name in FUNCTIONS)
    assert set(hf_ddpm.__all__) <= set(dir(hf_ddpm))
    with pytest.raises(AttributeError, match="no attribute 'DDIMPipeline'"):
        _ = hf_ddpm.DDIMPipeline


def test_no_module_hides_a_public_name():
    """An imported submodule becomes an attribute of the package: under a public name it would take its place."""
    assert not {path.stem for path in PACKAGE.iterdir()} & set(hf_ddpm.__all__)


def test_light_names_load_no_torch():
    code = """
import hf_ddpm, sys
hf_ddpm.load_config(recipe="digits"), hf_ddpm.TrainingConfig(), hf_ddpm.UsageError, hf_ddpm.__version__
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_a_public_name(path):
    """A module that took one from `hf_ddpm` would import, unseen by any check, all that the name needs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_ddpm":
            assert not {alias.name for alias in node.names} & set(hf_ddpm.__all__)
