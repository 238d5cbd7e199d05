"""The launchers on one machine: what listens, and what happens when the launcher, its terminal or
its session ends."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import command, digits, driven, environment, launch, log_lines, run
from test_nodes import DRIVEN, children, start, wait_for_step

from engine.run.checkpoint import load_newest_checkpoint

long = pytest.mark.long


def launched(out: Path, *before: str, pause: str = "0.1", **env: str) -> subprocess.Popen[bytes]:
    """A pretraining of two processes, 12 s of it steps; its output in `out`.txt."""
    arguments = digits(out, "--log_interval", 1, "--batch_size", 32)
    return start(
        [*before, "sh", "-c", f'{DRIVEN} "$@"', "sh"],
        arguments,
        out.with_suffix(".txt"),
        NGPU="2",
        PAUSE=pause,
        **env,
    )


def saved_step(out: Path) -> int:
    """The step of the newest checkpoint, which is the last one that was logged."""
    saved = load_newest_checkpoint(out)
    assert saved is not None and saved.step == log_lines(out)[-1]["step"]
    return saved.step


def listening(pids: list[int]) -> list[str]:
    """The addresses on which processes listen, as the kernel writes them."""
    links = [
        str(entry.readlink())
        for pid in pids
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if entry.is_symlink()
    ]
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]


@long
@pytest.mark.fault("R10")
def test_processes_listen_on_this_machine_alone_and_save_when_their_launcher_is_killed(tmp_path):
    """Else they would go on, hold the folder, and nobody could stop them."""
    out = tmp_path / "out"
    launcher = launched(out)
    wait_for_step(out, 10, [launcher])
    pids = children(launcher.pid)
    addresses = listening([launcher.pid, *pids])
    assert len(pids) == 2 and addresses  # the processes' own sockets
    assert all(re.match(r"0100007F:|0{24}01000000:", address) for address in addresses), addresses
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    step = saved_step(out)
    assert 10 <= step < 124
    assert launched(out, pause="0").wait(timeout=120) == 0
    assert f"at step {step}" in (tmp_path / "out.txt").read_text()


@long
@pytest.mark.fault("R10")
def test_a_save_at_the_end_may_take_longer_than_half_a_minute(tmp_path):
    """As that of a huge model on a shared disk; torchrun alone would kill it."""
    out = tmp_path / "out"
    launcher = launched(out, FAULTS='[{"do": "hang", "seconds": 35, "at": "save", "step": 0}]')
    wait_for_step(out, 5, [launcher])
    launcher.send_signal(signal.SIGUSR1)
    began = time.monotonic()
    assert launcher.wait(timeout=120) == 128 + signal.SIGUSR1
    assert time.monotonic() - began > 35 and saved_step(out) >= 5
    assert "Traceback" not in (tmp_path / "out.txt").read_text()


@long
@pytest.mark.parametrize("shield", [(), ("nohup",)])
def test_the_end_of_a_session_stops_a_job_unless_nohup_shields_it(tmp_path, shield):
    out = tmp_path / "out"
    launcher = launched(out, *shield, pause="0.02")
    wait_for_step(out, 10, [launcher])
    for pid in [launcher.pid, *children(launcher.pid)]:
        os.kill(pid, signal.SIGHUP)
    code = launcher.wait(timeout=120)
    assert (code == 0) == bool(shield) == (saved_step(out) == 124)
    assert ("stopped by SIGHUP" in (tmp_path / "out.txt").read_text()) == (not shield)


@long
def test_a_run_whose_terminal_is_closed_saves(tmp_path):
    """A real terminal: what is written to it fails from then on."""
    out = tmp_path / "out"
    controller, terminal = os.openpty()
    arguments = driven("main_pretrain.py", *digits(out, "--log_interval", 1, "--epochs", 40))
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment(PAUSE="0.01"),
        start_new_session=True,
    )
    os.close(terminal)
    wait_for_step(out, 10, [process])
    shown = os.read(controller, 65536)
    os.close(controller)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert saved_step(out) >= 10 and b"steps per epoch" in shown


@long
def test_a_signal_before_the_first_step_leaves_nothing_in_the_way(tmp_path):
    """While images are listed and the model is built there is nothing to save."""
    out = tmp_path / "out"
    arguments = command(*digits(out, "--epochs", 1))
    process = start(arguments, [], tmp_path / "out.txt")
    while not (out / "log.txt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    assert process.wait(timeout=60) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert run(arguments).returncode == 0
    assert log_lines(out)[-1]["step"] == 62


def test_a_users_mistake_under_the_launcher_is_its_line_alone():
    result = launch(["--lr", "fast"], 2)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "lr" in line


@long
def test_a_failure_that_is_no_mistake_keeps_its_traceback_and_torchruns_summary(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("1 / 0\n")
    line = f". {ROOT}/util/launch.sh; launch {ROOT} {os.path.relpath(script, ROOT)}"
    result = run(["sh", "-c", line], NGPU="1", MAX_RESTARTS="1")
    assert result.returncode == 1
    assert result.stderr.count("ZeroDivisionError") == 2  # once for each start
    assert "exitcode" in result.stderr and "ChildFailedError" not in result.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"PYTHON": "mine"}, "mine"),
        ({"VIRTUAL_ENV": "/env"}, "python3"),
        ({"CONDA_PREFIX": "/env"}, "python3"),
        ({"PYTHON": "mine", "CONDA_PREFIX": "/env"}, "mine"),
        ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, ".venv/bin/python"),
        ({}, ".venv/bin/python"),
    ],
)
def test_the_active_environment_wins_over_venv(tmp_path, given, expected):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to("/bin/sh")
    line = f". {ROOT}/util/launch.sh; choose_python {tmp_path}; echo $PYTHON"
    printed = subprocess.check_output(
        ["sh", "-c", line], env={"PATH": os.environ["PATH"], **given}, text=True
    )
    assert printed.strip().removeprefix(f"{tmp_path}/") == expected


def test_shell_scripts_keep_their_line_ends_everywhere():
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("util/*.sh"), *ROOT.glob("tools/**/*.s[hb]*")]
    result = run(["git", "check-attr", "eol", "--", *map(str, scripts)])
    assert len(scripts) >= 7 and result.stdout.count("eol: lf") == len(scripts)
    assert not [script for script in scripts if b"\r" in script.read_bytes()]


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_a_launcher_answers_without_torch(flag, tmp_path):
    """Counting the GPUs would take seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    arguments = ["--config", "cfgs/quickstart/pretrain.yaml", flag]
    result = run(["sh", "run_pretrain.sh", *arguments], PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "mask_ratio" in result.stdout
