"""LPIPS where its package and weights are, and what is said where they are not."""

from importlib.util import find_spec

import pytest
import torch

from hf_ddpm.evaluation.perceptual import ALEXNET, load_lpips
from hf_ddpm.runtime.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


@pytest.mark.parametrize(("channels", "size"), [(4, 64), (3, 30)])
def test_images_that_alexnet_cannot_take_are_refused(channels, size):
    with pytest.raises(
        UsageError, match=f"lpips needs images of 1 or 3 .*, got {channels} channels and {size} x {size}"
    ):
        load_lpips(channels, size, size, CPU)


@pytest.mark.usefixtures("cache")
def test_what_is_missing_is_said_without_a_download():
    missing = "a package that is not installed: pip install" if find_spec("lpips") is None else "weights of AlexNet"
    with pytest.raises(UsageError, match=f"lpips needs .*{missing}"):
        load_lpips(3, 32, 32, CPU)


def test_damaged_weights_are_one_line(cache):
    pytest.importorskip("lpips")
    (cache / ALEXNET).write_bytes(b"no weights")
    with pytest.raises(UsageError, match="lpips cannot be loaded: "):
        load_lpips(3, 32, 32, CPU)


@pytest.mark.parametrize("channels", [1, 3])
def test_distances_are_those_of_the_package(cache, channels):
    lpips, models = pytest.importorskip("lpips"), pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    torch.save(models.alexnet().state_dict(), cache / ALEXNET)
    images, truth = torch.rand(2, 3, channels, 32, 32)
    distances = load_lpips(channels, 32, 32, CPU)
    assert distances(truth, truth).tolist() == [0] * 3
    theirs = lpips.LPIPS(net="alex", verbose=False).eval()
    with torch.no_grad():
        expected = theirs(*(each.expand(-1, 3, -1, -1) for each in (images, truth)), normalize=True).flatten()
    assert torch.allclose(distances(images, truth), expected.double())
