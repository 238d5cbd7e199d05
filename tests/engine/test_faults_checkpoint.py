"""Faults of saving and loading, on real files, with real ends of processes and full disks."""

import errno
import fcntl
import hashlib
import io
import itertools
import logging
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same, assert_same_checkpoint, assert_same_run, checkpoint, identity
from runs import (
    changed_files,
    command,
    files_of,
    flip_bit,
    in_child,
    log_lines,
    make_pictures,
    pictures,
    pretraining,
    results_of,
    run,
    saved_step,
)
from torch import nn

import main_finetune
import main_knn
import main_pretrain
from data.loader import BadSample
from engine.evaluation.best import read_best
from engine.run import saving
from engine.run.checkpoint import (
    Checkpoint,
    best_path,
    load_newest_checkpoint,
    save_checkpoint,
    save_weights,
    weights_path,
)
from engine.run.faults import BadSamples, BadSteps
from engine.run.folder import locked, open_run, take_over_folder
from engine.run.records import write_results
from models.mae import MaskedAutoencoder
from models.weights.own import read_header
from tools import pack_dataset
from util.errors import InputError, LocalInputError
from util.files import flush_folder, write_output
from util.settings.base import TrainRunConfig
from util.settings.pretrain import PretrainConfig

STEPS = 10  # of an epoch of `pretraining`
FULL = "cannot be written: No space left on device"


@pytest.fixture(scope="module")
def every_step(tmp_path_factory, data):
    """A run of 20 steps that keeps the checkpoint of each."""
    folder = tmp_path_factory.mktemp("every_step")
    main_pretrain.main(pretraining(data, folder, "--save_minutes", 1e-9, "--keep_last", 100))
    assert len(list(folder.glob("checkpoint-*.pth"))) == 2 * STEPS
    return folder


@pytest.fixture
def finished(tmp_path, pretrained):
    """The folder of a finished pretraining run."""
    return shutil.copytree(pretrained, tmp_path / "finished")


def content(step: int) -> Checkpoint:
    return checkpoint(step, model={"w": torch.full((100,), float(step))})


def tidy(folder: Path, step: int) -> None:
    """What the next run does before it goes on."""
    take_over_folder(folder, PretrainConfig(output_dir=str(folder)), step, set())
    (folder / "config.yaml").unlink()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- system calls that end the process, or fail

CALLS = ((io, "open"), (os, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"))


def no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_disturbed(folder: Path, number: int, effect: Callable[[], object], keep_last: int) -> int:
    """Exit status of a process that saves step 5, in which a system call on files has `effect`: the
    one of this number, counted from 0."""
    calls = itertools.count()

    def disturbed(original):
        def call(*args, **kwargs):
            return effect() if next(calls) == number else original(*args, **kwargs)

        return call

    def save():
        for module, name in CALLS:
            setattr(module, name, disturbed(getattr(module, name)))
        save_checkpoint(folder, content(5), keep_last)

    return in_child(save)


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
        assert set(files(folder)) == {f"checkpoint-00000006.pth{end}" for end in ("", ".sha256")}
        if status == 0:
            break
        assert status == 7
    # before and after the moment from which the new one counts
    assert set(found) == {5, max(complete, default=0)} and len(found) > 9


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
    assert f"checkpoint {tmp_path / 'checkpoint-00000010.pth'}: its sha256" in caplog.text
    assert f"resuming {tmp_path} at step 8" in caplog.text
    names = {path.name for path in tmp_path.glob("*.damaged")}
    assert names == {f"checkpoint-{step:08d}.pth.damaged" for step in (9, 10)}


@pytest.mark.fault("R8")
@pytest.mark.parametrize("damage", [flip_bit, Path.unlink])
def test_where_all_are_damaged_nothing_is_touched(finished, data, damage):
    for path in finished.glob("checkpoint-*.pth"):
        damage(path)
    before = files_of(finished)
    with pytest.raises(InputError, match=rf"{finished} is damaged \(checkpoint-00000020.pth: "):
        main_pretrain.main(pretraining(data, finished))
    assert changed_files(finished, before) <= {"log.txt", ".lock"}


@pytest.mark.fault("R8")
def test_a_checkpoint_with_other_fields_is_of_another_version_and_not_damaged(finished, data):
    path = finished / "checkpoint-00000020.pth"
    more = {**torch.load(path, weights_only=True), "one_more": 1}
    torch.save(more, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    with pytest.raises(InputError, match=rf"{path} is of another version: .*one_more"):
        main_pretrain.main(pretraining(data, finished))


# --- R9, R19: a disk that is full


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


def limited(*arguments: str, script: str = "main_pretrain.py", room: int = 100_000) -> list[str]:
    """An entry script that may write so many bytes per file; by default logs fit, weights do
    not."""
    return ["prlimit", f"--fsize={room}", *command(*arguments, script=script)]


@pytest.mark.fault("R9")
@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "flags", "room", "what"),
    [
        ("main_pretrain.py", pretraining, 100_000, "the checkpoint of step 10 cannot be saved in "),
        ("main_finetune.py", pictures, 100_000, "best.safetensors cannot be written: File too "),
        ("main_pretrain.py", pretraining, 4000, "tb cannot be written: File too large"),
    ],
    ids=["checkpoint", "best weights", "curves"],
)
def test_a_run_that_finds_no_room_ends_with_one_line(tmp_path, data, script, flags, room, what):
    """TensorBoard's own thread tells its part first."""
    more = ["--class_tokens", "1"]
    if script == "main_finetune.py":
        more += ["--global_pool", "token"]
    if room == 4000:
        more += ["--tensorboard", "true", "--epochs", 9, "--save_epochs", 9]
    result = run(limited(*flags(data, tmp_path, *more), script=script, room=room))
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and what in error and str(tmp_path) in error
    assert not list(tmp_path.glob("*.tmp")) and len(log_lines(tmp_path)) >= 1


@pytest.mark.fault("R9")
@pytest.mark.long
def test_the_weights_of_a_finished_run_find_no_room(finished, data):
    weights, arguments = finished / "model.safetensors", pretraining(data, finished)
    expected = weights.read_bytes()
    weights.unlink()
    before = files_of(finished)
    result = run(limited(*arguments))
    assert result.returncode == 2
    assert result.stderr == f"error: {weights} cannot be written: File too large\n"
    assert changed_files(finished, before) <= {"log.txt", ".lock", "config.yaml", "log.jsonl"}
    main_pretrain.main(arguments)  # once there is room
    assert weights.read_bytes() == expected


def fill(path: Path) -> None:
    """The next write to that place finds a full disk, as /dev/full answers; never read it, it has
    no end."""
    path.symlink_to("/dev/full")


@pytest.mark.fault("R9")
def test_the_best_so_far_stays_where_a_better_one_finds_no_room(tmp_path):
    path = save_weights(best_path(tmp_path), nn.Linear(2, 2), identity(), acc1=50.0, epoch=1)
    before = files(tmp_path)
    fill(tmp_path / "best.safetensors.tmp")
    with pytest.raises(LocalInputError, match=rf"^{path} {FULL}$"):
        save_weights(path, nn.Linear(2, 2), identity(), acc1=60.0, epoch=2)
    assert files(tmp_path) == before
    assert read_best(tmp_path) == (50.0, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"",
        lambda content: content.replace(b'"acc1"', b'"acc2"'),
    ],
    ids=["last byte", "20 bytes", "empty", "another header"],
)
def test_a_damaged_best_is_one_clear_line_and_stays(tmp_path, damage):
    """It may be the best of all epochs, so none that is worse takes its place without a word."""
    path = save_weights(best_path(tmp_path), nn.Linear(2, 2), identity(), acc1=50.0, epoch=1)
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"^{path} is damaged \(.*: bring it back, or move"):
        read_best(tmp_path)
    assert path.read_bytes() == damaged


@pytest.mark.fault("R9")
def test_bad_steps_are_told_though_they_find_no_room(tmp_path):
    """They are why the run ends: that their file cannot be written must not hide it."""
    path, sampler = (
        tmp_path / "bad_steps.jsonl",
        SimpleNamespace(images=lambda step: [2 * step, 15]),
    )
    path.write_text("of an earlier stop\n")
    bad_steps = BadSteps(path, limit=1, window=1, is_main=True, sampler=sampler)
    bad_steps.add(7, 0.5, torch.tensor(float("nan")), torch.tensor(1.0))
    fill(tmp_path / "bad_steps.jsonl.tmp")
    with pytest.raises(InputError) as error:
        bad_steps.check(1)
    entry = {"step": 7, "lr": 0.5, "loss": None, "images": [14, 15], "process": 0}
    assert str(entry) in str(error.value)
    assert error.value.__notes__ == [f"{path} {FULL}"]
    before_this_start = BadSteps(path, limit=1, window=1, is_main=True, sampler=sampler)
    with pytest.raises(InputError, match="are not recorded$"):
        before_this_start.check(1)
    assert path.read_text() == "of an earlier stop\n"


def test_a_folder_that_the_disk_fails_to_flush_is_no_warning(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        flush_folder(tmp_path)


def write_bad_samples(path: Path) -> None:
    bad_samples = BadSamples(path, 1000, is_main=True)
    bad_samples.new = [BadSample("a.png", "is damaged")]
    bad_samples.exchange()


@pytest.mark.fault("R9")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_results(path, {"acc1": 50.0}),
        lambda path: write_output(path, lambda target: target.write_text("new")),
        write_bad_samples,
    ],
    ids=["results", "any", "bad samples"],
)
def test_an_output_that_finds_no_room_leaves_what_was_there(tmp_path, write):
    path, old = tmp_path / "x", b'{"path": "b.png", "reason": "is empty"}\n'
    path.write_bytes(old)
    fill(tmp_path / "x.tmp")
    with pytest.raises(LocalInputError, match=rf"^{path} {FULL}$"):
        write(path)
    assert files(tmp_path) == {"x": old}


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

    def late(*args, original=saving.save_checkpoint):
        time.sleep(0.15)
        return original(*args)

    monkeypatch.setattr(saving, "save_checkpoint", late)
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
    # from 2^16, halved once, 6 good steps since
    assert (middle["scale"], middle["_growth_tracker"]) == (2.0**15, 6)
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
    for step in steps:
        save_checkpoint(tmp_path, content(step), keep_last, keep_every)
    assert {int(name[11:19]) for name in files(tmp_path)} == expected
    assert len(files(tmp_path)) == 2 * len(expected)


@pytest.mark.fault("R20")
def test_every_second_epoch_stays_beside_the_newest(tmp_path, data):
    more = ["--epochs", 5, "--save_epochs", 0, "--keep_every", 2, "--keep_last", 1]
    main_pretrain.main(pretraining(data, tmp_path, *more, "--save_minutes", 0))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*.pth")) == [
        f"checkpoint-{STEPS * epoch:08d}.pth" for epoch in (2, 4, 5)
    ]


@pytest.mark.fault("R20")
def test_an_old_checkpoint_that_cannot_be_removed_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "checkpoint-00000001.pth").mkdir()  # a folder cannot be unlinked, not even by root
    save_checkpoint(tmp_path, content(2), keep_last=1)
    assert f"the old checkpoint {tmp_path / 'checkpoint-00000001.pth'}: " in caplog.text
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
    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(os, "fsync", fsync)
    assert main_pretrain.main(pretraining(data, tmp_path))["step"] == 2 * STEPS
    warnings = [record.name for record in caplog.records if record.levelno >= logging.WARNING]
    assert [name for name in warnings if name != "engine.loop"] == ["util.files"] * 2
    assert saved_step(tmp_path) == 2 * STEPS
    caplog.clear()
    pack_dataset.main([str(data / "val"), str(tmp_path / "pack")])
    assert [record.name for record in caplog.records] == ["util.files"] * 2


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


@pytest.mark.long
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
    header = read_header(weights_path(tmp_path / odd / "f"))
    assert header["class_names"] == list(names)
    assert log_lines(folder)[-1]["step"] == 3 and list((folder / "tb").iterdir())


# --- R21: two jobs on one output folder


@pytest.fixture
def holder(tmp_path):
    """The id of a process that holds the folder's lock. Its own child outlives it, as a loader
    process may, which notices late that its parent is gone."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        with locked(tmp_path):
            os.fork()
            os.write(tell, b"x")
            time.sleep(600)
            os._exit(1)
    os.read(ready, 1)
    yield child
    os.killpg(child, signal.SIGKILL)


@pytest.mark.fault("R21")
def test_a_second_job_is_refused_until_the_first_has_ended_however_that_ended(
    tmp_path, data, holder, weights
):
    """Who only looks needs no lock. A dead job's file is still there, and locks nothing."""
    before, cfg = files_of(tmp_path), TrainRunConfig(output_dir=str(tmp_path), device="cpu")
    finetune = main_finetune.FinetuneConfig(**cfg.model_dump(), finetune=str(weights))
    for other in (cfg, finetune):
        with (
            pytest.raises(InputError, match=rf"in use by .* \(process {holder} on"),
            open_run(other),
        ):
            pass
    assert files_of(tmp_path) == before
    with open_run(finetune.model_copy(update={"eval": True})):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert main_pretrain.main(pretraining(data, tmp_path))["step"] == 2 * STEPS


@pytest.mark.fault("R21")
@pytest.mark.long
def test_a_second_command_ends_with_one_line(tmp_path, data, holder):
    arguments = [*pretraining(data, tmp_path), "-b", "6"]
    result = run(["sh", "run_pretrain.sh", *arguments], NGPU="2")
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and "is in use by another job" in error
    assert "open_run" not in result.stderr  # no traceback of ours; the launcher has one of its own
