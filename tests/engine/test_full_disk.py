"""Row R9 beside checkpoints: what a run writes when the disk is full is one clear line, and what
was there stays."""

import json
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from compare import identity
from runs import command, environment, log_lines, pictures, pretraining
from torch import nn

import main_pretrain
from data.loader import BadSample
from data.sampler import StepSampler
from engine.evaluation.best import Best
from engine.run.checkpoint import best_path
from engine.run.faults import BadSamples, BadSteps
from engine.run.records import write_results
from util.errors import InputError, LocalInputError
from util.files import write_output

FULL = "cannot be written: No space left on device"


def fill(path: Path) -> None:
    """The next write to that place finds a full disk, as /dev/full answers; never read it, it has
    no end."""
    path.symlink_to("/dev/full")


def run_with_little_room(
    arguments: list[str], script: str = "main_pretrain.py", room: int = 100_000
) -> subprocess.CompletedProcess[str]:
    """Runs an entry script that may write so many bytes per file; by default logs fit, weights do
    not."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return subprocess.run(
        command(*arguments, script=script),
        env=environment(),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.fault("R9")
@pytest.mark.long
def test_the_weights_of_a_finished_run_find_no_room(tmp_path, data):
    arguments = pretraining(data, tmp_path)
    main_pretrain.main(arguments)
    weights = tmp_path / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint-*")}
    result = run_with_little_room(arguments)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: {weights} cannot be written: File too large\n",
    )
    assert {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint-*")} == before
    assert not list(tmp_path.glob("model.safetensors*"))
    main_pretrain.main(arguments)  # once there is room
    assert weights.read_bytes() == expected


@pytest.mark.fault("R9")
@pytest.mark.long
def test_the_weights_of_the_best_evaluation_find_no_room(tmp_path, data):
    arguments = [*pictures(data, tmp_path), "--class_token", "true", "--global_pool", "token"]
    result = run_with_little_room(arguments, "main_finetune.py")
    best = best_path(tmp_path)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: {best} cannot be written: File too large\n",
    )
    assert not list(tmp_path.glob("best.safetensors*"))


@pytest.mark.fault("R9")
@pytest.mark.long
def test_curves_find_no_room(tmp_path, data):
    """TensorBoard's own thread tells its part first."""
    result = run_with_little_room(
        pretraining(data, tmp_path, "--tensorboard", "true", "--epochs", 9, "--save_epochs", 9),
        room=4000,
    )
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[-1] == f"error: {tmp_path}/tb cannot be written: File too large"
    )
    assert len(log_lines(tmp_path)) >= 1


def best_in(folder: Path, resumed: bool) -> Best:
    return Best(folder, identity(), is_main=True, resumed=resumed)


@pytest.mark.fault("R9")
def test_the_best_so_far_stays_where_a_better_one_finds_no_room(tmp_path):
    best = best_in(tmp_path, resumed=False)
    best.offer(nn.Linear(2, 2), 1, 50.0)
    before = best.path.read_bytes()
    fill(tmp_path / "best.safetensors.tmp")
    with pytest.raises(LocalInputError, match=rf"^{best.path} {FULL}$"):
        best.offer(nn.Linear(2, 2), 2, 60.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "best.safetensors": before
    }
    again = best_in(tmp_path, resumed=True)
    assert (again.acc1, again.epoch) == (50.0, 1)


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
    best_in(tmp_path, resumed=False).offer(nn.Linear(2, 2), 1, 50.0)
    path = best_path(tmp_path)
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(InputError) as error:
        best_in(tmp_path, resumed=True)
    assert str(error.value).startswith(f"{path} is damaged (")
    assert str(error.value).endswith("move it away to keep the best of the epochs from here on")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == damaged


@pytest.mark.fault("R9")
def test_bad_steps_are_told_though_they_find_no_room(tmp_path):
    """They are why the run ends: that their file cannot be written must not hide it."""
    path = tmp_path / "bad_steps.jsonl"
    path.write_text("of an earlier stop\n")
    sampler = StepSampler(
        num_images=100,
        batch_size=2,
        accum_iter=1,
        rank=0,
        world_size=1,
        seed=0,
        start_step=3,
        stop_step=50,
    )
    bad_steps = BadSteps(path, limit=1, window=1, is_main=True, sampler=sampler)
    bad_steps.add(7, 0.5, torch.tensor(float("nan")), torch.tensor(1.0))
    fill(tmp_path / "bad_steps.jsonl.tmp")
    with pytest.raises(InputError) as error:
        bad_steps.check(1)
    images = sampler.images(7)
    assert "1 steps in a row had a non-finite gradient, the first" in str(error.value)
    assert f"images {images[0]} {images[1]} of the data set; {path} {FULL}" in str(error.value)
    assert path.read_text() == "of an earlier stop\n"
    with pytest.raises(InputError, match=f"all are in {path}"):  # the temporary name is free again
        bad_steps.check(1)
    (entry,) = map(json.loads, path.read_text().splitlines())
    assert entry == {"step": 7, "lr": 0.5, "loss": None, "images": images, "process": 0}


def append_bad_samples(path: Path) -> None:
    bad_samples = BadSamples(path.with_name("absent"), 1000, is_main=True)
    bad_samples.path = path  # not earlier, as the full device could be read without end
    bad_samples.new = [BadSample("a.png", "is damaged")]
    bad_samples.exchange()


@pytest.mark.fault("R9")
@pytest.mark.parametrize(
    ("name", "filled", "write"),
    [
        ("results.json", "results.json.tmp", lambda path: write_results(path, {"acc1": 50.0})),
        ("x", "x.tmp", lambda path: write_output(path, lambda target: target.write_text("new"))),
        ("bad_samples.jsonl", "bad_samples.jsonl", append_bad_samples),
    ],
)
def test_an_output_that_finds_no_room_leaves_what_was_there(tmp_path, name, filled, write):
    path = tmp_path / name
    if filled != name:
        path.write_text("old")
    fill(tmp_path / filled)
    with pytest.raises(LocalInputError, match=rf"^{path} {FULL}$"):
        write(path)
    if filled != name:
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "old"}
