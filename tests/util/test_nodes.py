"""Several machines as several launchers on this one, and a machine that is lost and back."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import (
    STEPS_PER_EPOCH,
    command,
    digits,
    environment,
    free_port,
    log_lines,
    make_pictures,
    pretraining,
    run,
    step_losses,
)
from test_distributed import assert_steps_agree

pytestmark = pytest.mark.long
DRIVEN = (
    f". {ROOT}/util/launch.sh; launch {ROOT} tests/fault_driver.py main_pretrain.py"  # for PAUSE
)


PLACE = {"NGPU": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def start(
    shell: list[str], arguments: list[str], output: Path, **env: str
) -> subprocess.Popen[bytes]:
    """A launcher, its output in a file."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [*shell, *arguments], env=environment(**env), stdout=file, stderr=file, cwd=ROOT
        )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for_step(folder: Path, step: int, nodes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "log.jsonl").exists() or max(step_losses(folder), default=0) < step:
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes), (
            "see the launchers' output"
        )
        time.sleep(0.05)


def machines(tmp_path: Path, commands: list[list[str]]) -> list[subprocess.Popen[bytes]]:
    """A launcher of two processes for each command; their output in `node0` and so on."""
    return [
        start(
            ["sh", str(ROOT / "run_pretrain.sh")],
            arguments,
            tmp_path / f"node{rank}",
            NODE_RANK=str(rank),
            NNODES=str(len(commands)),
            **PLACE,
        )
        for rank, arguments in enumerate(commands)
    ]


def test_two_machines_of_two_processes_equal_one_process(tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert run(command(*digits(alone, "--log_interval", 1))).returncode == 0
    arguments = digits(out, "--log_interval", 1, "--batch_size", 16)
    for node in machines(tmp_path, [arguments, arguments]):
        assert node.wait(timeout=300) == 0, (tmp_path / "node0").read_text()
    assert_steps_agree(alone, out)


def test_machines_with_different_images_are_refused(tmp_path):
    """A copy on each machine's own disk, one of which lacks a file."""
    disks = [make_pictures(tmp_path / f"disk{rank}") for rank in (0, 1)]
    (disks[1] / "train" / "one" / "003.png").unlink()
    more = ("--batch_size", 6, "--total_batch_size", 24)
    commands = [pretraining(disk, tmp_path / "out", *more) for disk in disks]
    for rank, node in enumerate(machines(tmp_path, commands)):
        assert node.wait(timeout=120) != 0
        printed = (tmp_path / f"node{rank}").read_text()
        assert "the processes see different images: data_path must" in printed
    assert not list((tmp_path / "out").glob("checkpoint*"))


@pytest.mark.fault("R12")
def test_a_job_goes_on_without_a_lost_machine_and_with_it_when_it_is_back(tmp_path):
    """NNODES=1:2 with two processes each: four, then two, then four again, at the same total
    batch."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert run(command(*digits(alone, "--log_interval", 1))).returncode == 0
    arguments = digits(out, "--log_interval", 1, "--batch_size", 16, "--save_minutes", 1e-9)

    def launcher(name: str) -> subprocess.Popen[bytes]:
        shell = ["sh", "-c", f'{DRIVEN} "$@"', "sh"]
        return start(shell, arguments, tmp_path / name, PAUSE="0.1", NNODES="1:2", **PLACE)

    nodes = [launcher("stays")]
    while not listens(int(PLACE["MASTER_PORT"])):
        assert nodes[0].poll() is None, (tmp_path / "stays").read_text()
        time.sleep(0.05)  # where all are on one machine, the first one keeps the list of machines
    nodes.append(launcher("lost"))
    wait_for_step(out, 10, nodes)
    for pid in [nodes[1].pid, *children(nodes[1].pid)]:
        os.kill(pid, signal.SIGKILL)
    nodes.pop().wait()
    before = max(step_losses(out))
    wait_for_step(out, before + 10, nodes)
    nodes.append(launcher("back"))
    for node, name in zip(nodes, ("stays", "back"), strict=True):
        assert node.wait(timeout=300) == 0, (tmp_path / name).read_text()
    assert_steps_agree(alone, out)
    assert [line["step"] for line in log_lines(out) if "grad_norm" in line] == list(
        range(1, 2 * STEPS_PER_EPOCH + 1)
    )
    log = (out / "log.txt").read_text()
    assert re.findall(r"16 x (\d) processes x (\d) accumulated", log) == [
        ("4", "1"),
        ("2", "2"),
        ("4", "1"),
    ]
    assert "stopped by SIGTERM" in log  # to make room for the one that is back nothing is lost
    assert before - int(re.findall(r"resuming .* at step (\d+)", log)[0]) <= 2
