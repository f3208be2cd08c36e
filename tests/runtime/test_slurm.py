"""What SLURM tells the tasks of a job step, and what a run makes of it."""

import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hf_ddpm.runtime import slurm
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.launch import LAUNCHER_VARIABLES, MPI_VARIABLES, RANK_VARIABLES, settle_place
from hf_ddpm.runtime.signals import JOB_MARGIN_SECONDS, STOPPED, hours_in_job
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config
from tests.support.forks import python
from tests.support.runs import differences, start

ROOT = Path(__file__).parents[2]
TORCHRUN_VARIABLES = (*RANK_VARIABLES, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
# As `srun` of SLURM 22.05 told the last of five tasks on two nodes.
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "localhost,n[2-4,7]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
PLACE = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.fixture
def environment(monkeypatch):
    """Return a function: variables -> they are those of the environment that say of processes, and no others."""

    def setting(variables: dict[str, str]) -> None:
        known = (*TORCHRUN_VARIABLES, *LAUNCHER_VARIABLES, *MPI_VARIABLES)
        kept = {k: v for k, v in os.environ.items() if k not in known and not k.startswith("SLURM_")}
        monkeypatch.setattr(os, "environ", {**kept, **variables})

    return setting


def place() -> dict[str, str]:
    return {name: os.environ[name] for name in TORCHRUN_VARIABLES if name in os.environ}


def test_task_of_a_step_is_told_what_torchrun_would_tell_it(environment):
    environment(STEP)
    settle_place()
    told = place()
    assert 1024 < int(told.pop("MASTER_PORT")) < 32768
    assert told.pop("OMP_NUM_THREADS") == "1"
    assert told == PLACE
    settle_place()  # as each further run of a process does
    assert place().items() >= PLACE.items()


def test_cores_of_a_task_are_its_own(environment):
    environment({**STEP, "SLURM_CPUS_PER_TASK": "6"})
    settle_place()
    assert os.environ["OMP_NUM_THREADS"] == "6"


def test_all_tasks_meet_at_one_port_and_steps_at_others(environment):
    ports = set()
    for job in range(40, 50):
        for step in range(5):
            of_step = set()
            for task in range(3):
                numbers = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_PROCID": task}
                environment({**STEP, **{name: str(number) for name, number in numbers.items()}})
                settle_place()
                of_step.add(os.environ["MASTER_PORT"])
            assert len(of_step) == 1
            ports |= of_step
    assert len(ports) == 50


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # The script of a job, and a shell of salloc: the tasks of the job are not started yet.
        {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        # Launchers that are tasks of a step themselves.
        {**STEP, "ACCELERATE_MIXED_PRECISION": "no"},
        {**STEP, "OMPI_COMM_WORLD_SIZE": "5"},
        {**STEP, "PMI_SIZE": "10"},
    ],
)
def test_process_outside_a_step_of_several_tasks_waits_for_nobody(variables, environment):
    environment(variables)
    settle_place()
    assert place() == {}


def test_variables_that_are_set_count(environment):
    launched = {**{name: "0" for name in RANK_VARIABLES}, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    environment({**STEP, **launched})
    settle_place()
    assert place() == launched
    meeting_point = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    environment({**STEP, **meeting_point, "SLURM_STEP_NODELIST": "no.such.node.invalid"})
    settle_place()
    assert place().items() >= {**meeting_point, "RANK": "4"}.items()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[2-4,7]", "n2"),
        ("n[07,09-11],m1", "n07"),
        ("rack[01-02]n[1-2]", "rack01n1"),
        ("gpu-a[3,5].cluster.org,gpu-b1", "gpu-a3.cluster.org"),
    ],
)
def test_processes_meet_at_the_first_node(nodes, first, environment, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port: [host])
    environment({**STEP, "SLURM_STEP_NODELIST": nodes})
    settle_place()
    assert os.environ["MASTER_ADDR"] == first


@pytest.mark.parametrize("tasks", ["4(x2),3", "11", "1,2(x5)"])
def test_tasks_of_a_node_are_counted(tasks, environment):
    counts = {"4(x2),3": [4, 4, 3], "11": [11], "1,2(x5)": [1, 2, 2, 2, 2, 2]}[tasks]
    for node, count in enumerate(counts):
        step = {**STEP, "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
        environment({**step, "SLURM_LOCALID": str(count - 1)})
        settle_place()
        assert os.environ["LOCAL_WORLD_SIZE"] == str(count)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        *(({name: ""}, f"{name} must be set in a job step of SLURM") for name in STEP),
        ({"SLURM_PROCID": "five"}, "SLURM_PROCID in the environment must be a whole number below 5, got 'five'"),
        ({"SLURM_PROCID": "5"}, "SLURM_PROCID in the environment must be a whole number below 5, got '5'"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID in the environment must be a whole number below 2, got '2'"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID in the environment must be a whole number below 2, got '2'"),
        ({"SLURM_STEP_NUM_TASKS": "-5"}, "SLURM_STEP_NUM_TASKS in the environment must be a whole number, got '-5'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3"}, "SLURM_STEP_TASKS_PER_NODE in the environment must be the 5 tasks"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3;2"}, "SLURM_STEP_TASKS_PER_NODE in the environment must be the 5 tasks"),
        ({"SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST in the environment must be names of nodes"),
        ({"SLURM_STEP_NODELIST": "no.such.node.invalid"}, "the first node of SLURM_STEP_NODELIST, must have an addr"),
        ({"RANK": "4"}, "must all be set in a job step of SLURM, or none of them, got RANK: unset"),
        ({"WORLD_SIZE": "5", "LOCAL_RANK": "1"}, "none of them, got WORLD_SIZE and LOCAL_RANK: unset"),
    ],
)
def test_step_that_is_half_told_is_refused(variables, message, environment):
    environment({**STEP, **variables})
    with pytest.raises(UsageError) as error:
        settle_place()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_gpus_of_a_task_are_looked_for(environment):
    for variables, is_without in [({}, False), (STEP, True), ({**STEP, "SLURM_GPUS_ON_NODE": "4"}, False)]:
        environment(variables)
        assert slurm.gives_no_gpu() == is_without


@pytest.fixture
def squeue(environment, tmp_path, monkeypatch):
    """Return a function: what a command `squeue` says -> this process is in job 41."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def saying(text: str) -> None:
        program = tmp_path / "squeue"
        program.write_text(f"#!/bin/sh\ncase $* in *'--jobs 41'*) printf '{text}';; esac\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        environment({"SLURM_JOB_ID": "41"})

    return saying


@pytest.mark.parametrize(
    ("left", "seconds"),
    [("0:30", 30), ("19:20", 1160), ("1:00:00", 3600), ("2-03:04:05", 183845), ("UNLIMITED", None)],
)
def test_time_left_is_read_from_squeue(left, seconds, squeue):
    squeue(f"40 7:00\\n41 {left}\\n")
    assert slurm.job_seconds_left() == seconds


def test_time_left_is_read_from_the_environment(environment):
    environment({"SLURM_JOB_ID": "41", "SLURM_JOB_END_TIME": str(int(time.time()) + 3600)})
    assert slurm.job_seconds_left() == pytest.approx(3600, abs=60)
    environment({"SLURM_JOB_ID": "41", "SLURM_JOB_END_TIME": str(int(time.time()) + 365 * 86400)})
    assert slurm.job_seconds_left() is None


def test_run_stops_before_its_job_ends(squeue):
    now = time.monotonic()
    for left, seconds in [("2:00:00", 7200 - JOB_MARGIN_SECONDS), ("10:00", 540)]:
        squeue(f"41 {left}")
        hours, line = hours_in_job(now - 100)  # a run that has begun 100 seconds ago
        assert hours is not None
        assert 3600 * hours == pytest.approx(seconds + 100, abs=60)
        assert "job 41 of SLURM ends in" in str(line)


def test_limit_that_is_none_or_not_known_stops_no_run(squeue, environment):
    squeue("41 UNLIMITED")
    assert hours_in_job(0.0) == (None, "job 41 of SLURM has no time limit")
    for text in ("41 INVALID", "", "42 1:00"):
        squeue(text)
        hours, line = hours_in_job(0.0)
        assert hours is None
        assert "the time limit of job 41 of SLURM is not known" in str(line)
    environment({"PATH": "", "SLURM_JOB_ID": "41"})
    assert "not known, [Errno 2]" in str(hours_in_job(0.0)[1])
    environment({})
    assert hours_in_job(0.0) == (None, None)


HOLD = """
import sys
from pathlib import Path
from hf_ddpm.runtime.files import lock
with lock(Path(sys.argv[1])):
    pass
"""


def test_lock_names_the_job_that_holds_it(environment, tmp_path):
    environment({"SLURM_JOB_ID": "41"})
    with lock(tmp_path):
        second = python(["-c", HOLD, str(tmp_path)], tmp_path, None, tmp_path / "said.txt")
        second.start()
        second.join()
    assert second.exitcode == 1
    assert "job 41 of SLURM has locked it" in (tmp_path / "said.txt").read_text()


def srun(config: TrainingConfig, folder: Path, *flags: str, **variables: str) -> tuple[list[int | None], str]:
    """Do what `srun --ntasks 2 hf-ddpm train` does on one node; return the exit codes, and what was said."""
    save_config(config, folder / "config.yaml")
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "CUDA_VISIBLE_DEVICES": "", **variables}
    # What the tests were started with is none of a task's.
    kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES}
    tasks = []
    for task in ("0", "1"):
        told = {**kept, **step, "SLURM_PROCID": task, "SLURM_LOCALID": task}
        command = [str(ROOT / "train_accelerate.py"), "--config", str(folder / "config.yaml"), *flags]
        command += ["--output_dir", config.output_dir, "--resume_from_checkpoint", "latest"]
        tasks.append(python(command, folder, told, folder / "said.txt"))
        tasks[-1].start()
    for task in tasks:
        task.join(120)
    return [task.exitcode for task in tasks], (folder / "said.txt").read_text()


@pytest.mark.slow
def test_tasks_of_a_step_train_what_processes_of_a_launcher_do(tiny_settings, tmp_path):
    """Also when their job ends after the first step; it comes again with a time of its own, which counts."""
    config = TrainingConfig(**{**tiny_settings, "max_train_steps": 2, "lr_warmup_steps": 1})
    launched = replace(config, output_dir=str(tmp_path / "launched"))
    assert start(launched, 2) == [0, 0]
    end = str(int(time.time()))
    codes, said = srun(config, tmp_path, SLURM_JOB_END_TIME=end)
    assert codes == [STOPPED, STOPPED], said
    assert f"job {os.getpid()} of SLURM ends in 0 s" in said
    codes, said = srun(config, tmp_path, "--max_train_hours", "1", SLURM_JOB_END_TIME=end)
    assert codes == [0, 0], said
    assert "the run resumes from checkpoint-1" in said
    assert said.count("of SLURM ends in") == 1
    assert json.loads((Path(config.output_dir) / "run.json").read_text())["training"]["num_processes"] == 2
    assert not differences(Path(config.output_dir), Path(launched.output_dir))
