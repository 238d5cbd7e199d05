"""Faults of running jobs, on real processes under the launcher.

Each run is compared with the same run without a fault, bit for bit: losses, state and weights.
`tests/fault_driver.py` does the harm at an exact step; signals come from the operating system.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from compare import assert_same, assert_same_run
from runs import (
    STEPS_PER_EPOCH,
    command,
    digits,
    driven,
    environment,
    flip_bit,
    log_lines,
    pictures,
    pretraining,
    results_of,
    run,
    saved_step,
    step_losses,
)

import engine.loop
import main_finetune
import main_knn
import main_pretrain
from data.loader import EvalDataset, PretrainDataset
from engine.evaluation import features
from engine.run import interrupts as signals
from engine.run.batches import Batches
from engine.run.checkpoint import load_newest_checkpoint
from engine.schedule import Plan
from util.errors import InputError, LocalInputError
from util.watchdog import alive, watched

SEEDS = int(os.environ.get("MAE_KILL_SEEDS", "5"))


def faults(*entries: dict) -> str:
    return json.dumps(entries)


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[11:19]) for path in folder.glob("checkpoint-*.pth"))


def digests(folder: Path, rank: int) -> dict[int, dict[str, str]]:
    """What the driver wrote by step; a step that was computed again must have given the same."""
    found: dict[int, dict[str, str]] = {}
    for line in (folder / f"{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
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
    return digits(
        folder, "--log_interval", 1, "--batch_size", 32, "--timeout", 2, *more
    )  # ends also where a row fails


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
        lines = log.read_text().splitlines()
        done = max(json.loads(line)["step"] for line in lines if line.endswith("}"))
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
    stops = {
        1: (signal.SIGTERM, 1),
        30: (signal.SIGUSR1, 0),
        62: (signal.SIGUSR1, 1),
        63: (signal.SIGINT, 0),
    }
    for step, (signum, rank) in stops.items():
        fault = {"do": signum, "to": "self", "at": "step", "step": step - 1, "rank": rank}
        result = run(
            driven("main_pretrain.py", *two(tmp_path), processes=2),
            FAULTS=faults(fault),
            DIGESTS=str(tmp_path),
        )
        assert result.returncode != 0
        assert (
            f"stopped by {signum.name}; the same command goes on after step {step}" in result.stdout
        )
        assert re.search(rf"exitcode\s+: {128 + signum} ", result.stderr)
        assert [max(digests(tmp_path, rank)) for rank in (0, 1)] == [step, step]
        assert checkpoint_steps(tmp_path)[-1] == step
        assert "Traceback" not in result.stdout and "Saver" not in result.stderr
    result = run(driven("main_pretrain.py", *two(tmp_path), processes=2), DIGESTS=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout
    assert_same_run(oracle_of_two, tmp_path)
    losses = step_losses(tmp_path)
    assert all(losses[step] != losses[step + 1] for step in stops)  # not vacuous
    mine, others = digests(tmp_path, 0), digests(tmp_path, 1)
    assert mine == others and set(mine) == set(range(2 * STEPS_PER_EPOCH))
    assert mine[30]["model"] != mine[31]["model"]


# --- R10: SIGTERM to the launcher


@pytest.mark.long
@pytest.mark.fault("R10")
def test_a_launcher_that_is_terminated_stops_its_processes_which_save(tmp_path, data):
    """Fine-tuning of two processes: within a step, a save and a validation, and twice within a
    second."""

    def arguments(folder):
        more = ["--batch_size", 6, "--total_batch_size", 12, "--ema_decay", 0.5, "--size", "debug"]
        return ["main_finetune.py", *pictures(data, tmp_path / folder, *more)]

    result = run(driven(*arguments("whole"), processes=2))
    assert result.returncode == 0, result.stderr
    # a save and a validation come after the step that begins there
    strikes = [("step", 4, 1), ("save", 9, 1), ("validation", 19, 1), ("step", 24, 2)]
    stopped = tmp_path / "stopped"
    for at, step, times in strikes:
        fault = {"do": signal.SIGTERM, "to": "launcher", "at": at, "step": step, "times": times}
        began = time.monotonic()
        result = run(driven(*arguments("stopped"), processes=2), FAULTS=faults(fault), PAUSE="0.1")
        assert time.monotonic() - began < 60 and result.returncode != 0
        saved = load_newest_checkpoint(stopped)
        if times == 1:
            assert "stopped by SIGTERM; the same command goes on after step" in result.stdout, (
                result.stderr
            )
            assert step <= saved.step < step + 10 and not list(stopped.glob("*.tmp"))
            assert saved.epoch_end_pending == (at == "validation")
        else:
            assert saved.step >= 20
    result = run(driven(*arguments("stopped"), processes=2))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "whole", stopped)
    ours, theirs = (
        [
            {n: line[n] for n in ("step", "acc1", "ema_acc1", "val_loss")}
            for line in log_lines(folder)
            if "acc1" in line
        ]
        for folder in (tmp_path / "whole", stopped)
    )
    assert ours == theirs and len(ours) == 3
    assert results_of(tmp_path / "whole") == results_of(stopped)


def test_a_look_that_a_signal_cuts_short_is_made_again(tmp_path, data, monkeypatch):
    """In pretraining, after the first epoch and after the last: no look is lost and none is there
    twice."""
    more = ["--monitor_epochs", 1, "--monitor_knn", 120, "--monitor_images", 0]
    more += ["--monitor_probe", "false"]
    main_pretrain.main(pretraining(data, tmp_path / "whole", *more))
    arguments = pretraining(data, tmp_path / "cut", *more)
    eval_batches = features.eval_batches
    for stop in (10, 20):
        late = []

        def terminated(*arguments, stop=stop, late=late):
            log = tmp_path / "cut" / "log.jsonl"  # not there yet at the look before the first step
            due = log.exists() and log.read_text().count("epoch_loss") == stop // 10
            for batch in eval_batches(*arguments):
                if due:
                    os.kill(os.getpid(), signal.SIGTERM)
                    late.append(batch)
                yield batch

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(features, "eval_batches", terminated)
            main_pretrain.main(arguments)
        assert end.value.code == 128 + signal.SIGTERM and len(late) == 1  # of ten batches
        saved = load_newest_checkpoint(tmp_path / "cut")
        assert (saved.step, saved.epoch_end_pending) == (stop, True)
        assert not (tmp_path / "cut" / "model.safetensors").exists()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signals.received() == 0
        if (
            stop == 10
        ):  # looks again, and is cut off before its next checkpoint: it has to look once more

            def cut_off(_, step):
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Plan, "lr", cut_off)
                main_pretrain.main(arguments)
            assert [
                line["step"] for line in log_lines(tmp_path / "cut") if "monitor_s" in line
            ] == [0, 10]
    main_pretrain.main(arguments)
    facts = [
        [
            (line["step"], line["knn_acc1"])
            for line in log_lines(tmp_path / name)
            if "monitor_s" in line
        ]
        for name in ("whole", "cut")
    ]
    assert facts[0] == facts[1] and [step for step, _ in facts[0]] == [0, 10, 20]
    assert_same(*(load_newest_checkpoint(tmp_path / name).model for name in ("whole", "cut")))
    before = (tmp_path / "cut" / "log.jsonl").read_bytes()
    main_pretrain.main(arguments)  # is finished, though its last checkpoint owes a look
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("signum", signals.SIGNALS)
def test_one_process_stops_at_the_next_step(tmp_path, data, monkeypatch, signum):
    original = Plan.lr

    def lr(plan, step):
        if step == 4:
            os.kill(os.getpid(), signum)
        return original(plan, step)

    arguments = pretraining(data, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Plan, "lr", lr)
        main_pretrain.main(arguments)
    assert end.value.code == 128 + signum
    assert saved_step(tmp_path) == 5
    assert (
        f"stopped by {signum.name}; the same command goes on after step 5"
        in (tmp_path / "log.txt").read_text()
    )
    assert main_pretrain.main(arguments)["step"] == 20


def test_a_signal_before_the_first_step_saves_nothing(tmp_path, data, monkeypatch):
    arguments = pretraining(data, tmp_path)
    check = main_pretrain.Saver.between_steps

    def signalled(saver):
        os.kill(os.getpid(), signal.SIGTERM)
        check(saver)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(main_pretrain.Saver, "between_steps", signalled)
        main_pretrain.main(arguments)
    assert checkpoint_steps(tmp_path) == []
    assert "the same command begins anew" in (tmp_path / "log.txt").read_text()
    assert main_pretrain.main(arguments)["step"] == 20


def test_repeats_within_two_seconds_are_ignored_and_a_later_signal_ends_at_once():
    child = os.fork()
    if child == 0:
        with signals.noted():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
            if signals.received() == signal.SIGTERM:
                time.sleep(signals.REPEAT_S + 0.1)
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


# --- R12, R13: a process dies or hangs


@pytest.mark.long
@pytest.mark.fault("R12")
def test_a_job_one_of_whose_processes_dies_goes_on_after_the_launchers_restart(
    oracle_of_two, tmp_path
):
    fault = {"do": "exit", "at": "step", "step": 70, "rank": 1}
    arguments = two(tmp_path, "--save_epochs", 1)
    result = run(
        driven("main_pretrain.py", *arguments, processes=2, restarts=1), FAULTS=faults(fault)
    )
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
    fault = {"do": what, "to": "self", "at": "step", "step": 20, "rank": 1}
    began = time.monotonic()
    result = run(
        driven("main_pretrain.py", *two(tmp_path, "--timeout", 0.25), processes=2),
        FAULTS=faults(fault),
    )
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

    for action, status in ((at_work, 0), (silent, 1)):
        child = os.fork()
        if child == 0:
            action()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert "in silent" in capfd.readouterr().err


def test_an_evaluation_whose_loader_hangs_ends_and_says_where(capfd):
    """As on a file system that does not answer; outside training, where nobody else watches."""

    class Stuck(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            time.sleep(5 if index == 2 else 0.1)
            return index

    child = os.fork()
    if child == 0:
        list(Batches(torch.utils.data.DataLoader(Stuck()), timeout=1 / 60))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "in __getitem__" in capfd.readouterr().err


@pytest.mark.long
def test_a_run_may_take_longer_than_one_of_its_steps_may(tmp_path, data):
    """20 steps of 0.3 s, and none may take 3 s."""
    result = run(
        driven("main_pretrain.py", *pretraining(data, tmp_path, "--timeout", 0.05)), PAUSE="0.3"
    )
    assert result.returncode == 0, result.stderr
    assert log_lines(tmp_path)[-1]["step"] == 20


# --- R30: a job is suspended


@pytest.mark.long
@pytest.mark.fault("R30")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_was_suspended_for_longer_than_its_timeout_goes_on(tmp_path, processes):
    more = ["--log_interval", 1, "--batch_size", 64 // processes, "--timeout", 0.1]
    arguments = driven("main_pretrain.py", *digits(tmp_path, *more), processes=processes)
    job = subprocess.Popen(arguments, env=environment(PAUSE="0.03"), stdout=subprocess.DEVNULL)
    while job.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.01)
    stopped = tree(job.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    step = log_lines(tmp_path)[-1]["step"]
    time.sleep(7)
    assert log_lines(tmp_path)[-1]["step"] == step < 124
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert job.wait(timeout=60) == 0
    assert log_lines(tmp_path)[-1]["step"] == 124


# --- R14, R28: a loader process is killed, or cannot hand a batch over


class Killed(PretrainDataset):
    """A loader process that reads the samples of the 16th step is killed, once."""

    flag: Path

    def __getitems__(self, keys):
        if keys[0].step == 15 and multiprocessing.parent_process() and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(keys)


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

    monkeypatch.setattr(main_pretrain.PretrainDataset, "__getitems__", broken)
    with pytest.raises(ConnectionResetError, match=r"^of the data's own making$"):
        main_pretrain.main(pretraining(data, tmp_path, "--num_workers", 1))


@pytest.mark.fault("R14")
def test_a_killed_loader_process_ends_an_evaluation_with_one_line(tmp_path, data, monkeypatch):
    original = EvalDataset.__getitem__

    def killed(dataset, index):
        if index == 40 and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(dataset, index)

    monkeypatch.setattr(EvalDataset, "__getitem__", killed)
    knn = ["--finetune", "random", "--class_token", "true", "--batch_size", 7, "--num_workers", 2]
    with pytest.raises(LocalInputError, match="lower num_workers"):
        main_knn.main(pictures(data, tmp_path / "knn", *knn, training=False))
    # within training: the evaluation that was cut short comes after the resume
    arguments = pictures(data, tmp_path / "run", "--num_workers", 1)
    with pytest.raises(LocalInputError, match="lower num_workers"):
        main_finetune.main(arguments)
    saved = load_newest_checkpoint(tmp_path / "run")
    assert (saved.step, saved.epoch_end_pending) == (10, True)
    monkeypatch.setattr(EvalDataset, "__getitem__", original)
    main_finetune.main(arguments)
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
@pytest.mark.parametrize("failing", [0, 2])
def test_loader_processes_that_find_no_shared_memory_end_the_run_at_once(
    tmp_path, data, monkeypatch, failing
):
    """From the first tensor that a process shares on, or from a later one on."""
    shared: list[None] = []

    def share(storage, original=torch.UntypedStorage._share_fd_cpu_):
        shared.append(None)
        if multiprocessing.parent_process() and len(shared) > failing:
            raise RuntimeError("unable to allocate shared memory: No space left on device (28)")
        return original(storage)

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", share)
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
    arguments = [
        "main_finetune.py",
        *pictures(data, folder, "--batch_size", 6, "--total_batch_size", 12),
    ]
    bad = (
        {"do": "nan_loss", "at": "step", "rank": 1, "step": 5, "count": 2},
        {"do": "inf_gradient", "at": "step", "rank": 0, "step": 12},
        {"do": "nan_loss", "at": "step", "rank": 1, "step": 22, "count": 99},
    )
    more = [
        "--ema_decay",
        "0.5",
        "--max_bad_steps",
        "3",
        "--save_minutes",
        "1e-9",
        "--keep_last",
        "99",
    ]
    result = run(driven(*arguments, *more, processes=2), FAULTS=faults(*bad), DIGESTS=str(tmp_path))
    assert result.returncode != 0
    mine, others = digests(tmp_path, 0), digests(tmp_path, 1)
    assert mine == others and set(mine) == set(range(25))
    untouched = [
        step
        for step in range(1, 24)
        if all(mine[step][n] == mine[step + 1][n] for n in ("model", "ema"))
    ]
    assert untouched == [5, 6, 12, 22, 23]
    saved = {
        step: torch.load(folder / f"checkpoint-{step:08d}.pth", weights_only=True)
        for step in (5, 7, 24)
    }
    assert_same(
        saved[5]["optimizer"]["state"], saved[7]["optimizer"]["state"]
    )  # moments and the count of steps
    counts = {
        step: {entry["step"].item() for entry in of["optimizer"]["state"].values()}
        for step, of in saved.items()
    }
    assert counts == {5: {5.0}, 7: {5.0}, 24: {19.0}}  # 24 steps, 5 of them skipped
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    keys = json.loads((folder / "bad_steps.jsonl").read_text().splitlines()[1])
    assert (keys["step"], keys["process"], keys["loss"], len(keys["images"])) == (23, 1, None, 6)
    images = " ".join(map(str, keys["images"]))
    assert re.search(
        r"^error: 3 steps in a row .* step 23 and lr [\d.e-]+, with .* process 1 and "
        rf"images {images} .* {folder}/bad_steps.jsonl",
        error,
    )
    assert checkpoint_steps(folder)[-1] == 24  # step 25 is where it ended


def test_the_images_of_the_error_are_those_of_the_step(tmp_path, data, monkeypatch):
    """In one process, every loss finite and the gradient not; the row began before the last line of
    the log."""
    seen: dict[int, list[int]] = {}
    original = main_pretrain.PretrainDataset.__getitems__

    def watched(dataset, keys):
        seen.setdefault(keys[0].step + 1, []).extend(key.image for key in keys)
        return original(dataset, keys)

    def step_fn(*args, original=engine.loop.optimizer_step, **kwargs):
        for group in args[0].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and len(seen) > 3:
                    parameter.grad.fill_(float("inf"))
        return original(*args, **kwargs)

    monkeypatch.setattr(main_pretrain.PretrainDataset, "__getitems__", watched)
    monkeypatch.setattr(engine.loop, "optimizer_step", step_fn)
    with pytest.raises(InputError) as error:
        main_pretrain.main(pretraining(data, tmp_path, "--log_interval", 5, "--max_bad_steps", 6))
    shown = " ".join(map(str, seen[4][:8]))
    assert str(error.value).startswith("7 steps in a row")
    assert f"step 4 and lr 0.000281, with finite losses and images {shown} ..." in str(error.value)
    entries = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [4, 5, 6, 7, 8, 9, 10]
    assert all(entry["images"] == seen[entry["step"]] for entry in entries)
