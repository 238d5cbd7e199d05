"""Faults of saving and loading: rows R7 to R9 and R17 to R22, on real files, with real ends of
processes."""

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from runs import (
    assert_same,
    command,
    environment,
    log_lines,
    make_pictures,
    pretraining,
    run,
    step_losses,
)

import engine.loop
import main_finetune
import main_pretrain
from engine.run import saving
from engine.run.checkpoint import kept_steps, load_newest_checkpoint, save_checkpoint, tidy
from engine.run.folder import open_run
from engine.run.lock import locked
from models.mae import MaskedAutoencoder
from util.errors import InputError
from util.settings.base import TrainRunConfig

STEPS = 10  # of an epoch of `pretraining`


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def every_step(tmp_path_factory, data):
    """A run of 20 steps that keeps the checkpoint of each."""
    folder = tmp_path_factory.mktemp("every_step")
    main_pretrain.main(pretraining(data, folder, "--save_minutes", 1e-9, "--keep_last", 100))
    assert len(list(folder.glob("checkpoint-*.pth"))) == 2 * STEPS
    return folder


def content(step: int, size: int = 100) -> dict:
    return {"model": {"w": torch.full((size,), float(step))}, "note": [step, "x", None]}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_equal_runs(one: Path, other: Path) -> None:
    assert step_losses(one) == step_losses(other)
    ours, theirs = load_newest_checkpoint(one), load_newest_checkpoint(other)
    for name in ("step", "model", "optimizer", "scaler", "epoch_losses", "samples_seen"):
        assert_same(getattr(ours, name), getattr(theirs, name), name)


# --- R7: the process ends at any point of a save
# ----------------------------------------------------------------------

WATCHED = ("engine/run/checkpoint.py", "util/files.py", "torch/serialization.py")


def in_child(action) -> int:
    """Exit status of `action` in a forked process: 0 where it returns."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001  (whatever it is must not reach the tests)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(line: int, action) -> int:
    """Exit status of `action` in a process that ends before it executes so many lines of the save
    protocol: 7."""

    def end_at_line():
        left = line

        def trace(frame, event, _):
            nonlocal left
            if not frame.f_code.co_filename.endswith(WATCHED):
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os._exit(7)
            return trace

        sys.settrace(trace)
        action()

    return in_child(end_at_line)


@pytest.mark.fault("R7")
@pytest.mark.long
@pytest.mark.parametrize(("complete", "keep_last"), [((), 1), ((1,), 1), ((1, 2), 2)])
def test_a_process_that_ends_at_any_line_of_a_save_loses_no_complete_checkpoint(
    tmp_path, record_property, complete, keep_last
):
    lines, found = 0, []
    while True:
        folder = tmp_path / str(lines)
        folder.mkdir()
        for step in complete:
            save_checkpoint(folder, step, content(step), keep_last=9)
        before = set(files(folder))
        status = dying_at(
            lines, lambda folder=folder: save_checkpoint(folder, 5, content(5), keep_last)
        )
        after = set(files(folder))
        loaded = load_newest_checkpoint(folder)
        found.append(0 if loaded is None else loaded["step"])
        if loaded is not None:
            assert_same({name: loaded[name] for name in ("model", "note")}, content(loaded["step"]))
        if found[-1] != 5:
            assert (
                found[-1] == max(complete, default=0) and before <= after
            )  # none that was complete is gone
        tidy(folder, found[-1])
        left = set(files(folder))
        assert all(
            name.startswith("checkpoint-") and name.endswith((".pth", ".pth.sha256"))
            for name in left
        )
        save_checkpoint(
            folder, 6, content(6), keep_last=1
        )  # the next run's save clears what is left
        assert load_newest_checkpoint(folder).step == 6
        assert set(files(folder)) == {"checkpoint-00000006.pth", "checkpoint-00000006.pth.sha256"}
        if status == 0:
            break
        assert status == 7
        lines += (
            1 if lines < 20 or found[-1] == 5 or len(after - before) > 1 else 7
        )  # writing takes hundreds of lines
    assert found[-1] == 5 and lines > 100
    assert set(found) == {
        5,
        max(complete, default=0),
    }  # before and after the moment from which it counts
    record_property("tries", len(found))


# --- R8: damaged checkpoints (each kind of damage: tests/test_engine.py)
# ----------------------------------------------


def flip_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))


@pytest.mark.fault("R8")
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_sets_that_aside(
    tmp_path, data, every_step, caplog
):
    arguments = pretraining(data, tmp_path, "--save_minutes", 1e-9, "--keep_last", 100)
    main_pretrain.main([*arguments, "--stop_epoch", "1"])
    for step in (9, 10):
        flip_bit(tmp_path / f"checkpoint-{step:08d}.pth")
    main_pretrain.main(arguments)
    assert_equal_runs(every_step, tmp_path)
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
    ("damage", "reason"), [(flip_bit, "its sha256"), (Path.unlink, "checkpoint-00000010.pth is")]
)
def test_where_all_are_damaged_nothing_is_touched(tmp_path, data, damage, reason):
    arguments = pretraining(data, tmp_path)
    main_pretrain.main([*arguments, "--stop_epoch", "1"])
    for path in tmp_path.glob("checkpoint-*.pth"):
        damage(path)
    before = files(tmp_path)
    result = run(command(*arguments))
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"error: every checkpoint in {tmp_path} is damaged (checkpoint-00000010.pth: {reason}"
    )
    after = files(tmp_path)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {
        "log.txt",
        ".lock",
    }


# --- R9, R19: a save that fails
# ---------------------------------------------------------------------------------------


def save_on_a_full_disk(folder: Path) -> None:
    """/dev/full answers as a full disk does."""
    (folder / "checkpoint-00000002.pth.tmp").symlink_to("/dev/full")
    with pytest.raises((OSError, RuntimeError)):
        save_checkpoint(folder, 2, content(2, 100_000), keep_last=1)


def save_past_a_limit(folder: Path) -> None:
    """A file may have 50,000 bytes and needs 400,000."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        save_checkpoint(folder, 2, content(2, 100_000), keep_last=1)

    assert in_child(limited) == 3


@pytest.mark.fault("R9")
@pytest.mark.parametrize("save", [save_on_a_full_disk, save_past_a_limit])
def test_a_save_that_finds_no_room_fails_and_changes_nothing(tmp_path, save):
    save_checkpoint(tmp_path, 1, content(1), keep_last=1)
    before = files(tmp_path)
    save(tmp_path)
    assert files(tmp_path) == before
    assert load_newest_checkpoint(tmp_path).step == 1


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

    def failing(output_dir, of_step, *rest):
        if of_step == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(output_dir, of_step, *rest)

    monkeypatch.setattr(saving, "save_checkpoint", failing)
    with pytest.raises(
        InputError, match=f"the checkpoint of step {step} cannot be saved in .*: .*No space left"
    ):
        main_pretrain.main(pretraining(data, tmp_path, "--save_minutes", save_minutes))
    saved = load_newest_checkpoint(tmp_path)
    assert (0 if saved is None else saved.step) == {3: 2, 10: 0, 20: 10}[step]
    assert (
        step <= log_lines(tmp_path)[-1]["step"] <= (step + 1 if save_minutes else min(step + 5, 20))
    )
    assert not (tmp_path / "model.safetensors").exists()


# --- R18: a save in the background
# ------------------------------------------------------------------------------------


@pytest.mark.fault("R18")
def test_a_file_holds_the_state_of_its_step_however_long_writing_takes(
    tmp_path, data, every_step, monkeypatch
):
    """Each save begins to write only when the next step has changed the parameters."""
    original = saving.save_checkpoint
    stepped = threading.Event()

    def late(output_dir, step, *rest):
        if step < 2 * STEPS:
            stepped.clear()
            assert stepped.wait(60)
        return original(output_dir, step, *rest)

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
        assert_same(ours.model, theirs.model, name)
        assert_same(ours.optimizer, theirs.optimizer, name)


# --- R17: the scaler of fp16
# ------------------------------------------------------------------------------------------


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
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")
    end = load_newest_checkpoint(tmp_path / "whole").scaler
    assert (middle["scale"], middle["_growth_tracker"]) == (
        2.0**15,
        6,
    )  # from 2^16, halved once, 6 good steps since
    assert (end["scale"], end["_growth_tracker"]) == (2.0**14, 5)


# --- R20: retention
# ---------------------------------------------------------------------------------------------------


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
    assert kept_steps(steps, keep_last, keep_every) == expected
    for step in steps:
        save_checkpoint(tmp_path, step, {"model": {}}, keep_last, keep_every)
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
    save_checkpoint(tmp_path, 2, {"model": {}}, keep_last=1)
    assert (
        f"cannot remove the old checkpoint {tmp_path / 'checkpoint-00000001.pth'}: " in caplog.text
    )
    assert load_newest_checkpoint(tmp_path).step == 2


# --- R21: two jobs on one output folder
# -------------------------------------------------------------------------------


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
