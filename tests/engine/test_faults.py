"""Faults of running jobs, on real processes under the launcher.

Each run is compared with the same run without a fault, bit for bit: losses, state and weights.
`tests/fault_driver.py` does the harm at an exact step; signals come from the operating system.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same_run
from runs import (
    STEPS_PER_EPOCH,
    command,
    digits,
    driven,
    environment,
    flip_bit,
    in_child,
    log_lines,
    pictures,
    pretraining,
    run,
    saved_step,
    stop_at,
)

import engine.loop
import main_finetune
import main_knn
import main_pretrain
from data.loader import EvalDataset, PretrainDataset
from engine.pictures.monitor import Monitor
from engine.run import interrupts as signals
from engine.run.batches import Batches
from engine.run.checkpoint import load_newest_checkpoint
from engine.run.records import read_log
from engine.run.saving import Saver
from engine.schedule import Plan
from util.errors import InputError, LocalInputError
from util.watchdog import alive, watched

SEEDS = int(os.environ.get("MAE_KILL_SEEDS", "5"))


def digests(folder: Path, rank: int) -> dict[int, dict[str, str]]:
    """What the driver wrote by step; a step that was computed again must have given the same."""
    found: dict[int, dict[str, str]] = {}
    for entry in read_log(folder / f"{rank}.jsonl"):
        assert found.setdefault(entry["step"], entry) == entry
    return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """124 steps in one process."""
    folder = tmp_path_factory.mktemp("oracle")
    main_pretrain.main(digits(folder, "--log_interval", 1))
    return folder


@pytest.fixture(scope="module")
def oracle_of_two(tmp_path_factory):
    """124 steps in two processes."""
    folder = tmp_path_factory.mktemp("oracle_of_two")
    result = run(driven("main_pretrain.py", *two(folder), processes=2))
    assert result.returncode == 0, result.stderr
    return folder


def two(folder: Path, *more) -> list[str]:
    """A timeout ends it also where a row fails."""
    return digits(folder, "--log_interval", 1, "--batch_size", 32, "--timeout", 2, *more)


@contextmanager
def stopped_by(signum, owner, name, when):
    """A block that a signal ends: this process gets it when `owner.name` is called with arguments
    that fulfil `when`."""
    original = getattr(owner, name)

    def signalled(*args):
        if when(*args):
            os.kill(os.getpid(), signum)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(owner, name, signalled)
        yield
    assert end.value.code == 128 + signum
    assert signal.getsignal(signum) is not signals._note and signals.received() == 0


# --- R2: harm at random times


def tree(pid: int) -> list[int]:
    """A process and those that it started, of all generations."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(of_child for child in children for of_child in tree(int(child)))]


@pytest.mark.long
@pytest.mark.fault("R2", "R8", "R14")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_harm_at_random_times_costs_at_most_one_save_interval(oracle, tmp_path, seed):
    """SIGKILL, SIGTERM, or the end of a loader process, and sometimes the newest checkpoint is
    damaged then; the same command until the run is done.

    A save begins after each step while the one before may still be under way: at most two steps
    are lost, and one more by the damage.
    """
    chance, harms, log = random.Random(seed), 0, tmp_path / "log.jsonl"
    arguments = digits(tmp_path, "--log_interval", 1, "--save_minutes", 1e-9)
    while True:
        size, workers = log.stat().st_size if log.exists() else 0, chance.choice((0, 2))
        process = subprocess.Popen(
            driven("main_pretrain.py", *arguments, "--num_workers", str(workers)),
            env=environment(PAUSE="0.02"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and (not log.exists() or log.stat().st_size == size):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 3))
        if process.poll() is None:
            signum = chance.choice((signal.SIGKILL, signal.SIGTERM))
            os.kill(chance.choice(tree(process.pid)), signum)
        if process.wait(timeout=60) == 0:
            break
        harms += 1
        done = max(line["step"] for line in read_log(log))
        damaged = harms == 2 and saved_step(tmp_path) > 1
        if damaged:
            flip_bit(sorted(tmp_path.glob("checkpoint-*.pth"))[-1])
        assert done - 2 - damaged <= saved_step(tmp_path) <= done + 1
    assert harms >= 2
    assert_same_run(oracle, tmp_path)


# --- R3, R11: two processes, a signal to one of them


@pytest.mark.long
@pytest.mark.fault("R3", "R11")
def test_two_processes_stop_at_one_step_and_go_on_bit_for_bit(oracle_of_two, tmp_path):
    """Stopped after the first step, mid-epoch, the last of an epoch and the first of the next, by
    one process's signal.

    A signal before step k stops all processes after it.
    """
    arguments = driven("main_pretrain.py", *two(tmp_path), processes=2)
    for step, signum, rank in (
        (1, signal.SIGTERM, 1),
        (30, signal.SIGUSR1, 0),
        (62, signal.SIGUSR1, 1),
        (63, signal.SIGINT, 0),
    ):
        result = run(arguments, FAULTS=stop_at(step - 1, signum, rank), DIGESTS=str(tmp_path))
        assert result.returncode != 0
        assert f"stopped by {signum.name}; the same command goes on after step {step}" in (
            result.stdout
        )
        assert re.search(rf"exitcode\s+: {128 + signum} ", result.stderr)
        assert [max(digests(tmp_path, rank)) for rank in (0, 1)] == [step, step]
        assert saved_step(tmp_path) == step
        assert "Traceback" not in result.stdout and "Saver" not in result.stderr
    result = run(arguments, DIGESTS=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert_same_run(oracle_of_two, tmp_path)
    mine, others = digests(tmp_path, 0), digests(tmp_path, 1)
    assert mine == others and set(mine) == set(range(2 * STEPS_PER_EPOCH))
    # not vacuous: only the first step, whose learning rate is 0, changes nothing
    assert len({entry["model"] for entry in mine.values()}) == len(mine) - 1


# --- R10: SIGTERM to the launcher


@pytest.mark.long
@pytest.mark.fault("R10")
def test_a_launcher_that_is_terminated_stops_its_processes_which_save(tmp_path, data):
    """Fine-tuning of two processes: within a step, a save and a validation, and twice within a
    second."""
    more = ["--batch_size", 6, "--total_batch_size", 12, "--ema_decay", 0.5]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    started = [
        driven("main_finetune.py", *pictures(data, folder, *more), processes=2)
        for folder in (whole, stopped)
    ]
    assert run(started[0]).returncode == 0
    # a save and a validation come after the step that begins there
    strikes = [("step", 4, 1), ("save", 9, 1), ("validation", 19, 1), ("step", 24, 2)]
    for at, step, times in strikes:
        fault = {"do": signal.SIGTERM, "to": "launcher", "at": at, "step": step, "times": times}
        began = time.monotonic()
        result = run(started[1], FAULTS=json.dumps([fault]), PAUSE="0.1")
        assert time.monotonic() - began < 60 and result.returncode != 0
        saved = load_newest_checkpoint(stopped)
        assert 20 * (times == 2) <= saved.step < step + 10
        if times == 1:
            assert "stopped by SIGTERM" in result.stdout, result.stderr
            assert step <= saved.step and not list(stopped.glob("*.tmp"))
            assert saved.epoch_end_pending == (at == "validation")
    result = run(started[1])
    assert result.returncode == 0, result.stderr
    assert_same_run(whole, stopped)
    assert sum("acc1" in line for line in log_lines(stopped)) == 3


def test_a_look_that_a_signal_cuts_short_is_made_again(tmp_path, data, monkeypatch):
    """In pretraining, after the first epoch and after the last: no look is lost and none is there
    twice."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--monitor_epochs", 1, "--monitor_knn", 120, "--monitor_images", 0]
    main_pretrain.main(pretraining(data, whole, *more))
    arguments = pretraining(data, cut, *more)

    def looks() -> list[int]:
        return [line["step"] for line in log_lines(cut) if line["kind"] == "monitor"]

    for stop in (10, 20):
        with stopped_by(signal.SIGTERM, Monitor, "observe", lambda _, s, at=stop: s.step == at):
            main_pretrain.main(arguments)
        saved = load_newest_checkpoint(cut)
        assert (saved.step, saved.epoch_end_pending) == (stop, True)
        assert looks() == list(range(0, stop, 10)) and not (cut / "model.safetensors").exists()
        # looks again, and is cut off before its next checkpoint: it has to look once more
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(Plan, "lr", None)
            patch.setattr(main_pretrain, "finish", None)
            main_pretrain.main(arguments)
        assert looks() == list(range(0, stop + 10, 10))
    main_pretrain.main(arguments)
    assert_same_run(whole, cut, ignore=("config", "epoch_end_pending"))
    before = (cut / "log.jsonl").read_bytes()
    main_pretrain.main(arguments)  # is finished, though its last checkpoint owes a look
    assert (cut / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("signum", "step"), [(signal.SIGTERM, 0), *((signum, 5) for signum in signals.SIGNALS)]
)
def test_one_process_stops_at_the_next_step(tmp_path, data, signum, step):
    """Before the first step there is nothing to save."""
    arguments = pretraining(data, tmp_path)
    with stopped_by(signum, Saver, "between_steps", lambda saver: saver.job.state.step == step):
        main_pretrain.main(arguments)
    assert saved_step(tmp_path) == step
    again = f"goes on after step {step}" if step else "begins anew"
    line = f"stopped by {signum.name}; the same command {again}"
    assert line in (tmp_path / "log.txt").read_text()
    assert main_pretrain.main(arguments)["step"] == 20


def test_repeats_within_two_seconds_are_ignored_and_a_later_signal_ends_at_once():
    def repeated():
        with signals.noted():
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), signum)
            assert signals.received() == signal.SIGTERM
            time.sleep(signals.REPEAT_S + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(repeated) == -signal.SIGTERM


# --- R12, R13: a process dies or hangs


@pytest.mark.long
@pytest.mark.fault("R12")
def test_a_job_one_of_whose_processes_dies_goes_on_after_the_launchers_restart(
    oracle_of_two, tmp_path
):
    fault = {"do": "exit", "at": "step", "step": 70, "rank": 1}
    arguments = driven(
        "main_pretrain.py", *two(tmp_path, "--save_epochs", 1), processes=2, restarts=1
    )
    result = run(arguments, FAULTS=json.dumps([fault]))
    assert result.returncode == 0, result.stderr
    assert f"resuming {tmp_path} at step 62" in result.stdout
    assert result.stderr.count("error: process 0 has lost the connection to another one") == 1
    assert "Traceback" not in result.stderr
    assert_same_run(oracle_of_two, tmp_path)


@pytest.mark.long
@pytest.mark.fault("R13")
@pytest.mark.parametrize(("what", "where"), [("hang", "in strike"), (signal.SIGSTOP, "in train")])
def test_a_job_one_of_whose_processes_hangs_ends_and_says_where(tmp_path, what, where):
    """It sleeps and says where itself, or it is frozen and another one says where it waits for
    it."""
    arguments = driven("main_pretrain.py", *two(tmp_path, "--timeout", 0.25), processes=2)
    began = time.monotonic()
    result = run(arguments, FAULTS=stop_at(20, what, rank=1))
    assert result.returncode != 0
    assert time.monotonic() - began < 15 + 30 + 60  # the launcher gives what is left 30 seconds
    assert "Timeout (0:00:15)!" in result.stderr
    assert where in result.stderr  # by the stacks of all its threads
    assert log_lines(tmp_path)[-1]["step"] in (20, 21)


def test_the_watchdog_ends_what_is_silent_for_too_long_and_nothing_else(capfd):
    def at_work():
        with watched(0.4 / 60):
            for _ in range(12):
                time.sleep(0.1)
                alive()
        time.sleep(0.6)  # nobody watches any more

    def silent():
        with watched(0.4 / 60):
            alive()
            time.sleep(5)

    assert (in_child(at_work), in_child(silent)) == (0, 1)
    assert "in silent" in capfd.readouterr().err


def test_an_evaluation_whose_loader_hangs_ends_and_says_where(capfd):
    """As on a file system that does not answer; outside training, where nobody else watches."""

    def stuck(index):
        time.sleep(5 if index == [2] else 0.1)

    loader = torch.utils.data.DataLoader(range(5), collate_fn=stuck)
    assert in_child(lambda: list(Batches(loader, timeout=1 / 60))) == 1
    assert "in stuck" in capfd.readouterr().err


@pytest.mark.long
def test_a_run_may_take_longer_than_one_of_its_steps_may(tmp_path, data):
    """20 steps of 0.3 s, and none may take 3 s."""
    arguments = pretraining(data, tmp_path, "--timeout", 0.05)
    assert run(driven("main_pretrain.py", *arguments), PAUSE="0.3").returncode == 0


# --- R30: a job is suspended


@pytest.mark.long
@pytest.mark.fault("R30")
@pytest.mark.parametrize(("processes", "at"), [(1, "step"), (1, "save"), (2, "step"), (2, "save")])
def test_a_job_that_was_suspended_for_longer_than_its_timeout_goes_on(tmp_path, processes, at):
    """With loader processes; the last process sleeps in a step, while another one waits for it, or
    the first one in a save."""
    rank = processes - 1 if at == "step" else 0
    fault = {"do": "hang", "seconds": 3, "at": at, "step": 20, "rank": rank}
    more = ["--log_interval", 1, "--batch_size", 64 // processes, "--timeout", 0.1]
    more += ["--num_workers", 1, "--save_minutes", 1e-9]
    arguments = driven("main_pretrain.py", *digits(tmp_path, *more), processes=processes)
    variables = environment(PAUSE="0.03", FAULTS=json.dumps([fault]))
    job = subprocess.Popen(arguments, env=variables, stdout=subprocess.DEVNULL)
    while job.poll() is None and (not log_lines(tmp_path) or log_lines(tmp_path)[-1]["step"] < 20):
        time.sleep(0.01)
    time.sleep(1)
    stopped, steps = tree(job.pid), []
    for signum, seconds in ((signal.SIGSTOP, 0.5), (0, 7), (signal.SIGCONT, 0)):
        for pid in stopped:
            os.kill(pid, signum)
        time.sleep(seconds)
        steps.append(log_lines(tmp_path)[-1]["step"])
    assert steps[0] == steps[1] < 124
    assert job.wait(timeout=60) == 0
    assert log_lines(tmp_path)[-1]["step"] == 124


# --- R14, R28: a loader process is killed, or cannot hand a batch over


class Killed(PretrainDataset):
    """A loader process that reads the samples of the 16th step is killed, once."""

    flag: Path

    def __getitem__(self, key):
        if key.step == 15 and multiprocessing.parent_process() and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


@pytest.mark.fault("R14")
def test_a_killed_loader_process_ends_the_run_with_one_line_and_no_step_is_lost(
    tmp_path, data, monkeypatch
):
    more = ["--batch_size", 6, "--total_batch_size", 12, "--epochs", 4]
    main_pretrain.main(pretraining(data, tmp_path / "whole", *more))
    monkeypatch.setattr(main_pretrain, "PretrainDataset", Killed)
    monkeypatch.setattr(Killed, "flag", tmp_path / "killed", raising=False)
    arguments = pretraining(data, tmp_path / "run", *more, "--num_workers", 2)
    with pytest.raises(LocalInputError, match="lower num_workers"):
        main_pretrain.main(arguments)
    saved = saved_step(tmp_path / "run")
    assert saved == log_lines(tmp_path / "run")[-1]["step"] and 10 < saved < 17
    assert main_pretrain.main(arguments)["step"] == 40
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.fault("R14")
def test_an_error_of_the_data_in_a_loader_process_is_raised_as_it_is(tmp_path, data, monkeypatch):
    def broken(*_):
        raise ConnectionResetError("of the data's own making")

    monkeypatch.setattr(main_pretrain.PretrainDataset, "__getitem__", broken)
    with pytest.raises(ConnectionResetError, match=r"^of the data's own making$"):
        main_pretrain.main(pretraining(data, tmp_path, "--num_workers", 1))


@pytest.mark.fault("R14")
def test_a_killed_loader_process_ends_an_evaluation_with_one_line(tmp_path, data, monkeypatch):
    def killed(dataset, key, original=EvalDataset.__getitem__):
        if key.image == 40 and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(dataset, key)

    arguments = pictures(data, tmp_path / "run", "--num_workers", 1)
    knn = ["--finetune", "random", "--class_tokens", "1", "--batch_size", 7, "--num_workers", 2]
    with monkeypatch.context() as patch:
        patch.setattr(EvalDataset, "__getitem__", killed)
        with pytest.raises(LocalInputError, match="lower num_workers"):
            main_knn.main(pictures(data, tmp_path / "knn", *knn, training=False))
        with pytest.raises(LocalInputError, match="lower num_workers"):
            main_finetune.main(arguments)
    saved = load_newest_checkpoint(tmp_path / "run")
    assert (saved.step, saved.epoch_end_pending) == (10, True)
    main_finetune.main(arguments)  # the evaluation that was cut short comes after the resume
    assert sum("acc1" in line for line in log_lines(tmp_path / "run")) == 3


@pytest.mark.fault("R28")
def test_loader_processes_that_find_no_socket_end_the_run_at_once(tmp_path, data):
    """The path of a socket has at most about 100 bytes, and torch hands batches over by one."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    arguments = pretraining(data, tmp_path / "run", "--num_workers", 2)
    result = run(command(*arguments), TMPDIR=str(folder))
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "path too long" in error and "TMPDIR" in error
    assert run(command(*arguments)).returncode == 0


@pytest.mark.fault("R28")
def test_too_little_shared_memory_is_refused_before_the_first_step(tmp_path, data, monkeypatch):
    """2 loader processes hold 3 batches each of 12 images of 28 * 28 bytes ready."""
    needed = 2 * 3 * 12 * 28 * 28
    room = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    arguments = pretraining(data, tmp_path, "--stop_epoch", 1, "--prefetch_factor", 3)
    with pytest.raises(InputError, match="/shm") as error:
        main_pretrain.main([*arguments, "--num_workers", "2"])
    assert "num_workers" in error.value.settings and not (tmp_path / "log.jsonl").exists()
    assert main_pretrain.main([*arguments, "--num_workers", "0"])["step"] == 10
    room.free = needed
    arguments[arguments.index("--stop_epoch") + 1] = "2"
    assert main_pretrain.main([*arguments, "--num_workers", "2"])["step"] == 20


class WithoutDescriptors(PretrainDataset):
    """From the 6th step on a loader process can open only `room` files more."""

    room: int

    def __getitem__(self, key):
        if key.step > 4 and multiprocessing.parent_process():
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
            held = []
            with suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            for descriptor in held[: self.room]:
                os.close(descriptor)
        return super().__getitem__(key)


@pytest.mark.fault("R28")
@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_loader_processes_without_file_descriptors_end_the_run_at_once(
    tmp_path, data, monkeypatch, room
):
    """A batch needs 5: for two tensors, for a copy of each, and to send them."""
    monkeypatch.setattr(main_pretrain, "PretrainDataset", WithoutDescriptors)
    monkeypatch.setattr(WithoutDescriptors, "room", room, raising=False)
    began = time.monotonic()
    with pytest.raises(LocalInputError, match="ulimit"):
        main_pretrain.main(pretraining(data, tmp_path, "--num_workers", 1))
    assert time.monotonic() - began < 15 and saved_step(tmp_path) > 0


@pytest.mark.fault("R28")
@pytest.mark.parametrize("failing", [0, 2])
def test_loader_processes_that_find_no_shared_memory_end_the_run_at_once(
    tmp_path, data, monkeypatch, failing
):
    """From the first tensor that a process shares on, or from a later one on."""
    shared: list[None] = []

    def share(cls, size, original=torch.UntypedStorage._new_shared, **device):
        shared.append(None)
        if multiprocessing.parent_process() and len(shared) > failing:
            raise RuntimeError("unable to allocate shared memory: No space left on device (28)")
        return original(size, **device)

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", classmethod(share))
    began = time.monotonic()
    with pytest.raises(LocalInputError, match="enlarge the shared memory /dev/shm"):
        main_pretrain.main(pretraining(data, tmp_path, "--num_workers", 1))
    assert time.monotonic() - began < 15 and saved_step(tmp_path) <= 2


# --- R16: losses and gradients that are not finite


@pytest.mark.long
@pytest.mark.fault("R16")
def test_a_bad_loss_or_gradient_of_one_process_is_skipped_by_all_and_ends_all(tmp_path, data):
    """NaN in the loss of process 1 in two steps, Inf in one gradient of process 0 in another, then
    NaN for good."""
    folder = tmp_path / "run"
    bad = [
        {"at": "loss", "rank": 1, "step": 5, "count": 2},
        {"at": "gradient", "rank": 0, "step": 12},
        {"at": "loss", "rank": 1, "step": 22, "count": 99},
    ]
    more = ["--batch_size", 6, "--total_batch_size", 12, "--ema_decay", 0.5]
    more += ["--max_bad_steps", 3, "--save_minutes", 1e-9]
    arguments = driven("main_finetune.py", *pictures(data, folder, *more), processes=2)
    result = run(arguments, FAULTS=json.dumps(bad), DIGESTS=str(tmp_path))
    assert result.returncode != 0
    mine, others = digests(tmp_path, 0), digests(tmp_path, 1)
    assert mine == others and set(mine) == set(range(25))
    untouched = [n for n in range(1, 24) if mine[n] | {"step": 0} == mine[n + 1] | {"step": 0}]
    assert untouched == [5, 6, 12, 22, 23]  # also the optimiser's moments and count of steps
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    entry = read_log(folder / "bad_steps.jsonl")[-1]
    assert (entry["step"], entry["process"], entry["loss"], len(entry["images"])) == (
        25,
        1,
        None,
        6,
    )
    assert error.startswith("error: 3 steps in a row ") and f"{folder}/bad_steps.jsonl" in error
    assert re.search(r"'step': \d+, 'lr': .*'loss': None, 'images': \[.*\], 'process': 1", error)
    assert saved_step(folder) == 24  # step 25 is where it ended


def test_the_images_of_the_error_are_those_of_the_step(tmp_path, data, monkeypatch):
    """In one process, every loss finite and the gradient not; the row began before the last line of
    the log."""
    seen: dict[int, list[int]] = {}

    def watched(dataset, key, original=PretrainDataset.__getitem__):
        seen.setdefault(key.step + 1, []).append(key.image)
        return original(dataset, key)

    def step_fn(optimizer, *args, original=engine.loop.optimizer_step, **kwargs):
        for parameter in optimizer.param_groups[0]["params"] if len(seen) > 3 else ():
            parameter.grad.fill_(float("inf"))
        return original(optimizer, *args, **kwargs)

    monkeypatch.setattr(PretrainDataset, "__getitem__", watched)
    monkeypatch.setattr(engine.loop, "optimizer_step", step_fn)
    with pytest.raises(InputError, match="^7 steps in a row") as error:
        main_pretrain.main(pretraining(data, tmp_path, "--log_interval", 5, "--max_bad_steps", 6))
    assert "'step': 4, 'lr': 0.00028125, 'loss': 1.1" in str(error.value)
    assert f"'images': {seen[4][:8]}" in str(error.value)
    entries = read_log(tmp_path / "bad_steps.jsonl")
    assert {entry["step"]: entry["images"] for entry in entries} == {
        step: seen[step] for step in range(4, 11)
    }
