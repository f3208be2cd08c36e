"""What a dry run says of a run, against what is known otherwise, and that it leaves no trace."""

import json
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import UNet2DModel

from hf_ddpm.data.batches import MicroBatches
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.format import format_amount
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training import dry_run, loop
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.dry_run import Cost, count_flops, print_cost
from hf_ddpm.training.loop import train
from hf_ddpm.training.model import make_scheduler
from hf_ddpm.training.optimizer import make_optimizer
from hf_ddpm.training.parsing import save_config
from hf_ddpm.training.parts import Parts
from hf_ddpm.training.setup import build_run, make_accelerator
from tests.support.command_line import parse_config
from tests.support.forks import Process
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


@pytest.mark.slow
def test_table_agrees_with_the_run_itself(tiny_settings, tmp_path, capsys):
    (tmp_path / "two_levels.json").write_text(json.dumps(tiny_unet_config(channels=1)))
    config = TrainingConfig(**tiny_settings | {"model_config_name_or_path": str(tmp_path / "two_levels.json")})
    rows, notes = dry(config, capsys)
    unet = UNet2DModel(**tiny_unet_config(channels=1))
    count = sum(p.numel() for p in unet.parameters())
    assert rows["parameters"] == ("counted", f"{count:,}")
    assert rows["weights"] == rows["gradients"] == ("counted", format_amount(4 * count, "B"))
    # One of the same size for each of Muon's matrices, two and a step number for each of all others.
    of_muon, others = (group["params"] for group in make_optimizer(unet, config).param_groups)
    moments = sum(4 * p.numel() for p in of_muon) + sum(8 * p.numel() + 4 for p in others)
    assert rows["moments"] == ("counted", format_amount(moments, "B"))
    assert rows["averages"] == ("counted", f"{format_amount(12 * count, 'B')}, copies 3")
    forward, whole = (format_amount(flops, "") for flops in count_flops(unet))
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
        r"(.*) for 2 checkpoints at once, (.*) for 2 snapshots of averages; .* are free", rows["disk"][1]
    ).groups()
    assert number(both) == pytest.approx(2 * size, rel=0.01)
    written = [path.stat().st_size for path in Path(config.output_dir, "ema").glob("snapshot-*")]
    assert len(written) == 2
    assert number(snapshots) == pytest.approx(sum(written), rel=0.1)  # names take space beside so small a network


@pytest.mark.slow
def test_dry_run_writes_nothing(tiny_settings, tmp_path, capsys, monkeypatch):
    dry(TrainingConfig(**tiny_settings), capsys)  # the images are in their cache
    monkeypatch.setattr("hf_ddpm.training.setup.create_places", lambda *_: pytest.fail("a repository was made"))
    before = listing(tmp_path), listing(tiny_settings["train_data_dir"]), listing(tiny_settings["cache_dir"])
    hub = {"push_to_hub": True, "hub_token": "hf_of_nobody", "hub_model_id": "me/mine"}
    dry(TrainingConfig(**tiny_settings, **hub, logger="tensorboard"), capsys)
    assert (listing(tmp_path), listing(tiny_settings["train_data_dir"]), listing(tiny_settings["cache_dir"])) == before
    assert not Path(tiny_settings["output_dir"]).exists()


@pytest.mark.slow
def test_dry_run_leaves_an_existing_run_as_it_is(tiny_settings, tmp_path, capsys):
    config = TrainingConfig(**{**tiny_settings, "ema_snapshots": 16})
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
    assert "dry_run:" not in Path(config.output_dir, "config.yaml").read_text()


def test_dry_run_is_not_written_into_the_config(tmp_path):
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
        ({"model_config_name_or_path": "cifar10-ddpm"}, "in_channels of the model config must be 1"),
        (
            {"resume_from_checkpoint": "checkpoint-5"},
            "resume_from_checkpoint must be latest or hub, got 'checkpoint-5'",
        ),
        ({"output_dir": "unet.json"}, "output_dir must be a folder, got 'unet.json', which is a file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_dry_run_refuses_what_cannot_work(tiny_settings, tmp_path, changes, message):
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=message):
        train(TrainingConfig(**{**tiny_settings, **changes}, dry_run=True))
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_dry_run_takes_steps_of_training(tiny_settings, capsys, monkeypatch):
    steps, take_step = [], loop.take_step

    def counted_step(run, progress, micro_batches):
        steps.append((progress.step, progress.images, len(micro_batches), len(micro_batches[0]["pixels"])))
        return take_step(run, progress, micro_batches)

    monkeypatch.setattr(loop, "take_step", counted_step)
    config = TrainingConfig(**tiny_settings, gradient_accumulation_steps=2)
    rows, _ = dry(config, capsys)
    assert steps == [(n, 8 * n, 2, 4) for n in range(2 + 5)]
    assert rows["speed"][0] == "measured"
    assert "median of 5 steps after 2 to warm up" in rows["speed"][1]

    steps.clear()
    monkeypatch.setattr(dry_run, "ENOUGH_SECONDS", 0.0)
    rows, _ = dry(config, capsys)
    assert "median of 3 steps" in rows["speed"][1]
    assert len(steps) == 2 + 3


@pytest.mark.slow
def test_print_cost_multiplies_steps_by_their_median(tiny_settings, capsys):
    config = TrainingConfig(**{**tiny_settings, "max_train_steps": 23_446})
    run, progress = build_run(config, make_accelerator(config), Processes(), Parts())
    cost = Cost(1.0, [2.0, 9.0, 4.0], "main memory", 3_000_000, 2_000_000, 1, 5_000_000)
    print_cost(run, progress, cost)
    rows, notes = table(capsys.readouterr().out)
    assert rows["speed"][1].startswith("1 images/s of all processes, 4 s per step; median of 3 steps")
    assert rows["time"][1].startswith("1 d 2 h 3 min, ")
    assert rows["figures"][1] == "none (--no_save_figures)"
    assert rows["peak of a step"][1].startswith("3 MB of main memory, 2 MB of it since before the first step")
    assert rows["checkpoint"][1] == "5 MB"
    assert notes == ["1 of 5 steps had no finite loss and gradients"]
    print_cost(run, progress, replace(cost, added_bytes=None, num_bad_steps=0))
    rows, notes = table(capsys.readouterr().out)
    assert rows["peak of a step"][1].startswith("3 MB of main memory, in the life of the process")
    assert notes == []
    print_cost(replace(run, config=replace(config, save_figures=True)), progress, cost)
    rows, _ = table(capsys.readouterr().out)
    # Three forward passes take as long as a step of 4 s.
    assert rows["figures"] == ("computed", "a reverse chain of 20 of 20 steps at the end, at most 27 s")


@pytest.mark.slow
def test_too_small_a_disk_is_noted(tiny_settings, capsys, monkeypatch):
    class Usage:
        free = 200_000

    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage)
    rows, notes = dry(TrainingConfig(**{**tiny_settings, "ema_snapshots": 0, "checkpoints_total_limit": None}), capsys)
    needed, rest = rows["disk"][1].split(" for ")
    assert number(needed) == pytest.approx(2 * number(rows["checkpoint"][1]), rel=0.01)
    assert rest == "2 checkpoints at once; 200 kB are free"
    assert notes == [f"output_dir needs {needed} on its disk, which has 200 kB"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_signal_left_in_x_T_is_noted(tiny_settings, capsys):
    config = TrainingConfig(**tiny_settings, ddpm_beta_schedule="linear")
    rows, notes = dry(config, capsys)
    assert rows["alpha_bar_T"][1].startswith(f"{make_scheduler(config).alpha_bar[-1].item():.3g} of the signal's")
    assert len(notes) == 1
    assert "--ddpm_beta_schedule squaredcos_cap_v2" in notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("classes", [None, 10])
def test_count_flops_agrees_with_the_formulas(size, classes):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True},
        {"mixed_precision": "bf16"},
        {"use_ema": False, "ema_snapshots": 0},
        {"dataloader_num_workers": 1},
        {"variance_type": "learned_range"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_dry_run_takes_the_settings_of_the_run(tiny_settings, tmp_path, changes, capsys):
    model = tmp_path / "other.json"
    model.write_text(json.dumps(tiny_unet_config(channels=1, out_channels=2 if "variance_type" in changes else 1)))
    rows, notes = dry(TrainingConfig(**{**tiny_settings, **changes, "model_config_name_or_path": str(model)}), capsys)
    assert rows["averages"][1] == "0 B, copies 0" or "use_ema" not in changes
    assert rows["to do"][1] == "6 steps of 4 images, 24 images, 1.0 epochs"
    assert notes == []


def test_dry_run_ends_when_images_cannot_be_read(tiny_settings, monkeypatch):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(MicroBatches, "__getitem__", fail)
    with pytest.raises(RunError, match="the disk is gone"):
        train(TrainingConfig(**tiny_settings, dry_run=True))


def hold_100_megabytes(path: Path) -> None:
    what, before, highest = dry_run.watch_memory(torch.device("cpu"))
    assert what == "main memory"
    held = torch.ones(25_000_000)
    del held
    path.write_text(json.dumps([-1 if before is None else highest() - before, dry_run._highest_resident()]))


@pytest.mark.slow
def test_peak_memory_counts_what_was_held(tmp_path):
    # In a process of its own: here, what other tests held may be freed meanwhile, and its place be used.
    child = Process(target=hold_100_megabytes, args=(tmp_path / "held.json",))
    child.start()
    child.join()
    added, highest = json.loads((tmp_path / "held.json").read_text())
    assert highest > 95_000_000
    if added == -1:
        pytest.skip("this system does not forget a peak")
    assert 95_000_000 < added < 150_000_000


@pytest.mark.slow
def test_dry_run_of_two_processes_prints_one_table(tiny_settings, tmp_path):
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
