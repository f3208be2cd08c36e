"""Loading: no garbage collection meanwhile, and no module that a command needs later or not at all."""

import subprocess
import sys

import pytest


def python(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


def test_loading_collects_no_garbage_and_leaves_what_it_loaded_alone():
    code = """
import gc
from hf_ddpm.runtime.loading import without_garbage_collection
collections = []
gc.callbacks.append(lambda phase, about: collections.append(phase))
with without_garbage_collection():
    pass
print(gc.get_freeze_count())
with without_garbage_collection():
    import wave
    loaded = [[] for _ in range(100_000)]
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000)
try:
    with without_garbage_collection():
        raise ImportError
except ImportError:
    print(gc.isenabled())
gc.disable()
with without_garbage_collection():
    pass
print(gc.isenabled())
"""
    assert python(code).split() == ["0", "0", "True", "True", "True", "False"]


@pytest.mark.slow
def test_train_loads_at_once_and_only_what_it_needs(tmp_path):
    """float16 on a CPU is refused after all is loaded and before images are read."""
    code = """
import atexit, gc, sys
from hf_ddpm.cli import app
loading = []
def note(phase, about):
    is_loaded = hasattr(sys.modules.get("hf_ddpm.training.loop"), "train")
    if phase == "start" and about["generation"] == 2 and "torch" in sys.modules and not is_loaded:
        loading.append(about)
gc.callbacks.append(note)
late = {"datasets", "pandas", "matplotlib", "sklearn", "torchvision", "tensorboard"}
report = lambda: print("torch" in sys.modules, len(loading), late & sys.modules.keys() or "none")
atexit.register(report)
app(["train", "--mixed_precision", "fp16", "--output_dir", sys.argv[1]], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert "mixed_precision fp16 needs a GPU" in done.stderr
    assert done.stdout == "True 0 none\n"
