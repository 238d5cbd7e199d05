"""Several gloo processes under the launcher against one process: the same samples, losses and parameters."""

import re
import socket
import subprocess

import pytest
import torch
from conftest import ROOT
from runs import STEPS_PER_EPOCH, command, digits, environment, launch, log_lines, run, step_losses
from safetensors.torch import load_file

from engine.checkpoint import load_newest_checkpoint

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, 64 images per step."""
    folder = tmp_path_factory.mktemp("alone")
    result = run(command(*digits(folder, "--log_interval", 1, "--clip_grad", 0.5)))
    assert result.returncode == 0, result.stderr
    return folder


def assert_losses_agree(one, other, epochs=2):
    ours, theirs = step_losses(one), step_losses(other)
    assert ours.keys() == theirs.keys() == set(range(1, epochs * STEPS_PER_EPOCH + 1))
    for step, loss in ours.items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(theirs[step]), abs=1e-5), step


@pytest.mark.fault("R25")
@pytest.mark.parametrize(("batch_size", "accumulated"), [(32, 1), (16, 2)])
def test_two_processes_equal_one(alone, tmp_path, batch_size, accumulated):
    arguments = digits(tmp_path, "--log_interval", 1, "--clip_grad", 0.5, "--batch_size", batch_size)
    result = launch([*arguments, "--num_workers", "1"], processes=2)
    assert result.returncode == 0, result.stderr
    assert f"{batch_size} x 2 processes x {accumulated} accumulated" in result.stdout
    assert_losses_agree(alone, tmp_path)
    ours, theirs = log_lines(alone), log_lines(tmp_path)
    for a, b in zip(ours[:20], theirs[:20], strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert result.stdout.count("epoch 1 done") == 1  # only rank 0 speaks


@pytest.mark.fault("R4")
def test_resume_on_another_number_of_processes(tmp_path):
    """1, then 2, then 1 process; 64 images per step throughout, accum_iter follows."""
    arguments = digits(tmp_path, "--log_interval", 1, "--clip_grad", 0.5, "--epochs", 3, "--save_epochs", 1)
    arguments[arguments.index("--total_batch_size") + 1] = "null"
    for epoch, (processes, batch_size) in enumerate([(1, 64), (2, 32), (1, 32)], start=1):
        result = launch([*arguments, "--batch_size", str(batch_size), "--stop_epoch", str(epoch)], processes)
        assert result.returncode == 0, result.stderr
    whole = tmp_path / "whole"
    assert run(command(*digits(whole, "--log_interval", 1, "--clip_grad", 0.5, "--epochs", 3))).returncode == 0
    assert_losses_agree(whole, tmp_path, epochs=3)
    saved = load_newest_checkpoint(tmp_path)
    assert (saved["total_batch"], saved["samples_seen"]) == (64, 3 * STEPS_PER_EPOCH * 64)


@pytest.mark.fault("R6")
def test_another_total_is_refused_with_the_numbers(tmp_path):
    arguments = digits(tmp_path)
    arguments[arguments.index("--total_batch_size") + 1] = "null"
    assert run(command(*arguments, "--stop_epoch", "1")).returncode == 0
    result = launch(arguments, processes=2)
    assert result.returncode != 0
    assert "the run's total batch so far, 64 is not a multiple of batch_size 64 x 2 processes = 128" in result.stderr
    assert result.stderr.count("error: ") == 1


@pytest.mark.fault("R3")
def test_two_processes_resume_bit_for_bit(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    common = ["--log_interval", 1, "--save_epochs", 1, "--batch_size", 32]
    assert launch(digits(whole, *common), 2).returncode == 0
    assert launch(digits(stopped, *common, "--stop_epoch", 1), 2).returncode == 0
    assert launch(digits(stopped, *common), 2).returncode == 0
    assert step_losses(whole) == step_losses(stopped)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    epochs = [[line["epoch_loss"] for line in log_lines(f) if "epoch_loss" in line] for f in (whole, stopped)]
    assert epochs[0] == epochs[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_are_two_launchers(alone, tmp_path):
    arguments = digits(tmp_path, "--log_interval", 1, "--clip_grad", 0.5, "--batch_size", 32)
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            ["sh", str(ROOT / "run_pretrain.sh"), *arguments],
            env=environment(
                NGPU="1", NNODES="2", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for node in nodes:
        _, stderr = node.communicate(timeout=300)
        assert node.returncode == 0, stderr
    assert_losses_agree(alone, tmp_path)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NGPU": "two"}, "error: NGPU must be a whole number, got 'two'"),
        ({"NGPU": "0"}, "error: NGPU must be at least 1"),
        ({"NGPU": "1", "NNODES": "2"}, "error: NODE_RANK must be a whole number, got ''"),
        ({"NGPU": "1", "NNODES": "2", "NODE_RANK": "0"}, "error: NNODES=2 needs MASTER_ADDR"),
    ],
)
def test_the_launcher_refuses_a_bad_environment(env, message):
    result = run(["sh", str(ROOT / "run_pretrain.sh")], **env)
    assert result.returncode == 2
    assert re.match(re.escape(message), result.stderr)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "33554432 17179869184"), ({"MALLOC_TRIM_THRESHOLD_": "1"}, "33554432 1")]
)
def test_the_launcher_keeps_freed_memory_unless_told_otherwise(tmp_path, given, expected):
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$MALLOC_MMAP_THRESHOLD_ $MALLOC_TRIM_THRESHOLD_"\n')
    interpreter.chmod(0o755)
    result = run(["sh", str(ROOT / "run_pretrain.sh")], PYTHON=str(interpreter), NGPU="1", **given)
    assert result.stdout.split() == expected.split()
