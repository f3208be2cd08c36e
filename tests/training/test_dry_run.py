"""What a dry run says of a run, against what is known otherwise, and that it leaves no trace."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import UNet2DModel

from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.training import dry_run, loop
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.dry_run import Measured, amount, count_flops, duration
from hf_ddpm.training.loop import train
from hf_ddpm.training.optimizer import make_optimizer
from hf_ddpm.training.parsing import save_config
from hf_ddpm.training.setup import make_scheduler
from tests.support.command_line import parse_config
from tests.support.networks import tiny_unet_config
from tests.support.runs import said, start


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "MAX_STEPS", 5)


def listing(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(folder).rglob("*")}


def table(text):
    """name -> (how, text), and the notes."""
    lines = [line for line in text.splitlines() if re.search("  (counted|measured|computed) ", line)]
    rows = [re.split(" {2,}", line, maxsplit=2) for line in lines]
    notes = [line.removeprefix("note: ") for line in text.splitlines() if line.startswith("note: ")]
    return {name: (how, value) for name, how, value in rows}, notes


def number(text):
    """1.5 MB ... -> 1,500,000"""
    value, prefix = re.match(r"([\d.]+) ([kMGT]?)", text).groups()
    return float(value) * 1000 ** " kMGT".index(prefix or " ")


def dry(config, capsys):
    capsys.readouterr()
    assert train(replace(config, dry_run=True)) is None
    return table(capsys.readouterr().out)


def test_the_table_says_what_is_known_otherwise(tiny_settings, tmp_path, capsys):
    config = TrainingConfig(**tiny_settings)
    rows, notes = dry(config, capsys)
    unet = UNet2DModel(**tiny_unet_config(channels=1))
    count = sum(p.numel() for p in unet.parameters())
    assert rows["parameters"] == ("counted", f"{count:,}")
    assert rows["weights"] == rows["gradients"] == ("counted", amount(4 * count, "B"))
    # One of the same size for each of Muon's matrices, two and a step number for each of all others.
    of_muon, others = (group["params"] for group in make_optimizer(unet, config).param_groups)
    moments = sum(4 * p.numel() for p in of_muon) + sum(8 * p.numel() + 4 for p in others)
    assert rows["moments"] == ("counted", amount(moments, "B"))
    assert rows["averages"] == ("counted", f"{amount(12 * count, 'B')}, copies 3")  # of previews, and for snapshots
    forward, whole = (amount(flops, "") for flops in count_flops(unet))
    assert rows["FLOPs per image"][1].startswith(f"{forward} forward, {whole} a training step")
    assert rows["to do"] == ("computed", "6 steps of 4 images, 24 images, 1.0 epochs")
    assert rows["resolution"][1] == "a multiple of 2 (halvings of this network: 1); next to 8: 6 and 10"
    stock = diffusers.DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    assert float(rows["alpha_bar_T"][1].split()[0]) == pytest.approx(stock.alphas_cumprod[-1].item(), rel=0.01)
    assert rows["peak of a step"][1].endswith("train_batch_size 4")
    assert notes == []

    train(config)
    files = [path for path in Path(config.output_dir, "checkpoint-6").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    how, each = rows["checkpoint"]
    assert how == "measured"
    assert number(each) == pytest.approx(size, rel=0.01)
    both, snapshots = re.match(
        r"(.*) for 2 checkpoints at once, (.*) for 6 snapshots of averages; .* are free", rows["disk"][1]
    ).groups()
    assert number(both) == pytest.approx(2 * size, rel=0.01)
    written = [path.stat().st_size for path in Path(config.output_dir, "ema").glob("snapshot-*")]
    assert len(written) == 6
    assert number(snapshots) == pytest.approx(sum(written), rel=0.1)  # names take space beside so small a network


def test_nothing_is_written(tiny_settings, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    dry(TrainingConfig(**tiny_settings), capsys)  # the images are in their cache
    monkeypatch.setattr("hf_ddpm.training.setup.create_for_run", lambda *_: pytest.fail("a repository was made"))
    before = listing(tmp_path), listing(tiny_settings["train_data_dir"]), listing(tiny_settings["cache_dir"])
    hub = {"push_to_hub": True, "hub_token": "hf_of_nobody", "hub_model_id": "me/mine"}
    dry(TrainingConfig(**tiny_settings, **hub, logger="tensorboard"), capsys)
    assert (listing(tmp_path), listing(tiny_settings["train_data_dir"]), listing(tiny_settings["cache_dir"])) == before
    assert not Path(tiny_settings["output_dir"]).exists()


def test_a_run_that_is_there_is_left_as_it_is(tiny_settings, tmp_path, capsys):
    config = TrainingConfig(**tiny_settings)
    train(config)
    before = listing(tmp_path)
    rows, notes = dry(config, capsys)
    assert rows["to do"][1].startswith("6 steps")
    assert len(notes) == 1
    assert "already holds a run: choose another, --resume_from_checkpoint latest" in notes[0]
    rows, notes = dry(replace(config, resume_from_checkpoint="latest", max_train_steps=9), capsys)
    assert rows["to do"][1] == "3 steps of 4 images, 12 images, 0.5 epochs; 6 steps are done"
    assert "for 3 snapshots" in rows["disk"][1]
    assert notes == []
    rows, notes = dry(replace(config, overwrite_output_dir=True), capsys)
    assert rows["to do"][1].startswith("6 steps")
    assert notes == []
    assert listing(tmp_path) == before
    # A dry run changes nothing of what comes after it.
    train(replace(config, resume_from_checkpoint="latest", max_train_steps=9))
    assert "dry_run" not in Path(config.output_dir, "config.yaml").read_text()


def test_it_is_of_one_start_only(tmp_path):
    config = parse_config(["--dry_run"])
    assert config.dry_run
    save_config(config, tmp_path / "config.yaml")
    assert "dry_run" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"train_data_dir": "nothing"}, "there is no folder"),
        ({"resolution": 30, "model_config_name_or_path": None}, "the nearest is 28 or 32"),
        ({"model_config_name_or_path": "cifar10-ddpm"}, "in_channels must be 1"),
        ({"resume_from_checkpoint": "checkpoint-5"}, "resume_from_checkpoint must be latest, got 'checkpoint-5'"),
        ({"output_dir": "unet.json"}, "output_dir must be a folder, got 'unet.json', which is a file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_still_refused(tiny_settings, tmp_path, changes, message):
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=message):
        train(TrainingConfig(**{**tiny_settings, **changes}, dry_run=True))
    assert listing(tmp_path) == before


def test_what_is_timed_are_steps_of_training(tiny_settings, capsys, monkeypatch):
    taken, real = [], loop._step

    def step(run, progress, micro_batches, meter):
        taken.append((progress.step, progress.images, len(micro_batches), len(micro_batches[0]["pixels"])))
        time.sleep(0.5 if progress.step < dry_run.WARM_UP_STEPS else 0.1)
        return real(run, progress, micro_batches, meter)

    monkeypatch.setattr(loop, "_step", step)
    config = TrainingConfig(**tiny_settings, gradient_accumulation_steps=2)
    rows, _ = dry(config, capsys)
    assert taken == [(n, 8 * n, 2, 4) for n in range(2 + 5)]
    how, text = rows["speed"]
    speed, seconds, count, first = map(
        float,
        re.fullmatch(
            r"([\d.]+) images/s of all processes, ([\d.]+) s per step; median of (\d+) steps after 2 to warm up, "
            r"the first in ([\d.]+) s",
            text,
        ).groups(),
    )
    assert (how, count) == ("measured", 5)
    assert seconds >= 0.1
    assert first >= 0.5
    assert speed == pytest.approx(8 / seconds, rel=0.02)

    taken.clear()
    monkeypatch.setattr(dry_run, "ENOUGH_SECONDS", 0.0)
    rows, _ = dry(config, capsys)
    assert "median of 3 steps" in rows["speed"][1]
    assert len(taken) == 2 + 3


def test_time_is_steps_times_their_median(tiny_settings, capsys, monkeypatch):
    fixed = Measured(1.0, [2.0, 9.0, 4.0], "main memory", 3_000_000, 2_000_000, 1)
    monkeypatch.setattr(dry_run, "measure", lambda *_: fixed)
    config = TrainingConfig(**{**tiny_settings, "max_train_steps": 23_446})
    rows, notes = dry(config, capsys)
    assert rows["speed"][1].startswith("1 images/s of all processes, 4 s per step; median of 3 steps")
    assert rows["time"][1].startswith("1 d 2 h 3 min, ")
    assert rows["peak of a step"][1].startswith("3 MB of main memory, 2 MB of it since before the first step")
    assert notes == ["1 of 5 steps had no finite loss and gradients"]
    monkeypatch.setattr(dry_run, "measure", lambda *_: replace(fixed, added_bytes=None, num_bad_steps=0))
    rows, notes = dry(config, capsys)
    assert rows["peak of a step"][1].startswith("3 MB of main memory, in the life of the process")
    assert notes == []


def test_a_disk_that_is_too_small_is_noted(tiny_settings, capsys, monkeypatch):
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage)
    rows, notes = dry(TrainingConfig(**tiny_settings, ema_snapshots=0, checkpoints_total_limit=None), capsys)
    needed = amount(2 * number(rows["checkpoint"][1]), "B")
    assert rows["disk"][1] == f"{needed} for 2 checkpoints at once; 1 MB are free"
    assert notes == [f"output_dir needs {needed} on its disk, which has 1 MB"]


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_signal_left_in_x_T_is_noted(tiny_settings, capsys):
    config = TrainingConfig(**tiny_settings, ddpm_beta_schedule="linear")
    rows, notes = dry(config, capsys)
    assert rows["alpha_bar_T"][1].startswith(f"{make_scheduler(config).alpha_bar[-1].item():.3g} of the signal's")
    assert len(notes) == 1
    assert "--ddpm_beta_schedule squaredcos_cap_v2" in notes[0]


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("classes", [None, 10])
def test_flops_are_those_of_the_formulas(size, classes):
    """2 FLOPs of each weight of a convolution or a product where it is used, 4 s^2 c of attention to s pixels."""
    unet = UNet2DModel(**tiny_unet_config(size=size, num_class_embeds=classes))
    found = {}

    def count(module, arguments, output):
        if isinstance(module, torch.nn.Conv2d):
            found[module] = 2 * module.weight.numel() * output.shape[-1] * output.shape[-2]
        elif isinstance(module, torch.nn.Linear):
            found[module] = 2 * module.weight.numel() * output.numel() // output.shape[-1]
        elif hasattr(module, "to_q"):
            pixels = arguments[0].shape[-1] * arguments[0].shape[-2]
            found[module] = 4 * pixels**2 * module.to_q.out_features

    for module in unet.modules():
        module.register_forward_hook(count)
    labels = {} if classes is None else {"class_labels": torch.zeros(1, dtype=torch.int64)}
    unet(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64), **labels)
    forward = sum(found.values())
    # Each product has two in the backward pass, but nothing is led back into the image and the timestep.
    ends = found[unet.conv_in] + found[unet.time_embedding.linear_1]
    assert count_flops(unet) == (forward, 3 * forward - ends)


@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True},
        {"mixed_precision": "bf16"},
        {"use_ema": False},
        {"dataloader_num_workers": 1},
        {"variance_type": "learned_range"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_a_run_are_those_of_its_dry_run(tiny_settings, tmp_path, changes, capsys):
    model = tmp_path / "other.json"
    model.write_text(json.dumps(tiny_unet_config(channels=1, out_channels=2 if "variance_type" in changes else 1)))
    rows, notes = dry(TrainingConfig(**{**tiny_settings, **changes, "model_config_name_or_path": str(model)}), capsys)
    assert rows["averages"][1] == "0 B, copies 0" or "use_ema" not in changes
    assert rows["to do"][1] == "6 steps of 4 images, 24 images, 1.0 epochs"
    assert notes == []


def test_images_that_do_not_come_end_it(tiny_settings, monkeypatch):
    monkeypatch.setattr(dry_run, "fetch", lambda *_: ([], OSError("the disk is gone")))
    with pytest.raises(RunError, match="the disk is gone"):
        train(TrainingConfig(**tiny_settings, dry_run=True))


def test_the_peak_of_memory_is_that_of_what_was_held():
    # In a process of its own: here, what other tests held may be freed meanwhile, and its place be used.
    code = """
import torch
from hf_ddpm.training import dry_run
what, before, highest = dry_run._watch_memory(torch.device("cpu"))
assert what == "main memory"
held = torch.ones(25_000_000)
del held
print(-1 if before is None else highest() - before, dry_run._highest_resident())
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    added, highest = (int(word) for word in said.split())
    assert highest > 95_000_000
    if added == -1:
        pytest.skip("this system does not forget a peak")
    assert 95_000_000 < added < 150_000_000


def test_two_processes_say_what_both_do(tiny_settings, tmp_path):
    config = TrainingConfig(**tiny_settings, dry_run=True)
    before = listing(tmp_path)
    assert start(config, 2) == [0, 0], said(config)
    assert listing(tmp_path).keys() - before.keys() == {Path(f"{config.output_dir}.log")}
    text = said(config)
    rows, _ = table(text)
    assert text.count("images/s") == 1
    assert "processes 2: " in text
    speed, seconds = re.match(r"([\d.,]+) images/s of all processes, ([\d.]+) s", rows["speed"][1]).groups()
    assert float(speed.replace(",", "")) * float(seconds) == pytest.approx(8, rel=0.02)
    assert rows["to do"][1] == "6 steps of 8 images, 48 images, 2.0 epochs"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.312, "0.31 s"),
        (59.7, "1 min"),
        (125, "2 min 5 s"),
        (3605, "1 h"),
        (93784, "1 d 2 h 3 min"),
        (100 * 86400, "100 d"),
    ],
)
def test_durations_are_said_in_days_hours_and_minutes(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999.4, "999 B"), (999.6, "1 kB"), (1_234_567, "1.23 MB"), (5e18, "5e+03 PB")]
)
def test_amounts_have_three_digits(value, text):
    assert amount(value, "B") == text
    assert amount(value, "") == text.removesuffix("B").rstrip()
