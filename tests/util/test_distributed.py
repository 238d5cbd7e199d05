"""Several gloo processes under the launcher against one process: the same samples, losses and
parameters."""

import json
import re
import signal
from pathlib import Path

import pytest
from conftest import ROOT
from runs import (
    STEPS_PER_EPOCH,
    changed_files,
    digits,
    driven,
    files_of,
    launch,
    log_lines,
    run,
    stop_at,
)

from engine.run.checkpoint import load_newest_checkpoint

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one process, 64 images per step, and the folder in which the driver notes its
    samples."""
    folder, samples = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("samples")
    arguments = digits(folder, "--log_interval", 1, "--clip_grad", 0.5)
    result = run(driven("main_pretrain.py", *arguments), USED=str(samples))
    assert result.returncode == 0, result.stderr
    return folder, samples


def assert_steps_agree(one: Path, other: Path) -> None:
    """Loss and gradient norm of all 124 steps within a millionth of their value; 3e-7 and 2e-7 were
    measured."""
    ours, theirs = (
        {
            (line["step"], name): line[name]
            for line in log_lines(folder)
            if "loss" in line
            for name in ("loss", "grad_norm")
        }
        for folder in (one, other)
    )
    assert len(ours) == 2 * 2 * STEPS_PER_EPOCH
    assert ours == pytest.approx(theirs, rel=1e-6, abs=0)


@pytest.mark.fault("R22", "R25")
@pytest.mark.parametrize(("batch_size", "accumulated"), [(32, 1), (16, 2)])
def test_two_processes_equal_one_and_leave_a_finished_run_alone(
    alone, tmp_path, batch_size, accumulated
):
    arguments = digits(
        tmp_path, "--log_interval", 1, "--clip_grad", 0.5, "--batch_size", batch_size
    )
    result = launch([*arguments, "--num_workers", "1"], processes=2)
    assert result.returncode == 0, result.stderr
    assert f"{batch_size} x 2 processes x {accumulated} accumulated" in result.stdout
    assert_steps_agree(alone[0], tmp_path)
    assert result.stdout.count("epoch 1 done") == 1  # only rank 0 speaks
    before = files_of(tmp_path)
    again = launch(arguments, processes=2)
    assert again.returncode == 0, again.stderr
    assert "is already finished at step 124" in again.stdout
    assert changed_files(tmp_path, before) <= {"log.txt", ".lock"}


def used(folder: Path) -> dict[int, list[list]]:
    """Step -> what the driver wrote of its samples, by all processes, in their order in the run;
    each once."""
    found: dict[int, list[list]] = {}
    for path in folder.glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["samples"])
    return {
        step: sorted(samples, key=lambda sample: sample[1:3]) for step, samples in found.items()
    }


@pytest.mark.fault("R4", "R6")
def test_resume_on_another_number_of_processes(alone, tmp_path):
    """1, then 2, then 1 process, each time within an epoch; 64 images per step throughout,
    accum_iter follows. A number of processes that cannot keep that is refused."""
    folder, samples = tmp_path / "run", tmp_path / "samples"
    samples.mkdir()
    arguments = digits(folder, "--log_interval", 1, "--clip_grad", 0.5)
    arguments[arguments.index("--total_batch_size") + 1] = "null"
    # two processes stop a step after the signal, see engine/run/interrupts.py
    stops = [
        (1, 64, 30, stop_at(30, signal.SIGTERM)),
        (2, 32, 75, stop_at(74, signal.SIGUSR1, rank=1)),
        (1, 32, 124, "[]"),
    ]
    for processes, batch_size, step, faults in stops:
        command = [*arguments, "--batch_size", str(batch_size)]
        result = run(
            driven("main_pretrain.py", *command, processes=processes),
            FAULTS=faults,
            USED=str(samples),
        )
        saved = load_newest_checkpoint(folder)
        assert (result.returncode == 0, saved.step) == (step == 124, step), result.stderr
    theirs = used(alone[1])
    assert {len(of_step) for of_step in theirs.values()} == {64} and len(theirs) == 124
    assert used(samples) == theirs  # images, crops and masks
    assert_steps_agree(alone[0], folder)
    assert (saved.total_batch, saved.samples_seen) == (64, 124 * 64)
    refused = launch(arguments, processes=2)
    text = "64 is not a multiple of batch_size 64 x 2 processes = 128"
    assert refused.returncode != 0 and text in refused.stderr
    assert refused.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NGPU": "two"}, "error: NGPU must be a whole number, got 'two'"),
        ({"NGPU": "0"}, "error: NGPU must be at least 1"),
        ({"NGPU": "1", "NNODES": "2"}, "error: NODE_RANK must be a whole number, got ''"),
        ({"NGPU": "1", "NNODES": "2", "NODE_RANK": "0"}, "error: NNODES=2 needs MASTER_ADDR"),
        ({"NGPU": "1", "NNODES": "1:2"}, "error: NNODES=1:2 needs MASTER_ADDR"),
        (
            {"NGPU": "1", "NNODES": "2:1"},
            "error: NNODES must be a number from 1, or LEAST:MOST, got '2:1'",
        ),
        ({"NGPU": "1", "NNODES": "1:2:3"}, "error: NNODES must be a whole number, got '2:3'"),
        (
            {"NGPU": "1", "MAX_RESTARTS": "often"},
            "error: MAX_RESTARTS must be a whole number, got 'often'",
        ),
        (
            {
                "NGPU": "1",
                "NNODES": "2",
                "NODE_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MAX_RESTARTS": "1",
            },
            "error: MAX_RESTARTS on several machines needs NNODES=2:2",
        ),
    ],
)
def test_the_launcher_refuses_a_bad_environment(env, message):
    result = run(["sh", str(ROOT / "run_pretrain.sh")], **env)
    assert result.returncode == 2
    assert re.match(re.escape(message), result.stderr)
