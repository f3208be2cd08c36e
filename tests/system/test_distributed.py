"""One process, two and four compute the same, through Accelerate's launcher and torchrun with gloo on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import load_config, save_config
from tests.support.networks import tiny_unet_config
from tests.support.runs import differences, said, start, trace

ROOT = Path(__file__).parents[2]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
}
ZERO_2 = str(ROOT / "launch_configs/deepspeed.yaml")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def zero(stage):
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    return {**variables, "DS_ACCELERATOR": "cpu"}


def launch(processes, output_dir, *arguments, options=("--cpu",)):
    command = [
        *(sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", *options),
        *("--num_processes", str(processes)),
        *(str(ROOT / "train_accelerate.py"), "--output_dir", str(output_dir), *map(str, arguments)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same 20 steps of 8 images, by one process at once, by one in four parts, by two in two and by four."""
    divisions = {
        "whole": (1, 8, 1, {}),
        "1 by 4": (1, 2, 4, {}),
        "4 by 1": (4, 2, 1, {}),
        "2 by 2, FSDP": (2, 2, 2, FSDP),
    }
    root = tmp_path_factory.mktemp("distributed")
    train_divided(root, divisions)
    launch(2, root / "2 by 2", "--config", root / "config.yaml")
    return root, {path.name: trace(path) for path in root.iterdir() if (path / "metrics.jsonl").exists()}


def train_divided(root: Path, divisions: dict, **settings) -> TrainingConfig:
    """The runs in `root`, and the config of one that two processes divide in two, which is config.yaml there."""
    model = root / "unet.json"
    model.write_text(json.dumps(tiny_unet_config(channels=1)))
    config = TrainingConfig(
        dataset_name="digits",
        model_config_name_or_path=str(model),
        max_train_steps=20,
        ddpm_num_steps=20,
        logging_steps=1,
        checkpointing_steps=10,
        eval_batch_size=3,
        random_flip=True,
        stable_target_images=100,
        cache_dir=str(root / "cache"),
        lr_warmup_steps=5,
        cpu_threads_per_process=1,
        **settings,
    )
    for name, (processes, batch_size, accumulation, variables) in divisions.items():
        divided = replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        divided = replace(divided, output_dir=str(root / name))
        assert start(divided, processes, **variables) == [0] * processes, said(divided)
    divided = replace(config, train_batch_size=2, gradient_accumulation_steps=2)
    save_config(divided, root / "config.yaml")
    return divided


@pytest.mark.parametrize("name", ["1 by 4", "2 by 2", "4 by 1", "2 by 2, FSDP"])
def test_every_way_to_divide_a_step_is_the_same_run(runs, name):
    root, traces = runs
    assert_same(root / "whole", root / name)
    assert len(traces["whole"]) == 20


def assert_same(*folders):
    """Loss, learning rate, average and previews."""
    whole, parts = map(trace, folders)
    assert [m["loss"] for m in parts] == pytest.approx([m["loss"] for m in whole], abs=1e-5)
    for key in ("lr", "ema_decay", "images"):
        assert [m[key] for m in parts] == [m[key] for m in whole]
    for file in ("unet/diffusion_pytorch_model.safetensors", f"ema/snapshot-{160:012d}.safetensors"):
        a, b = (load_file(folder / file) for folder in folders)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4)
    pictures = [Image.open(folder / "previews/step-0000020.png").convert("L") for folder in folders]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 1


@pytest.mark.parametrize(("before", "after"), [("2 by 2", 1), ("2 by 2", 4), ("4 by 1", 3), ("2 by 2, FSDP", 1)])
def test_another_number_of_processes_goes_on(runs, before, after, tmp_path):
    """The same run as far as the global batch can be kept; else one whose schedule follows the images seen."""
    resume_elsewhere(*runs, before, after, tmp_path)


def test_fsdp_goes_on_from_one_process(runs, tmp_path):
    resume_elsewhere(*runs, "1 by 4", 2, tmp_path, **FSDP)


def resume_elsewhere(root, traces, before, after, tmp_path, **variables):
    folder = tmp_path / "run"
    shutil.copytree(root / before, folder)
    shutil.rmtree(folder / "checkpoint-20")
    (folder / "run.json").unlink()
    config = load_config(str(folder / "config.yaml"), output_dir=str(folder), resume_from_checkpoint="latest")
    save_config(config, folder / "config.yaml")
    assert start(config, after, **variables) == [0] * after, said(config)
    whole, now = traces["whole"], trace(folder)
    assert now[:10] == traces[before][:10]
    if after != 3:
        assert [m["images"] for m in now] == [m["images"] for m in whole]
        assert [m["loss"] for m in now] == pytest.approx([m["loss"] for m in whole], abs=1e-5)
        assert [m["lr"] for m in now] == [m["lr"] for m in whole]
        return
    # 8 images per step are not for 3 processes of 2: now 6 are, from image 80 on, until 160 are seen.
    assert "the global batch changes from 8 to 6 images" in said(config)
    assert [m["images"] for m in now[10:]] == [*range(86, 165, 6)]
    # The step after 104 images has the learning rate of the whole run's step after 104 images.
    assert now[14]["lr"] == whole[13]["lr"]
    assert now[14]["ema_decay"] ** (8 / 6) == pytest.approx(whole[13]["ema_decay"])


def test_a_worker_that_dies_is_restarted(runs, tmp_path):
    """torchrun's elastic restart, of all processes; the run is the one in which none died."""
    root, _ = runs
    config = load_config(str(root / "2 by 2" / "config.yaml"), output_dir=str(tmp_path / "run"))
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", "2", str(ROOT / "train_accelerate.py")]
    command += ["--config", str(tmp_path / "config.yaml"), "--resume_from_checkpoint", "latest"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**environment, "OMP_NUM_THREADS": "1"}) as torchrun:
        said = b""
        while b"| 13/20" not in said:
            said += os.read(torchrun.stderr.fileno(), 4096)
        victim = [c for c in psutil.Process(torchrun.pid).children(recursive=True) if "--config" in c.cmdline()][-1]
        victim.kill()
        said += torchrun.stderr.read()
    assert torchrun.returncode == 0, said.decode()
    assert b"the run goes on from checkpoint-10" in said
    assert not differences(tmp_path / "run", root / "2 by 2")


def test_a_number_of_processes_that_cannot_be_known_is_refused(tmp_path):
    """What `accelerate launch` on the CPU leaves of several processes asked for in its config file."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_accelerate.py"), "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 2
    assert "torchrun --nproc_per_node N" in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_are_recorded(runs):
    root, _ = runs
    training = json.loads((root / "2 by 2/run.json").read_text())["training"]
    assert (training["num_processes"], training["global_batch_size"]) == (2, 8)


def test_fsdp_that_would_be_left_out_is_refused(runs, tmp_path):
    root, _ = runs
    config = load_config(str(root / "config.yaml"), output_dir=str(tmp_path / "run"))
    assert start(config, 1, ACCELERATE_USE_FSDP="true") == [1]
    assert "FSDP was asked for, but Accelerate does not use it on cpu" in said(config)


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory):
    """The 20 steps of AdamW, and so by two processes with ZeRO-1, ZeRO-2 as `launch_configs` has it, ZeRO-2 in bf16
    and DDP in bf16."""
    root = tmp_path_factory.mktemp("zero")
    divisions = {"whole": (1, 8, 1, {}), "1 by 4": (1, 2, 4, {})}
    config = train_divided(root, divisions, optimizer="adamw")
    launch(2, root / "ZeRO-2", "--config", root / "config.yaml", options=("--config_file", ZERO_2))
    for name, precision, variables in [
        ("ZeRO-1", "no", zero(1)),
        ("ZeRO-2, bf16", "bf16", zero(2)),
        ("2 by 2, bf16", "bf16", {}),
    ]:
        of_name = replace(config, output_dir=str(root / name), mixed_precision=precision)
        assert start(of_name, 2, **variables) == [0, 0], said(of_name)
    return root, {path.name: trace(path) for path in root.iterdir() if (path / "metrics.jsonl").exists()}


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "like"), [("ZeRO-1", "whole"), ("ZeRO-2", "whole"), ("ZeRO-2, bf16", "2 by 2, bf16")]
)
def test_zero_is_the_same_run(zero_runs, name, like):
    root, _ = zero_runs
    assert_same(root / like, root / name)
    before, after = (load_file(root / run / "checkpoint-20/optimizer.safetensors") for run in (like, name))
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-4)


@needs_deepspeed
def test_averages_of_zero_are_not_of_rounded_weights(zero_runs):
    root, _ = zero_runs
    for file in ("unet/diffusion_pytorch_model.safetensors", "checkpoint-20/unet/diffusion_pytorch_model.safetensors"):
        weights = load_file(root / "ZeRO-2, bf16" / file)
        assert all((w != w.bfloat16()).float().mean() > 0.9 for name, w in weights.items() if "conv" in name)


@needs_deepspeed
@pytest.mark.parametrize(
    ("before", "after", "stage"), [("ZeRO-1", 1, 0), ("ZeRO-2", 1, 0), ("1 by 4", 2, 1), ("1 by 4", 2, 2)]
)
def test_zero_and_others_go_on_from_each_other(zero_runs, before, after, stage, tmp_path):
    resume_elsewhere(*zero_runs, before, after, tmp_path, **(zero(stage) if stage else {}))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_that_is_killed_goes_on_to_the_last_bit(zero_runs, stage, tmp_path):
    root, _ = zero_runs
    config = load_config(str(root / "config.yaml"), output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    assert start(config, 2, "step", 14, **zero(stage))[1] == -signal.SIGKILL
    assert start(config, 2, **zero(stage)) == [0, 0], said(config)
    assert "the run goes on from checkpoint-10" in said(config)
    assert not differences(tmp_path / "run", root / f"ZeRO-{stage}")


@needs_deepspeed
@pytest.mark.parametrize(("stage", "forward"), [(1, 5), (2, 5), (1, 2), (2, 2)])
def test_zero_skips_a_step_without_finite_loss(zero_runs, stage, forward, tmp_path):
    """On every process, though one saw it: the third step, or the first, when the optimizer has no state yet."""
    root, _ = zero_runs
    config = load_config(str(root / "config.yaml"), max_train_steps=6, checkpointing_steps=6)
    ddp, by_zero = (replace(config, output_dir=str(tmp_path / name)) for name in ("DDP", "ZeRO"))
    assert start(ddp, 2, "forward", forward, 1) == [0, 0], said(ddp)
    assert start(by_zero, 2, "forward", forward, 1, **zero(stage)) == [0, 0], said(by_zero)
    assert "a step is skipped" in said(by_zero)
    expected, found = trace(Path(ddp.output_dir)), trace(Path(by_zero.output_dir))
    skipped = (forward - 1) // 2
    assert [m["loss"] is None for m in found] == [step == skipped for step in range(6)]
    for key in ("bad_steps", "lr", "ema_decay"):
        assert [m[key] for m in found] == [m[key] for m in expected]
    for key in ("loss", "grad_norm"):
        assert [m[key] or 0 for m in found] == pytest.approx([m[key] or 0 for m in expected], abs=1e-5)
    file = "checkpoint-6/optimizer.safetensors"
    assert load_file(Path(by_zero.output_dir) / file)["conv_in.weight/step"] == 5


@needs_deepspeed
@pytest.mark.parametrize(
    ("variables", "precision", "message"),
    [
        (zero(0), "no", "zero_stage must be 1 or 2, got 0: use FSDP"),
        (zero(3), "no", "zero_stage must be 1 or 2, got 3: use FSDP"),
        (zero(2), "fp16", "mixed_precision must be bf16 or no with DeepSpeed, got fp16"),
        (
            {**zero(2), "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "no",
            "offload_optimizer_device must be",
        ),
        ({**zero(2), "ACCELERATE_USE_CPU": "true"}, "no", "DEEPSPEED was asked for, but Accelerate does not use it"),
    ],
)
def test_what_zero_cannot_is_refused(zero_runs, variables, precision, message, tmp_path):
    root, _ = zero_runs
    changes = {"output_dir": str(tmp_path / "run"), "mixed_precision": precision}
    config = load_config(str(root / "config.yaml"), **changes)
    assert start(config, 2, **variables) == [1, 1]
    assert message in said(config)
    assert start(config, 1, **variables) == [1]
    assert "start it by `accelerate launch`" in said(config)
    assert not (tmp_path / "run").exists()


@needs_deepspeed
def test_muon_is_not_for_zero(zero_runs, tmp_path):
    root, _ = zero_runs
    config = load_config(str(root / "config.yaml"), output_dir=str(tmp_path / "run"), optimizer="muon")
    assert start(config, 2, **zero(2)) == [1, 1]
    assert "optimizer must be adamw with DeepSpeed" in said(config)


@needs_deepspeed
def test_settings_of_deepspeed_give_way_to_those_of_the_run(zero_runs, tmp_path):
    root, _ = zero_runs
    config = load_config(str(root / "config.yaml"), output_dir=str(tmp_path / "run"))
    variables = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "0.01"}
    assert start(config, 2, **zero(2), **variables) == [0, 0], said(config)
    assert "gradient_accumulation_steps is 2, as the run says, not 1" in said(config)
    assert "gradient_clipping is 1.0, as the run says, not 0.01" in said(config)
    assert not differences(tmp_path / "run", root / "ZeRO-2")
