"""`parallel: fsdp` on two real gloo processes: the numbers of DDP, the same files, half the
memory."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from compare import assert_same, assert_same_checkpoint
from runs import (
    driven,
    flip_bit,
    launch,
    log_lines,
    make_pictures,
    pictures,
    pretrain_pictures,
    pretraining,
    results_of,
    run,
    step_losses,
)
from safetensors.torch import load_file

from engine.run.checkpoint import Checkpoint, load_newest_checkpoint

FSDP = ("--parallel", "fsdp")
STEPS = 30  # 3 epochs of 120 images, 12 per step
LOOKS = ("--monitor_epochs", 1, "--monitor_images", 2, "--monitor_knn", 60)


def command_line(data: Path, output_dir: Path, *more: Any) -> list[str]:
    """Two processes' pretraining, with several class tokens; later flags win."""
    batch = ["--batch_size", 6, "--total_batch_size", 12, "--epochs", 3, "--keep_last", STEPS]
    batch += ["--class_tokens", 3]
    return pretraining(data, output_dir, *batch, *more)


def drive(
    output_dir: Path, arguments: list[str], processes: int = 2, **env: str
) -> CompletedProcess[str]:
    """Runs that under the driver, whose notes go to `output_dir`/watch."""
    command = driven(*arguments, processes=processes, driver="sharding_driver.py")
    return run(command, WATCH=str(output_dir / "watch"), **env)


def pretrain(data: Path, output_dir: Path, *more: Any, processes: int = 2, **env: str) -> Path:
    """The same, which must succeed; returns `output_dir`."""
    result = drive(output_dir, command_line(data, output_dir, *more), processes, **env)
    assert result.returncode == 0, result.stderr
    return output_dir


def notes(folder: Path) -> list[dict[str, int]]:
    """What each of two processes noted."""
    return [json.loads((folder / "watch" / f"{rank}.json").read_text()) for rank in (0, 1)]


def restored(folder: Path) -> Checkpoint:
    """The state before the first step of the folder's last process."""
    return Checkpoint(**torch.load(folder / "watch" / "restored.pth", weights_only=True))


def go_on_from(folder: Path, step: int, target: Path) -> Checkpoint | None:
    """Makes `target` a run that was stopped after `step`; returns that checkpoint."""
    target.mkdir()
    for name in (f"checkpoint-{step:08d}.pth", f"checkpoint-{step:08d}.pth.sha256"):
        shutil.copy(folder / name, target)
    return load_newest_checkpoint(target)


def assert_close_runs(one: Path, other: Path, first: int = 1) -> None:
    """Losses and gradient norms of each step."""
    ours, theirs = (
        {line["step"]: line for line in log_lines(f) if "grad_norm" in line} for f in (one, other)
    )
    assert ours.keys() >= theirs.keys() == set(range(first, STEPS + 1))
    for step, line in theirs.items():
        assert line["loss"] == pytest.approx(ours[step]["loss"], abs=1e-6), step
        assert line["grad_norm"] == pytest.approx(ours[step]["grad_norm"], rel=1e-5), step


@pytest.fixture(scope="module")
def ddp(data, tmp_path_factory):
    return pretrain(data, tmp_path_factory.mktemp("ddp"), "--clip_grad", 0.5, *LOOKS)


@pytest.fixture(scope="module")
def fsdp(data, tmp_path_factory):
    """A checkpoint after each step."""
    folder = tmp_path_factory.mktemp("fsdp")
    return pretrain(data, folder, "--clip_grad", 0.5, *LOOKS, "--save_minutes", 1e-9, *FSDP)


# the numbers of DDP


@pytest.mark.long
def test_losses_and_gradient_norms_are_those_of_ddp(ddp, fsdp):
    assert_close_runs(ddp, fsdp)
    assert (
        min(line["grad_norm"] for line in log_lines(ddp) if "grad_norm" in line) > 0.5
    )  # each step was clipped


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        ("--batch_size", 3, "--checkpointing"),  # two micro-batches per step
        ("--compile", "--compile_backend", "aot_eager", "--checkpointing"),
    ],
)
def test_accumulation_checkpointing_and_compiling_go_with_it(data, ddp, tmp_path, more):
    folder = pretrain(data, tmp_path / "run", "--clip_grad", 0.5, *FSDP, *more)
    assert_close_runs(ddp, folder)


@pytest.mark.long
def test_each_process_gets_its_part_of_the_weights_to_start_from(data, weights, tmp_path):
    more = ["--init", weights, "--epochs", 1, "--warmup_epochs", 0.5, "--class_tokens", 1]
    folder = pretrain(data, tmp_path / "run", *more, *FSDP)
    assert_same(restored(folder).model, load_file(weights))


@pytest.mark.long
@pytest.mark.fault("R16")
def test_in_bf16_all_is_equal_bit_for_bit_also_around_a_step_that_one_process_spoils(
    data, tmp_path
):
    """Without clipping no sum has another order; each layer sees gathered weights, forward and
    backward."""
    flags = ["--precision", "bf16", "--log_interval", 2]
    runs = [
        pretrain(data, tmp_path / kind, *flags, "--parallel", kind, NAN_LOSS="4")
        for kind in ("ddp", "fsdp")
    ]
    ddp, fsdp = map(load_newest_checkpoint, runs)
    for name in ("model", "optimizer", "epoch_losses"):
        assert_same(getattr(ddp, name), getattr(fsdp, name), name)
    assert {int(entry["step"]) for entry in fsdp.optimizer["state"].values()} == {STEPS - 1}


@pytest.mark.long
def test_a_part_that_is_not_finite_is_saved_by_nobody(data, tmp_path):
    """And all say so at once: the main process, whose parts are all finite, does not wait for the
    other."""
    arguments = command_line(data, tmp_path, *FSDP, "--save_minutes", 1e-9, "--timeout", 0.5)
    result = drive(tmp_path, arguments, NAN_PART="5")
    assert result.returncode != 0
    assert "error: the state is not finite after step 6, so it is not saved" in result.stderr
    assert max(path.name for path in tmp_path.glob("checkpoint-*.pth")) == "checkpoint-00000005.pth"


@pytest.mark.long
def test_the_monitor_sees_what_it_sees_of_an_unsharded_model(ddp, fsdp):
    looks = [[line for line in log_lines(folder) if "monitor_s" in line] for folder in (ddp, fsdp)]
    assert len(looks[0]) == len(looks[1]) == 4
    for whole, sharded in zip(*looks, strict=True):
        assert sharded["knn_acc1"] == whole["knn_acc1"]
        assert sharded["psnr"] == pytest.approx(whole["psnr"], abs=1e-4)
        assert sharded["held_out_loss"] == pytest.approx(whole["held_out_loss"], abs=1e-6)


# memory


@pytest.mark.long
def test_each_process_holds_half_of_the_parameters_gradients_and_moments(ddp, fsdp):
    size = sum(p.numel() for p in load_file(ddp / "model.safetensors").values())
    buffers = sum(
        t.numel()
        for name, t in load_file(ddp / "model.safetensors").items()
        if name.endswith("pos_embed")
    )
    for whole, sharded in zip(notes(ddp), notes(fsdp), strict=True):
        assert whole["bytes"] == pytest.approx(16 * (size - buffers), rel=0.01)
        assert sharded["bytes"] == pytest.approx(whole["bytes"] / 2, rel=0.02)
        assert (whole["whole_blocks"], sharded["whole_blocks"]) == (3, 1)  # one at a time


RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # of freed memory nothing stays with a process
TORCH, STEP = 24 * 2**20, 72 * 2**20  # bytes of torch's own, and of activations and whole blocks
WIDE = ("--size", "small", "--embed_dim", 512, "--num_heads", 8, "--depth", 12, "--patch_size", 4)


@pytest.mark.long
@pytest.mark.fault("R34")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux has it")
def test_host_memory_does_not_grow_with_the_processes_beyond_their_shares(data, tmp_path):
    """Of 38 million parameters, in a run that begins and one that goes on.

    Before the first step a process holds its share of the parameters, and on resume of the moments,
    and the main one a copy of as much as was read or drawn. A step adds the gradients, twice under
    DDP, which makes their memory anew in its first one, and a save a copy on the main process.
    """
    few = make_pictures(tmp_path / "few", train=8)  # two steps per epoch
    for kind, processes in (("ddp", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)):
        folder = tmp_path / f"{kind}{processes}"
        batch = ("--batch_size", 12 // processes, "--keep_last", 1, "--timeout", 2)
        for epoch, read in ((1, 4), (2, 12)):  # bytes per parameter
            more = (*WIDE, *batch, "--parallel", kind, "--stop_epoch", epoch)
            pretrain(few, folder, *more, processes=processes, MEMORY="1", **RETURNED)
            size = sum(p.numel() for p in load_file(folder / "model.safetensors").values())
            shared, stepped = (size / processes, 16) if kind == "fsdp" else (size, 20)
            for rank in range(processes):
                noted = json.loads((folder / "watch" / f"{rank}.json").read_text())
                start, end = read * shared, stepped * shared
                if rank == 0:
                    start, end = start + read * size, end + 12 * size
                where = (kind, processes, epoch, rank, start, end, noted)
                assert noted["start_peak"] < 1.3 * start + TORCH, where
                assert noted["peak"] < 1.3 * end + TORCH + STEP, where


# the same files


def layout(value: Any) -> Any:
    """Names, order, types and shapes of nested values."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.shape
    if isinstance(value, dict):
        return [(name, layout(entry)) for name, entry in value.items()]
    return [layout(entry) for entry in value] if isinstance(value, list | tuple) else type(value)


@pytest.mark.long
def test_checkpoints_and_weights_have_the_layout_of_ddp(ddp, fsdp):
    assert layout(vars(load_newest_checkpoint(ddp))) == layout(vars(load_newest_checkpoint(fsdp)))
    weights = load_file(fsdp / "model.safetensors")
    assert layout(load_file(ddp / "model.safetensors")) == layout(weights)
    assert_same(weights, dict(load_newest_checkpoint(fsdp).model))


@pytest.mark.long
@pytest.mark.fault("R26")
def test_saved_sharded_loaded_whole_and_back(data, fsdp, tmp_path):
    """From the middle of an epoch, where the meters hold something."""
    saved = go_on_from(fsdp, 15, tmp_path / "one")
    flags = ["--clip_grad", 0.5, *LOOKS]
    one = pretrain(data, tmp_path / "one", *flags, "--save_minutes", 1e-9, processes=1)
    assert_same_checkpoint(restored(one), saved)
    assert_close_runs(fsdp, one, first=16)

    saved = go_on_from(one, 25, tmp_path / "two")
    two = pretrain(data, tmp_path / "two", *flags, *FSDP)
    assert_same_checkpoint(restored(two), saved)
    assert_close_runs(fsdp, two, first=26)
    for before, after in zip(notes(fsdp), notes(two), strict=True):
        assert after["bytes"] == before["bytes"]  # no whole tensor stays behind a part


@pytest.mark.long
@pytest.mark.fault("R3")
def test_two_sharded_processes_resume_bit_for_bit(data, fsdp, tmp_path):
    go_on_from(fsdp, 15, tmp_path / "run")
    folder = pretrain(data, tmp_path / "run", "--clip_grad", 0.5, *LOOKS, *FSDP)
    losses = step_losses(fsdp)
    assert step_losses(folder) == {step: losses[step] for step in range(16, STEPS + 1)}
    assert_same_checkpoint(*map(load_newest_checkpoint, (fsdp, folder)))


# fine-tuning


@pytest.mark.long
@pytest.mark.parametrize("frozen", [0, 1])
def test_fine_tuning_too(data, weights, tmp_path, frozen):
    for kind in ("ddp", "fsdp"):
        flags = ["--batch_size", 6, "--total_batch_size", 12, "--lr", 1e-2, "--parallel", kind]
        flags += ["--finetune", weights, "--freeze_blocks", frozen] if frozen else []
        result = launch(pictures(data, tmp_path / kind, *flags), 2, "run_finetune.sh")
        assert result.returncode == 0, result.stderr
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    assert_close_runs(ddp, fsdp)
    ours, theirs = results_of(ddp), results_of(fsdp)
    assert (ours["correct1"], ours["best_epoch"]) == (theirs["correct1"], theirs["best_epoch"])
    for name in ("model.safetensors", "best.safetensors"):
        assert layout(load_file(ddp / name)) == layout(load_file(fsdp / name))
    result = launch(
        pictures(data, tmp_path / "eval", "--eval", "--finetune", fsdp / "model.safetensors"),
        1,
        "run_finetune.sh",
    )
    assert result.returncode == 0, result.stderr
    assert results_of(tmp_path / "eval", "eval.json")["correct1"] == ours["correct1"]


# what only the main process reads


@pytest.mark.long
def test_all_processes_refuse_what_the_main_one_cannot_read(data, ddp, tmp_path):
    """In one line, at once."""
    limit = ("--timeout", 0.5)
    go_on_from(ddp, 20, tmp_path / "run")
    flip_bit(tmp_path / "run" / "checkpoint-00000020.pth")
    damaged = drive(tmp_path, command_line(data, tmp_path / "run", "--clip_grad", 0.5, *limit))
    (tmp_path / "weights.pth").write_bytes((ddp / "checkpoint-00000020.pth").read_bytes()[:9999])
    flags = ["--finetune", tmp_path / "weights.pth", *limit]
    weights = launch(pictures(data, tmp_path / "other", *flags), 2, "run_finetune.sh")
    refusals = ("every checkpoint in", f"{tmp_path / 'weights.pth'}: cannot be read, is it whole?")
    for result, text in zip((damaged, weights), refusals, strict=True):
        assert result.returncode != 0 and result.stderr.count("error: ") == 1, result.stderr
        assert f"error: {text}" in result.stderr


@pytest.mark.long
def test_a_folder_that_the_processes_do_not_share_is_refused(data, ddp, tmp_path):
    go_on_from(ddp, 20, tmp_path / "run")
    arguments = command_line(data, tmp_path / "run", "--clip_grad", 0.5, *LOOKS, "--timeout", 0.5)
    result = drive(tmp_path, arguments, OF_PROCESS_1=f"--output_dir {tmp_path / 'own'}")
    assert result.returncode != 0 and result.stderr.count("error: ") == 1, result.stderr
    assert "the processes see different newest checkpoints: output_dir must" in result.stderr


# where there is nothing to share


def test_one_process_is_as_without(data, tmp_path):
    folders = [
        pretrain_pictures(data, tmp_path / kind, "--parallel", kind) for kind in ("ddp", "fsdp")
    ]
    assert step_losses(folders[0]) == step_losses(folders[1])
    assert_same(*(load_newest_checkpoint(folder).model for folder in folders))


@pytest.mark.long
def test_fp16_is_refused_in_one_line(data, tmp_path):
    result = launch(command_line(data, tmp_path / "run", "--precision", "fp16", *FSDP), 2)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert (
        "error: parallel fsdp goes with precision bf16 or fp32, not fp16: use another, "
        "or parallel ddp" in result.stderr
    )
    assert not list((tmp_path / "run").glob("checkpoint-*"))
