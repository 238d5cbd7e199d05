"""Faults of saving and loading, on real files, with real ends of processes."""

import errno
import fcntl
import io
import itertools
import logging
import os
import resource
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare import assert_same, assert_same_checkpoint, assert_same_run, checkpoint
from runs import (
    command,
    environment,
    flip_bit,
    log_lines,
    make_pictures,
    pictures,
    pretraining,
    results_of,
    run,
    saved_step,
)

import engine.loop
import main_finetune
import main_knn
import main_pretrain
from engine.run import saving
from engine.run.checkpoint import Checkpoint, load_newest_checkpoint, outdated_steps, save_checkpoint
from engine.run.folder import locked, open_run, take_over_folder
from models.mae import MaskedAutoencoder
from util.errors import InputError
from util.settings.base import TrainRunConfig
from util.settings.pretrain import PretrainConfig

STEPS = 10  # of an epoch of `pretraining`


@pytest.fixture(scope="module")
def every_step(tmp_path_factory, data):
    """A run of 20 steps that keeps the checkpoint of each."""
    folder = tmp_path_factory.mktemp("every_step")
    main_pretrain.main(pretraining(data, folder, "--save_minutes", 1e-9, "--keep_last", 100))
    assert len(list(folder.glob("checkpoint-*.pth"))) == 2 * STEPS
    return folder


def content(step: int, size: int = 100) -> Checkpoint:
    return checkpoint(step, model={"w": torch.full((size,), float(step))})


def tidy(folder: Path, step: int) -> None:
    """What the next run does before it goes on."""
    take_over_folder(folder, PretrainConfig(output_dir=str(folder)), step, set())
    (folder / "config.yaml").unlink()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- system calls that end the process, or fail

CALLS = ((io, "open"), (os, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"))


def disturb(number: int, effect: Callable[[], object]) -> list[str]:
    """Lets system calls on files have `effect` in place of the call of this number, counted from 0;
    returns the list of calls so far."""
    calls: list[str] = []

    def disturbed(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            return effect() if len(calls) == number + 1 else original(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, disturbed(name, getattr(module, name)))
    return calls


def no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(action) -> int:
    """Exit status of `action` in a forked process: 0 if it returns, 3 if it raises."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001  (whatever it is must not reach the tests)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_disturbed(folder: Path, number: int, effect: Callable[[], object], keep_last: int) -> int:
    """Exit status of a process that saves step 5."""

    def save():
        disturb(number, effect)
        save_checkpoint(folder, content(5), keep_last)

    return in_child(save)


def assert_only(folder: Path, *steps: int) -> None:
    """The folder holds these checkpoints, which load, and nothing else."""
    names = {f"checkpoint-{step:08d}.pth{end}" for step in steps for end in ("", ".sha256")}
    assert set(files(folder)) == names
    assert saved_step(folder) == max(steps, default=0)


# --- R7: the process ends at any point of a save


@pytest.mark.fault("R7")
@pytest.mark.parametrize("complete", [(), (1,), (1, 2)])
def test_a_process_that_ends_at_any_call_of_a_save_loses_no_complete_checkpoint(tmp_path, complete):
    found = []
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        for step in complete:
            save_checkpoint(folder, content(step), keep_last=9)
        before = files(folder)
        status = save_disturbed(folder, number, lambda: os._exit(7), max(1, len(complete)))
        found.append(saved_step(folder))
        if found[-1]:
            assert_same_checkpoint(load_newest_checkpoint(folder), content(found[-1]))
        if found[-1] != 5:
            assert before.items() <= files(folder).items()
        tidy(folder, found[-1])
        assert not list(folder.glob("*.tmp"))
        save_checkpoint(folder, content(6), keep_last=1)  # clears what is left
        assert_only(folder, 6)
        if status == 0:
            break
        assert status == 7
    # before and after the moment from which the new one counts
    assert set(found) == {5, max(complete, default=0)} and len(found) > 9


@pytest.mark.fault("R7")
def test_a_process_that_ends_while_it_writes_leaves_nothing_that_counts(tmp_path, monkeypatch):
    def half(state, target):
        target.write_bytes(b"half of it")
        os._exit(7)

    save_checkpoint(tmp_path, content(1), keep_last=1)
    monkeypatch.setattr(torch, "save", half)
    assert in_child(lambda: save_checkpoint(tmp_path, content(5), keep_last=1)) == 7
    assert saved_step(tmp_path) == 1
    tidy(tmp_path, 1)
    assert_only(tmp_path, 1)


# --- R8: damaged checkpoints (each kind of damage: tests/test_engine.py)


@pytest.mark.fault("R8")
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_sets_that_aside(
    tmp_path, data, every_step, caplog
):
    arguments = pretraining(data, tmp_path, "--save_minutes", 1e-9, "--keep_last", 100)
    main_pretrain.main([*arguments, "--stop_epoch", "1"])
    for step in (9, 10):
        flip_bit(tmp_path / f"checkpoint-{step:08d}.pth")
    main_pretrain.main(arguments)
    assert_same_run(every_step, tmp_path)
    assert (
        f"passing over the damaged checkpoint {tmp_path / 'checkpoint-00000010.pth'}: its sha256"
        in caplog.text
    )
    assert f"resuming {tmp_path} at step 8" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("*.damaged")) == [
        "checkpoint-00000009.pth.damaged",
        "checkpoint-00000010.pth.damaged",
    ]


@pytest.mark.fault("R8")
@pytest.mark.long
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip_bit, "checkpoint-00000010.pth: its sha256"), (Path.unlink, "holds")],
)
def test_where_all_are_damaged_nothing_is_touched(tmp_path, data, damage, reason):
    arguments = pretraining(data, tmp_path)
    main_pretrain.main([*arguments, "--stop_epoch", "1"])
    for path in tmp_path.glob("checkpoint-*.pth"):
        damage(path)
    before = files(tmp_path)
    result = run(command(*arguments))
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert str(tmp_path) in error and reason in error
    after = files(tmp_path)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {"log.txt", ".lock"}


# --- R9, R19: a save that fails


@pytest.mark.fault("R9")
def test_a_save_that_finds_no_room_at_any_call_fails_and_changes_nothing(tmp_path):
    save_checkpoint(tmp_path, content(1), keep_last=1)
    before = files(tmp_path)
    for number in itertools.count():
        status = save_disturbed(tmp_path, number, no_room, keep_last=1)
        if saved_step(tmp_path) == 5:  # what comes after the last rename is no loss
            break
        assert status == 3 and saved_step(tmp_path) == 1
        assert before.items() <= files(tmp_path).items()
        tidy(tmp_path, 1)
        assert files(tmp_path) == before
    assert number > 5


@pytest.mark.fault("R9")
def test_a_save_past_a_limit_of_the_system_fails_and_changes_nothing(tmp_path):
    """A file may have 50,000 bytes and needs 400,000; torch writes it by calls of its own."""
    save_checkpoint(tmp_path, content(1), keep_last=1)
    before = files(tmp_path)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        save_checkpoint(tmp_path, content(2, 100_000), keep_last=1)

    assert in_child(limited) == 3
    assert files(tmp_path) == before and saved_step(tmp_path) == 1


@pytest.mark.fault("R9")
@pytest.mark.long
def test_a_run_that_finds_no_room_ends_with_one_line(tmp_path, data):
    arguments = pretraining(data, tmp_path)
    main_pretrain.main([*arguments, "--stop_epoch", "1"])
    before = files(tmp_path)

    def limit():  # logs fit, a checkpoint of 500,000 bytes does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = subprocess.run(
        command(*arguments),
        env=environment(),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"error: the checkpoint of step 20 cannot be saved in {tmp_path}: "
    )
    assert "Traceback" not in result.stderr
    after = files(tmp_path)
    checkpoints = {name: text for name, text in before.items() if name.startswith("checkpoint-")}
    assert {
        name: text for name, text in after.items() if name.startswith("checkpoint-")
    } == checkpoints
    assert len(checkpoints) == 2


@pytest.mark.fault("R19")
@pytest.mark.parametrize(("step", "save_minutes"), [(3, 1e-9), (10, 0), (20, 0)])
def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_save_or_step_or_at_its_end(
    tmp_path, data, monkeypatch, step, save_minutes
):
    original = saving.save_checkpoint

    def failing(output_dir, saved, *rest):
        return no_room() if saved.step == step else original(output_dir, saved, *rest)

    monkeypatch.setattr(saving, "save_checkpoint", failing)
    with pytest.raises(
        InputError, match=f"the checkpoint of step {step} cannot be saved in .*: .*No space left"
    ):
        main_pretrain.main(pretraining(data, tmp_path, "--save_minutes", save_minutes))
    assert saved_step(tmp_path) == {3: 2, 10: 0, 20: 10}[step]
    assert (
        step <= log_lines(tmp_path)[-1]["step"] <= (step + 1 if save_minutes else min(step + 5, 20))
    )
    assert not (tmp_path / "model.safetensors").exists()


# --- R18: a save in the background


@pytest.mark.fault("R18")
def test_a_file_holds_the_state_of_its_step_however_long_writing_takes(
    tmp_path, data, every_step, monkeypatch
):
    """Each save begins to write only when the next step has changed the parameters."""
    original = saving.save_checkpoint
    stepped = threading.Event()

    def late(output_dir, saved, *rest):
        if saved.step < 2 * STEPS:
            stepped.clear()
            assert stepped.wait(60)
        return original(output_dir, saved, *rest)

    def optimizer_step(*args, original=engine.loop.optimizer_step, **kwargs):
        found = original(*args, **kwargs)
        stepped.set()
        return found

    monkeypatch.setattr(saving, "save_checkpoint", late)
    monkeypatch.setattr(engine.loop, "optimizer_step", optimizer_step)
    # a save waits for the one before, so every other step has one under way while the optimiser
    # steps
    more = ["--save_minutes", 1e-9, "--log_interval", 2, "--keep_last", 100]
    main_pretrain.main(pretraining(data, tmp_path, *more))
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*.pth"))
    assert names == [f"checkpoint-{step:08d}.pth" for step in range(2, 2 * STEPS + 1, 2)]
    for name in names:
        ours, theirs = (
            torch.load(folder / name, weights_only=True) for folder in (tmp_path, every_step)
        )
        assert_same(ours["model"], theirs["model"], name)
        assert_same(ours["optimizer"], theirs["optimizer"], name)


# --- R17: the scaler of fp16


@pytest.mark.fault("R17")
def test_the_fp16_scaler_goes_on_after_a_resume_and_an_overflow(tmp_path, data, monkeypatch):
    """The loss overflows in two steps, one before the stop and one after; growth is counted in
    between."""
    forward, steps = MaskedAutoencoder.forward, []

    def overflowing(self, *args):
        steps.append(None)
        return forward(self, *args) * (float("inf") if len(steps) in (4, 15) else 1.0)

    monkeypatch.setattr(MaskedAutoencoder, "forward", overflowing)
    more = ["--precision", "fp16", "--log_interval", 5]  # each line's mean has finite losses
    main_pretrain.main(pretraining(data, tmp_path / "whole", *more))
    steps.clear()
    main_pretrain.main(pretraining(data, tmp_path / "stopped", *more, "--stop_epoch", 1))
    middle = load_newest_checkpoint(tmp_path / "stopped").scaler
    main_pretrain.main(pretraining(data, tmp_path / "stopped", *more))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    end = load_newest_checkpoint(tmp_path / "whole").scaler
    assert (middle["scale"], middle["_growth_tracker"]) == (
        2.0**15,
        6,
    )  # from 2^16, halved once, 6 good steps since
    assert (end["scale"], end["_growth_tracker"]) == (2.0**14, 5)


# --- R20: retention


@pytest.mark.fault("R20")
@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, 0, {60}),
        (2, 0, {50, 60}),
        (1, 20, {20, 40, 60}),
        (2, 30, {30, 50, 60}),
        (9, 7, {10, 20, 30, 40, 50, 60}),
    ],
)
def test_which_checkpoints_stay(tmp_path, keep_last, keep_every, expected):
    steps = [10, 20, 30, 40, 50, 60]
    assert outdated_steps(steps, keep_last, keep_every) == {*steps} - expected
    for step in steps:
        save_checkpoint(tmp_path, content(step), keep_last, keep_every)
    assert {int(name[11:19]) for name in files(tmp_path)} == expected
    assert len(files(tmp_path)) == 2 * len(expected)


@pytest.mark.fault("R20")
def test_every_second_epoch_stays_beside_the_newest(tmp_path, data):
    more = [
        "--epochs",
        5,
        "--save_epochs",
        0,
        "--save_minutes",
        0,
        "--keep_every",
        2,
        "--keep_last",
        1,
    ]
    main_pretrain.main(pretraining(data, tmp_path, *more))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*.pth")) == [
        f"checkpoint-{STEPS * epoch:08d}.pth" for epoch in (2, 4, 5)
    ]


@pytest.mark.fault("R20")
def test_an_old_checkpoint_that_cannot_be_removed_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "checkpoint-00000001.pth").mkdir()  # a folder cannot be unlinked, not even by root
    save_checkpoint(tmp_path, content(2), keep_last=1)
    assert (
        f"cannot remove the old checkpoint {tmp_path / 'checkpoint-00000001.pth'}: " in caplog.text
    )
    assert saved_step(tmp_path) == 2


# --- R32, R33: file systems that cannot do all, and folders that cannot be used


@pytest.mark.fault("R32")
def test_a_file_system_without_locks_or_flushed_folders_works_with_one_warning(
    tmp_path, data, monkeypatch, caplog
):
    def refused(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def fsync(descriptor, original=os.fsync):
        return refused() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else original(descriptor)

    monkeypatch.setattr(fcntl, "lockf", refused)
    monkeypatch.setattr(os, "fsync", fsync)
    assert main_pretrain.main(pretraining(data, tmp_path))["step"] == 2 * STEPS
    warnings = [record.name for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted({*warnings} - {"engine.loop"}) == ["engine.run.folder", "util.files"]
    assert warnings.count("util.files") == 1
    assert saved_step(tmp_path) == 2 * STEPS


UNUSABLE = {
    "long": "n" * 300,
    "below a file": "file/below",
    "lock of another user": "locked",
    "log of another user": "logged",
}


@pytest.mark.fault("R33")
@pytest.mark.parametrize("name", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_output_folder_that_cannot_be_used_is_one_error_before_any_compute(tmp_path, data, name):
    (tmp_path / "file").touch()
    for path in ("locked/.lock", "logged/log.txt"):
        (tmp_path / path).mkdir(parents=True)  # not even root can write that
    folder = tmp_path / name
    arguments = ["--output_dir", str(folder), "--data_path", str(data), "--device", "cpu"]
    commands = [(main_pretrain, []), (main_finetune, []), (main_knn, ["--finetune", "random"])]
    for script, more in commands[: 2 if name == "locked" else 3]:  # k-NN needs no lock
        with pytest.raises(InputError) as error:
            script.main([*arguments, *more])
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


# --- R29: names that are no UTF-8


@pytest.mark.fault("R29")
def test_names_that_are_no_utf_8_are_written_everywhere(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    names = ("nought" + odd, "one", "seven")
    data = make_pictures(tmp_path / odd, train=6, val=4, names=names)
    more = ["--batch_size", 6, "--epochs", 1, "--warmup_epochs", 0, "--tensorboard", "true"]
    folder = tmp_path / ("run" + odd)
    looks = ["--monitor_epochs", 1, "--monitor_knn", 18]
    for script, arguments in (
        ("main_pretrain.py", pretraining(data, folder, *more, *looks)),
        ("main_finetune.py", pictures(data, tmp_path / odd / "f", *more, "--per_class")),
    ):
        result = run(command(*arguments, script=script))
        assert result.returncode == 0 and result.stderr == ""
    assert set(results_of(tmp_path / odd / "f")["per_class"]) == set(names)
    assert log_lines(folder)[-1]["step"] == 3 and list((folder / "tb").iterdir())


# --- R21: two jobs on one output folder


def hold(folder: Path) -> tuple[int, int]:
    """Locks the folder in a forked process, whose own child outlives it; returns its id and a pipe
    that ends it."""
    ready, tell = os.pipe()
    stop, end = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder):
            if os.fork() == 0:  # as a loader process, which notices late that its parent is gone
                os.close(tell)
                os.close(end)
                os.read(stop, 1)
                os._exit(0)
            os.write(tell, b"x")
            os.close(end)
            os.read(stop, 1)
            os._exit(1)  # as a kill would
    os.read(ready, 1)
    return child, end


@pytest.mark.fault("R21")
def test_a_second_job_is_refused_until_the_first_has_ended_however_that_ended(tmp_path, data):
    arguments = pretraining(data, tmp_path)
    child, end = hold(tmp_path)
    before = files(tmp_path)
    with pytest.raises(
        InputError, match=rf"{tmp_path} is in use by another job \(process {child} on .*\): wait"
    ):
        main_pretrain.main(arguments)
    assert files(tmp_path) == before
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert (
        main_pretrain.main(arguments)["step"] == 2 * STEPS
    )  # the lock's file is still there, and locks nothing
    os.close(end)


@pytest.mark.fault("R21")
def test_who_only_looks_needs_no_lock(tmp_path, data, every_step):
    child, end = hold(tmp_path)
    weights = str(every_step / "model.safetensors")
    with open_run(
        main_finetune.FinetuneConfig(
            output_dir=str(tmp_path), device="cpu", finetune=weights, eval=True
        )
    ):
        pass
    for cfg in (
        main_finetune.FinetuneConfig(output_dir=str(tmp_path), device="cpu"),
        TrainRunConfig(output_dir=str(tmp_path), device="cpu"),
    ):
        with pytest.raises(InputError, match="is in use"), open_run(cfg):
            pass
    os.close(end)
    os.waitpid(child, 0)


@pytest.mark.fault("R21")
@pytest.mark.long
def test_a_second_command_ends_with_one_line(tmp_path, data):
    arguments = pretraining(data, tmp_path)
    child, end = hold(tmp_path)
    for result in (
        run(command(*arguments)),
        run(["sh", "run_pretrain.sh", *arguments, "-b", "6"], NGPU="2"),
    ):
        assert result.returncode != 0
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "is in use by another job" in errors[0]
        assert (
            "open_run" not in result.stderr
        )  # no traceback of ours; the launcher has one of its own
    os.close(end)
    os.waitpid(child, 0)
