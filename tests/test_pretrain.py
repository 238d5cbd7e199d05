"""`main_pretrain.py` end to end on real digits: what it writes, exact resume, accumulation, and
what it refuses."""

import json
import os
import re
import resource
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from compare import assert_same_run
from conftest import ROOT
from PIL import Image
from runs import (
    STEPS_PER_EPOCH,
    assert_same,
    changed_files,
    cut_after,
    digits,
    driven,
    files_of,
    log_lines,
    note_reads,
    pretraining,
    run,
    step_losses,
    stop_at,
)
from safetensors.torch import load_file

import hubconf
import main_pretrain
from engine.run.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from models.mae import MaskedAutoencoder
from models.weights.files import weights_digest
from util.errors import InputError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, a line per step, a checkpoint per epoch: its folder, command line and
    metrics."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = digits(folder, "--log_interval", 1, "--save_epochs", 1, "--tensorboard", "true")
    return folder, arguments, main_pretrain.main(arguments)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_learns_and_fills_its_folder(finished):
    folder, _, metrics = finished
    assert metrics["step"] == 2 * STEPS_PER_EPOCH
    assert metrics["loss"] == metrics["epoch_losses"][1] < 0.85 * metrics["epoch_losses"][0]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoint-00000062.pth",
        "checkpoint-00000062.pth.sha256",
        "checkpoint-00000124.pth",
        "checkpoint-00000124.pth.sha256",
        "config.yaml",
        "log.jsonl",
        "log.txt",
        "model.safetensors",
        "tb",
    ]
    lines = log_lines(folder)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 125))
    assert {line["kind"] for line in steps} == {"train"}
    assert steps[0].keys() == {
        "kind",
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "lr",
        "images_per_s",
        "data_wait",
        "eta_s",
        "bad_files",
    }
    # peak 1e-3 * 64 / 256 after half an epoch of warmup; the first step has lr 0
    assert steps[0]["lr"] == 0.0
    assert steps[31]["lr"] == pytest.approx(2.5e-4)
    assert steps[123]["lr"] < 1e-6
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_s"] > 0 for line in steps)
    epochs = [line["epoch_loss"] for line in lines if "epoch_loss" in line]
    assert epochs == pytest.approx(
        [np.mean([s["loss"] for s in steps[:62]]), np.mean([s["loss"] for s in steps[62:]])]
    )
    memory = [line["memory_gb"] for line in lines if "memory_gb" in line]
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert len(memory) == 2 and 0.2 < memory[0] <= memory[1] <= now
    assert "epoch 2 done" in (folder / "log.txt").read_text()


def test_tensorboard_curves_equal_the_log(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [line for line in log_lines(finished[0]) if "loss" in line]
    for name in ("loss", "lr", "grad_norm", "images_per_s", "data_wait", "bad_files"):
        curve = events.Scalars(f"train/{name}")
        assert [event.step for event in curve] == [line["step"] for line in steps]
        assert [event.value for event in curve] == pytest.approx([line[name] for line in steps])
    assert len(events.Scalars("epoch/epoch_loss")) == 2


def test_a_checkpoint_holds_what_the_design_says(finished):
    saved = torch.load(finished[0] / "checkpoint-00000124.pth", weights_only=True)
    assert saved.keys() == {field.name for field in fields(Checkpoint)}
    numbers = ("step", "samples_seen", "total_batch", "format_version")
    assert [saved[name] for name in numbers] == [124, 124 * 64, 64, 2]
    assert (saved["mean"], saved["std"]) == ([0.1307], [0.3081])
    model = MaskedAutoencoder(**saved["model_args"])
    model.load_state_dict(saved["model"], strict=True)
    weights = parameters(finished[0])
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved["model"].items())


@pytest.mark.fault("R22")
def test_a_finished_run_is_left_alone(finished, monkeypatch, caplog):
    folder, arguments, metrics = finished
    before = files_of(folder)
    cut_after(monkeypatch, 0)  # a step would raise
    assert main_pretrain.main(arguments) == metrics
    assert f"{folder} is already finished at step 124" in caplog.messages
    assert changed_files(folder, before) <= {"log.txt", ".lock"}


def older(checkpoint: Checkpoint, class_token: bool) -> Checkpoint:
    """The same from before there were several class tokens, and without fields that came later."""
    found = {}
    for name in ("config", "model_args"):
        found[name] = {n: v for n, v in getattr(checkpoint, name).items() if n != "class_tokens"}
        found[name]["class_token"] = class_token
    del found["model_args"]["decoder"]
    return replace(checkpoint, **found)


def test_a_run_that_an_older_version_began_goes_on(finished, tmp_path):
    folder, arguments, metrics = finished
    newest = load_newest_checkpoint(folder)
    for class_token in (False, True):
        copy = shutil.copytree(folder, tmp_path / f"copy_{class_token}")
        (copy / "model.safetensors").unlink()
        save_checkpoint(copy, older(newest, class_token), keep_last=1)
        command = [*arguments, "--output_dir", str(copy)]
        if class_token:
            assert main_pretrain.main(command) == metrics
        else:
            with pytest.raises(InputError, match="class_tokens: 0 -> 1"):
                main_pretrain.main(command)


def test_weights_lost_after_the_last_checkpoint_are_written_again(finished, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    main_pretrain.main([*finished[1], "--output_dir", str(copy)])
    assert_same(parameters(copy), parameters(finished[0]))


@pytest.mark.fault("R24")
def test_the_written_config_repeats_the_run(finished, tmp_path):
    folder = finished[0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["lr"], config["img_size"], config["embed_dim"]) == (1e-3, 28, None)
    main_pretrain.main(["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path)])
    assert_same_run(folder, tmp_path)


@pytest.mark.fault("R1", "R5")
def test_a_stopped_run_goes_on_and_equals_the_uninterrupted_one(finished, tmp_path):
    base = digits(tmp_path, "--log_interval", 1, "--save_epochs", 1)
    assert main_pretrain.main([*base, "--stop_epoch", "1"])["step"] == STEPS_PER_EPOCH
    main_pretrain.main(
        [*base, "--num_workers", "2", "--prefetch_factor", "2"]
    )  # R5: other workers change nothing
    assert_same_run(finished[0], tmp_path)


# by loader processes: after the first step, mid-epoch, the last of an epoch, the first of the next
STOPS = {
    0: {1: signal.SIGTERM, 30: signal.SIGKILL, 62: signal.SIGINT, 63: signal.SIGUSR1},
    2: {1: signal.SIGKILL, 30: signal.SIGHUP, 62: signal.SIGKILL, 63: signal.SIGTERM},
}


@pytest.mark.fault("R1", "R5")
@pytest.mark.long
@pytest.mark.parametrize("workers", STOPS)
def test_a_run_stopped_after_an_exact_step_goes_on_bit_for_bit(finished, tmp_path, workers):
    """By signals that it answers, and killed where that step's checkpoint is complete; each start
    is a new process."""
    folder, digests = tmp_path / "run", tmp_path / "digests"
    digests.mkdir()
    arguments = ["main_pretrain.py", *digits(folder, "--log_interval", 1, "--num_workers", workers)]
    before = 0
    for step, signum in STOPS[workers].items():
        killed = signum == signal.SIGKILL
        more = (
            ["--save_minutes", "1e-9"] if killed else []
        )  # a signal that it answers makes it save
        result = run(
            driven(*arguments, *more),
            FAULTS=stop_at(step, signum),
            SETTLED="1",
            DIGESTS=str(digests),
        )
        assert result.returncode == (-signum if killed else 128 + signum), result.stderr
        assert (f"resuming {folder} at step {before}\n" in result.stdout) == (before > 0)
        assert list(step_losses(folder)) == list(range(1, step + 1))
        assert load_newest_checkpoint(folder).step == step
        before = step
    result = run(driven(*arguments), DIGESTS=str(digests))
    assert result.returncode == 0, result.stderr
    assert f"resuming {folder} at step {before}\n" in result.stdout
    assert_same_run(finished[0], folder)
    losses, states = step_losses(folder), {}
    for line in map(json.loads, (digests / "0.jsonl").read_text().splitlines()):
        assert (
            states.setdefault(line["step"], line) == line
        )  # before a stop and after the start that follows it
    for step in STOPS[workers]:  # not vacuous
        assert (
            losses[step] != losses[step + 1]
            and states[step]["optimizer"] != states[step + 1]["optimizer"]
        )
        assert states[step]["model"] != states[step + 1]["model"]


@pytest.mark.fault("R25")
def test_one_batch_equals_accumulated_micro_batches(finished, tmp_path):
    """1 x 64 = 4 accumulated x 16, in loss and gradient norm."""
    main_pretrain.main(digits(tmp_path, "--log_interval", 1, "--batch_size", 16, "--stop_epoch", 1))
    once, accumulated = (
        [line for line in log_lines(f) if "loss" in line] for f in (finished[0], tmp_path)
    )
    assert len(accumulated) == STEPS_PER_EPOCH
    for a, b in zip(once[:STEPS_PER_EPOCH], accumulated, strict=True):
        for name in ("loss", "grad_norm"):  # 2.1e-7 and 1.6e-7 were measured
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=0), (a["step"], name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_do_not_log_never_wait_for_the_device(tmp_path, monkeypatch, optimizer):
    """Reads of a tensor's value in this process; images are decoded in another, which reads small
    CPU tensors."""
    reads = note_reads(monkeypatch)
    counts = []
    for epochs in (1, 2):  # 62 steps more, whose last one logs
        reads.clear()
        more = ["--epochs", epochs, "--log_interval", 1000, "--num_workers", 1, "--save_epochs", 0]
        more += ["--optimizer", optimizer]
        main_pretrain.main(digits(tmp_path / str(epochs), *more, "--clip_grad", 0.5))
        assert "synchronize" not in reads
        counts.append({name: reads.count(name) for name in set(reads)})
    fewer, more = counts
    # an epoch's end reads both meters: three sums as a list, one count as a number
    assert {
        name: more[name] - fewer.get(name, 0) for name in more if more[name] != fewer.get(name, 0)
    } == {"item": 2, "tolist": 2}


def test_shared_mask_and_variants_train(tmp_path):
    more = ["--epochs", 1, "--shared_mask", "--class_tokens", "0", "--precision", "bf16"]
    more += ["--decoder_class_token", "false", "--norm_pix_loss", "false", "--clip_grad", 0.5]
    metrics = main_pretrain.main(digits(tmp_path, *more))
    assert metrics["step"] == STEPS_PER_EPOCH
    assert 0 < metrics["loss"] < 2


def test_non_finite_gradients_end_the_run(tmp_path):
    with pytest.raises(InputError, match="20 steps in a row"):
        # with std 1e-30 pixels overflow
        main_pretrain.main(
            digits(tmp_path, "--std", "1e-39", "--norm_pix_loss", "false", "--warmup_epochs", 0)
        )
    assert not list(tmp_path.glob("checkpoint-*"))


def test_grey_alpha_and_odd_files_are_no_error_and_broken_ones_are_replaced(tmp_path):
    """Real files of many kinds in one folder; labels are not needed."""
    images = tmp_path / "images"
    (images / "deep" / "er").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index, mode in enumerate(["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"] * 8):
        picture = Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert(
            mode
        )
        ending = "jpg" if mode == "CMYK" else "png"
        picture.save(images / ("deep/er" if index % 2 else ".") / f"{index} ä.{ending}")
    (images / "broken.jpg").write_bytes(b"")
    (images / "text.png").write_text("not an image")
    output = tmp_path / "run"
    arguments = digits(
        output,
        "--dataset",
        "folder",
        "--data_path",
        images,
        "--img_size",
        32,
        "--patch_size",
        8,
        "--in_chans",
        3,
        "--mean",
        0.5,
        0.5,
        0.5,
        "--std",
        0.2,
        0.2,
        0.2,
        "--batch_size",
        16,
        "--total_batch_size",
        16,
        "--log_interval",
        3,
    )
    assert main_pretrain.main(arguments)["step"] == 2 * 3  # 58 images
    bad = [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]
    assert {Path(entry["path"]).name for entry in bad} == {"broken.jpg", "text.png"}
    assert {entry["reason"] for entry in bad if "broken" in entry["path"]} == {"the file is empty"}


# from weights


RGB = ["--in_chans", 3, "--log_interval", 1]
STATS = ["--mean", 0.5, 0.4, 0.3, "--std", 0.25, 0.2, 0.2]


def continuing(data: Path, output_dir: Path, *more: object) -> list[str]:
    """The command line of a run in colour whose mean and std are not stated."""
    return unstated(pretraining(data, output_dir, *RGB, *more))


def unstated(arguments: list[str]) -> list[str]:
    """Without the grey images' mean and std."""
    for name in ("--mean", "--std"):
        place = arguments.index(name)
        del arguments[place : place + 2]
    return arguments


@pytest.fixture(scope="module")
def started_from(data, tmp_path_factory):
    """Weights, and a run that starts from them: its first batch, order and loss."""
    source = tmp_path_factory.mktemp("source")
    main_pretrain.main(pretraining(data, source, *RGB, *STATS))
    path, folder, first = source / "model.safetensors", source / "next", []

    def noted(self, *batch, original=MaskedAutoencoder.forward):
        loss = original(self, *batch)
        first.append((*(tensor.clone() for tensor in batch[:2]), loss.item()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedAutoencoder, "forward", noted)
        main_pretrain.main(continuing(data, folder, "--init", path))
    return path, folder, first[0]


def test_the_first_loss_is_that_of_the_weights_and_pixels_are_normalised_as_theirs(started_from):
    path, folder, (images, order, loss) = started_from
    source = hubconf.autoencoder(str(path))
    assert abs(source(images, order).item() - loss) < 1e-5
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["mean"], config["std"]) == ([0.5, 0.4, 0.3], [0.25, 0.2, 0.2])
    pixels = (images * source.std + source.mean) * 255  # of grey digits, 0 to 255 in each channel
    assert pixels.min() > -6 and pixels.max() < 261
    torch.testing.assert_close(pixels[:, 0], pixels[:, 2], rtol=0, atol=1e-3)
    saved = load_newest_checkpoint(folder)
    assert (saved.mean, saved.weights) == ([0.5, 0.4, 0.3], weights_digest(path))
    text = (folder / "log.txt").read_text()
    assert "fresh: nothing" in text and "mean follows the weights" in text


def test_stated_pixels_come_before_those_of_the_weights(data, started_from, tmp_path, caplog):
    more = ["--init", started_from[0], "--mean", 0.2, 0.2, 0.2, "--stop_epoch", 1]
    main_pretrain.main(continuing(data, tmp_path, *more))
    saved = load_newest_checkpoint(tmp_path)
    assert (saved.mean, saved.std) == ([0.2, 0.2, 0.2], [0.25, 0.2, 0.2])
    assert "trained with mean (0.5, 0.4, 0.3) and the settings say (0.2, 0.2, 0.2)" in caplog.text


def test_of_any_number_of_channels_the_weights_give_mean_and_std_or_they_must_be_stated(
    data, weights, tmp_path
):
    more = ["--init", weights, "--stop_epoch", 1]
    main_pretrain.main(unstated(pretraining(data, tmp_path / "grey", *more)))
    saved = load_newest_checkpoint(tmp_path / "grey")
    assert (saved.mean, saved.std) == ([0.1307], [0.3081])
    torch.save({"model": load_file(weights)}, tmp_path / "says.pth")  # neither mean nor std
    more[1] = tmp_path / "says.pth"
    with pytest.raises(InputError, match="mean has 3 values and in_chans is 1.*says.pth has no"):
        main_pretrain.main(unstated(pretraining(data, tmp_path / "refused", *more)))


@pytest.mark.parametrize("init", [None, "another", "lost"])
def test_a_run_that_started_from_weights_goes_on_without_them(
    data, started_from, tmp_path, caplog, init
):
    """Whatever `init` is by then."""
    path, folder, _ = started_from
    copy = shutil.copy(path, tmp_path / "copy")
    main_pretrain.main(continuing(data, tmp_path / "run", "--init", copy, "--stop_epoch", 1))
    Path(copy).unlink()
    if init == "another":
        Path(copy).write_text("these are no weights")
    caplog.set_level("INFO")
    more = [] if init is None else ["--init", copy]
    for _ in range(2):  # it goes on, and then is finished
        main_pretrain.main(continuing(data, tmp_path / "run", *more))
    assert_same_run(folder, tmp_path / "run")
    assert ("init is ignored" in caplog.text) == (init is not None)


def test_a_run_whose_first_save_was_interrupted_starts_from_its_weights_again(
    data, started_from, tmp_path
):
    path, folder, _ = started_from
    run = tmp_path / "run"
    main_pretrain.main(continuing(data, run, "--init", path, "--stop_epoch", 1))
    saved = max(run.glob("checkpoint-*.pth"))
    for other in (*run.glob("checkpoint-*"), run / "model.safetensors"):
        if other.name != f"{saved.name}.sha256":
            other.rename(
                other.with_name(f"{other.name}.tmp") if other == saved else tmp_path / other.name
            )
    main_pretrain.main(continuing(data, run, "--init", path))
    assert_same_run(folder, run)


def test_weights_that_do_not_fit_or_lie_where_the_run_writes_are_refused(
    data, started_from, tmp_path, monkeypatch
):
    monkeypatch.setattr(main_pretrain, "build_pretrain_source", None)  # before any image is read
    path = shutil.copy(started_from[0], tmp_path / "model.safetensors")
    more = ["--embed_dim", 48, "--depth", 3]
    with pytest.raises(InputError, match="32 in the file, 48 in.*depth 2 in the file, 3 in"):
        main_pretrain.main(continuing(data, tmp_path / "run", "--init", path, *more))
    with pytest.raises(InputError, match="model.safetensors, which init names"):
        main_pretrain.main(continuing(data, tmp_path, "--init", path))


@pytest.mark.long
def test_other_images_are_learned_faster_from_weights(cifar10_jpeg, tmp_path):
    """CIFAR-10's classes 0 to 4, then 5 to 9, beside from scratch at equal steps."""
    names = sorted(path.name for path in (cifar10_jpeg / "train").iterdir())
    for part, classes in (("first", names[:5]), ("second", names[5:])):
        for name in classes:
            for split, count in (("train", 300), ("val", 50)):
                folder = tmp_path / part / split / name
                folder.mkdir(parents=True)
                for image in sorted((cifar10_jpeg / split / name).iterdir())[:count]:
                    (folder / image.name).symlink_to(image)
    recipe = ["--config", str(ROOT / "cfgs/pretrain/ViT-Ti_CIFAR10.yaml"), "--dataset", "folder"]
    small = "--batch_size 64 --total_batch_size 64 --depth 3 --precision fp32 --device cpu"
    small += " --epochs 4 --warmup_epochs 0.5 --tensorboard false"

    def losses(part, output, *more):
        arguments = [*recipe, *small.split(), "--data_path", str(tmp_path / part)]
        arguments += ["--output_dir", str(tmp_path / output), *map(str, more)]
        return main_pretrain.main(arguments)["epoch_losses"]

    losses("first", "source", "--monitor_epochs", 0)
    fresh = losses("second", "fresh")
    started = losses("second", "started", "--init", tmp_path / "source" / "model.safetensors")
    assert all(ours < theirs for ours, theirs in zip(started, fresh, strict=True))
    knn = [
        [line["knn_acc1"] for line in log_lines(tmp_path / name) if "knn_acc1" in line]
        for name in ("started", "fresh")
    ]
    assert knn[0][-1] > knn[1][-1]


# refused, with one clear line, before any compute


def empty_folder(tmp_path: Path) -> list:
    (tmp_path / "empty").mkdir()
    return ["--dataset", "folder", "--data_path", tmp_path / "empty", "--in_chans", 1]


def few_images(tmp_path: Path) -> list:
    (tmp_path / "few").mkdir()
    for i in range(40):
        Image.new("L", (28, 28)).save(tmp_path / "few" / f"{i}.png")
    return ["--dataset", "folder", "--data_path", tmp_path / "few"]


def unwritable(tmp_path: Path) -> list:
    (tmp_path / "file").write_text("in the way")
    return ["--output_dir", tmp_path / "file" / "run"]


def settings(error: InputError) -> set[str]:
    """The settings that an error names, as an attribute or in its words."""
    return {*error.settings, *re.findall(r"[a-z_]+", str(error))}


REFUSED = {
    "path missing": (["--dataset", "folder", "--data_path", "/nowhere"], "data_path"),
    "no path": (["--dataset", "folder"], "data_path"),
    "no images": (empty_folder, "images"),
    "too few images": (few_images, "batch_size"),
    "patch": (["--patch_size", 5], "patch_size"),
    "removes no patch": (["--mask_ratio", 1e-8], "mask_ratio"),
    "keeps no patch": (["--mask_ratio", 0.999], "mask_ratio"),
    "heads": (["--num_heads", 3], "num_heads"),
    "width": (["--embed_dim", 30, "--num_heads", 3], "embed_dim"),
    "accumulation": (["--batch_size", 24], "total_batch_size"),
    "channels": (["--in_chans", 3], "in_chans"),
    "no config": (["--config", "cfgs/none.yaml"], "config"),
    "unwritable": (unwritable, "output_dir"),
}
if not torch.cuda.is_available():
    REFUSED["cuda absent"] = (["--device", "cuda"], "device")


@pytest.mark.parametrize(("more", "setting"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_before_any_compute(tmp_path, monkeypatch, more, setting):
    monkeypatch.setattr(main_pretrain, "build_model", None)  # a call would be a TypeError
    more = more(tmp_path) if callable(more) else more
    with pytest.raises(InputError) as error:
        main_pretrain.main(digits(tmp_path / "run", *more))
    assert setting in settings(error.value)
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", "2e-3"], "lr: 0.001 -> 0.002"),
        (["--epochs", "3"], "epochs: 2 -> 3"),
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--embed_dim", "48"], "embed_dim: 32 -> 48"),
        (["--mask_ratio", "0.5", "--depth", "3"], "depth: 2 -> 3\n  mask_ratio: 0.75 -> 0.5"),
        pytest.param(
            ["--batch_size", "128", "--total_batch_size", "128"],
            "total_batch_size is now 128 and the run so far has 64",
            marks=pytest.mark.fault("R6"),
        ),
        (["--in_chans", "3", "--mean", "0", "0", "0", "--std", "1", "1", "1"], "in_chans: 1 -> 3"),
    ],
)
def test_a_changed_setting_is_refused_on_resume(finished, change, message):
    folder, arguments, _ = finished
    config = (folder / "config.yaml").read_bytes()
    with pytest.raises(InputError) as error:
        main_pretrain.main([*arguments, *change])
    assert message in str(error.value)
    assert (folder / "config.yaml").read_bytes() == config


def test_changed_images_are_refused_on_resume(tmp_path):
    arguments = digits(
        tmp_path / "run", *few_images(tmp_path), "--batch_size", 16, "--total_batch_size", 16
    )
    main_pretrain.main([*arguments, "--stop_epoch", "1"])
    (tmp_path / "few").rename(tmp_path / "moved")
    arguments[arguments.index("--data_path") + 1] = str(tmp_path / "moved")
    assert (
        main_pretrain.main([*arguments, "--stop_epoch", "1"])["step"] == 2
    )  # the same images elsewhere are fine
    (tmp_path / "moved" / "0.png").unlink()
    with pytest.raises(InputError, match=r"images: .*\b40\b.* -> .*\b39\b"):
        main_pretrain.main(arguments)


@pytest.mark.fault("R22")
@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_a_read_only_output_folder_is_refused(tmp_path):
    if os.geteuid() == 0:  # root may write anywhere, so take a folder that nobody can
        target = Path("/proc/run")
    else:
        target = tmp_path / "locked" / "run"
        target.parent.mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        main_pretrain.main(digits(target))
