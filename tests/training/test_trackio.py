"""What Trackio gets of a run: its values, its previews, and an alert when something goes wrong."""

import json
import math
import os
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from hf_ddpm import Objective, TrainingConfig, train
from hf_ddpm.training.model import make_scheduler
from hf_ddpm.training.run import try_to_write
from tests.support.forks import Process

pytestmark = pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is in the extra dev, not in test")


def train_with_trouble(config: TrainingConfig, folder: Path) -> None:
    """A run with an infinite loss in its second step, and with a file that cannot be written in its third."""
    os.environ["TRACKIO_DIR"] = str(folder)  # which is read when trackio is imported
    objective, steps = Objective(make_scheduler(config)), []

    def loss(network, x_0, class_labels=None, **draws):
        steps.append(1)
        values = objective(network, x_0, timesteps=draws["timesteps"], noise=draws["noise"])
        return values * (math.inf if len(steps) == 2 else 1)

    def write_where_nothing_can_be(event, run):
        if event.name == "log" and event.step == 3:
            try_to_write(run, lambda: (run.output_dir / "missing" / "file").write_text(""))

    train(config, objective=loss, callbacks=[write_where_nothing_can_be])


@pytest.mark.slow
def test_trackio_gets_values_previews_and_alerts(tiny_settings, tmp_path, image_folder):
    images, folder = tmp_path / "photos", tmp_path / "trackio"
    images.mkdir()
    for path in image_folder.iterdir():
        (images / path.name).symlink_to(path)
    (images / "damaged.png").write_bytes(b"no picture")
    settings = tiny_settings | {"max_train_steps": 3, "train_data_dir": str(images), "on_bad_image": "skip"}
    config = TrainingConfig(**settings, logger="trackio")
    process = Process(train_with_trouble, (config, folder))
    process.start()
    process.join()
    assert process.exitcode == 0
    connection = sqlite3.connect(folder / "hf_ddpm.db")
    values = [json.loads(row[0]) for row in connection.execute("select metrics from metrics")]
    titles = [row[0] for row in connection.execute("select title from alerts")]
    connection.close()
    assert titles == ["images are lost", "a step is skipped", "a file could not be written"]
    assert [line["images"] for line in values if "images" in line] == [4, 8, 12]
    *_, picture = [line["samples"] for line in values if "samples" in line]
    assert picture["_type"] == "trackio.image"
    (path,) = folder.rglob(Path(picture["file_path"]).name)
    with Image.open(path) as shown, Image.open(Path(config.output_dir) / "figures" / "samples.png") as saved:
        assert shown.convert("RGB").tobytes() == saved.convert("RGB").tobytes()
