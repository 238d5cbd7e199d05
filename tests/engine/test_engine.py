"""Schedule, plan, parameter groups, optimiser step, meters and checkpoint files, against hand
arithmetic."""

import hashlib
import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import checkpoint
from runs import flip_bit, make_pictures, pretraining
from test_models import MAE
from torch import nn
from torch.amp import GradScaler

import engine.loop
import main_pretrain
from engine.meters import StepMeter
from engine.optim import build_adamw, optimizer_step, param_groups, set_lr
from engine.run.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from engine.run.faults import BadSteps
from engine.run.folder import take_over_folder
from engine.run.records import Records
from engine.schedule import Plan, choose_accum_iter, plan_run
from models.mae import MaskedAutoencoder
from util.dist import autocast_dtype
from util.errors import InputError
from util.settings.base import AdamWConfig
from util.settings.pretrain import PretrainConfig


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),  # as in the public code
        (5, 1.0),
        (10, 2.0),  # the peak comes right after the warmup
        (60, 1.25),  # half way: the mean of peak and minimum
        (35, 0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2),
        (110, 0.5),
    ],
)
def test_schedule_by_hand(step, lr):
    plan = Plan(1, 1, 1, total_steps=110, stop_step=110, warmup_steps=10, peak_lr=2.0, min_lr=0.5)
    assert plan.lr(step) == pytest.approx(lr, abs=1e-12)
    assert replace(plan, warmup_steps=0).lr(0) == 2.0  # without a warmup it starts at the peak


def test_plan_by_hand():
    cfg = AdamWConfig(
        batch_size=16, epochs=10, stop_epoch=3, warmup_epochs=1.6, lr=1.5e-4, min_lr=1e-6
    )
    plan = plan_run(cfg, num_images=1000, world_size=2, accum_iter=4)
    steps = (plan.total_batch, plan.steps_per_epoch, plan.total_steps, plan.stop_step)
    assert steps == (128, 7, 70, 21)
    rates = (plan.warmup_steps, plan.peak_lr, plan.min_lr)  # min_lr has the unit of lr
    assert rates == pytest.approx((11.2, 0.75e-4, 0.5e-6))
    assert plan.lr(7) == pytest.approx(0.75e-4 * 7 / 11.2)


def test_a_data_set_smaller_than_one_step_is_refused_with_the_numbers():
    with pytest.raises(
        InputError,
        match=r"has 127 images and one optimiser step takes 128 \(batch_size 16 x 2 processes"
        r" x accum_iter 4\): lower batch_size and total_batch_size",
    ):
        plan_run(AdamWConfig(batch_size=16), num_images=127, world_size=2, accum_iter=4)
    assert plan_run(AdamWConfig(batch_size=16), 128, 2, 4).steps_per_epoch == 1


def saved_run(total_batch: int, accum_iter: int = 1) -> Checkpoint:
    return checkpoint(10, total_batch=total_batch, config={"accum_iter": accum_iter})


@pytest.mark.parametrize(
    ("cfg", "world_size", "saved", "accum_iter"),
    [
        ({"batch_size": 64, "accum_iter": 3}, 2, None, 3),
        ({"batch_size": 64, "total_batch_size": 4096}, 8, None, 8),
        ({"batch_size": 512, "total_batch_size": 4096}, 8, None, 1),
        # a run that goes on keeps its total, on fewer or more processes
        ({"batch_size": 64}, 1, saved_run(128), 2),
        ({"batch_size": 16, "accum_iter": 4}, 2, saved_run(64, accum_iter=4), 2),  # set by hand
        ({"batch_size": 32}, 1, saved_run(64), 2),
    ],
)
def test_accumulation_follows_from_the_total_batch(cfg, world_size, saved, accum_iter):
    assert choose_accum_iter(AdamWConfig(**cfg), world_size, saved) == accum_iter


@pytest.mark.parametrize(
    ("cfg", "world_size", "saved", "setting"),
    [
        ({"batch_size": 60, "total_batch_size": 4096}, 1, None, "total_batch_size"),
        ({"batch_size": 64, "total_batch_size": 128, "accum_iter": 3}, 1, None, "accum_iter"),
        ({"batch_size": 128}, 1, saved_run(64), "batch_size"),
        ({"batch_size": 16}, 3, saved_run(64), "batch_size"),
        ({"batch_size": 64, "accum_iter": 2}, 1, saved_run(64), "accum_iter"),
        ({"batch_size": 64, "total_batch_size": 128}, 1, saved_run(64), "total_batch_size"),
    ],
)
def test_totals_that_do_not_fit_are_refused(cfg, world_size, saved, setting):
    with pytest.raises(InputError) as error:
        choose_accum_iter(AdamWConfig(**cfg), world_size, saved)
    assert setting in error.value.settings


def test_only_matrices_decay():
    model = MaskedAutoencoder(**MAE | {"depth": 1, "decoder_depth": 1})
    groups = param_groups(model, weight_decay=0.05)
    decayed = sorted(
        name for group in groups if group["weight_decay"] == 0.05 for name in group["names"]
    )
    assert decayed == sorted(
        ["patch_embed.proj.weight", "decoder_embed.weight", "decoder_pred.weight"]
        + [
            f"{stack}.0.{layer}.weight"
            for stack in ("blocks", "decoder_blocks")
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]
    )
    undecayed = {
        name for group in groups if group["weight_decay"] == 0.0 for name in group["names"]
    }
    assert undecayed == {name for name, _ in model.named_parameters()} - set(decayed)
    assert {"cls_token", "mask_token", "norm.weight", "blocks.0.norm1.weight"} <= undecayed
    assert {group["lr_scale"] for group in groups} == {1.0}


def adamw_on(parameters: list[nn.Parameter], lr: float = 0.1) -> torch.optim.AdamW:
    optimizer = build_adamw(
        [{"params": parameters, "lr_scale": 1.0, "weight_decay": 0.5}], 0.9, 0.95
    )
    set_lr(optimizer, lr)
    return optimizer


def test_an_adamw_step_by_hand():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw_on([weight])
    weight.grad = torch.tensor([3.0])
    grad_norm, found_inf = optimizer_step(
        optimizer, GradScaler("cpu", enabled=False), clip_grad=None
    )
    # decay 2 * (1 - 0.1 * 0.5), then the first step of Adam is lr * sign(gradient)
    assert weight.item() == pytest.approx(2.0 * 0.95 - 0.1, abs=1e-6)
    assert (grad_norm.item(), found_inf.item()) == (3.0, 0.0)
    assert weight.grad is None
    weight.grad = torch.tensor([-1.0])
    optimizer_step(optimizer, GradScaler("cpu", enabled=False), clip_grad=None)
    first = (0.9 * 0.1 * 3.0 + 0.1 * -1.0) / (1 - 0.9**2)  # bias-corrected first moment
    second = (0.95 * 0.05 * 9.0 + 0.05 * 1.0) / (1 - 0.95**2)
    assert weight.item() == pytest.approx(1.8 * 0.95 - 0.1 * first / math.sqrt(second), abs=1e-6)


def test_clipping_scales_the_whole_gradient_and_reports_the_norm_before():
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    kept = [w.grad for w in weights]
    grad_norm, _ = optimizer_step(
        adamw_on(weights), GradScaler("cpu", enabled=False), clip_grad=1.0
    )
    assert grad_norm.item() == 5.0
    assert [g.item() for g in kept] == pytest.approx([0.6, 0.8], abs=1e-6)


@pytest.mark.fault("R16")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_a_non_finite_gradient_skips_the_step_and_its_count(bad, clip_grad):
    weights = [nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([1.0]))]
    optimizer = adamw_on(weights)
    scaler = GradScaler("cpu", enabled=False)
    for gradient in (1.0, bad):
        before = [w.item() for w in weights]
        weights[0].grad, weights[1].grad = torch.tensor([1.0]), torch.tensor([gradient])
        _, found_inf = optimizer_step(optimizer, scaler, clip_grad)
    assert found_inf.item() == 1.0
    assert [w.item() for w in weights] == before
    assert [optimizer.state[w]["step"].item() for w in weights] == [1.0, 1.0]


@pytest.mark.fault("R17")
def test_the_fp16_scaler_backs_off_and_goes_on():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw_on([weight])
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.sum() * float("inf")).backward()
    _, found_inf = optimizer_step(optimizer, scaler, None)
    assert (weight.item(), found_inf.item(), scaler.get_scale()) == (2.0, 1.0, 512.0)
    scaler.scale(3 * weight.sum()).backward()
    grad_norm, found_inf = optimizer_step(optimizer, scaler, None)
    assert (grad_norm.item(), found_inf.item()) == (
        3.0,
        0.0,
    )  # the norm is that of the unscaled gradient
    assert weight.item() == pytest.approx(1.8, abs=1e-6)


def feed(meter: StepMeter, *steps: tuple[float, float, float]) -> StepMeter:
    """Takes steps of this loss, gradient norm and 1 if that is bad."""
    for step in steps:
        meter.update(*map(torch.tensor, step))
    return meter


BAD, GOOD = (1.0, float("nan"), 1.0), (1.0, 2.0, 0.0)


def test_meter_leaves_bad_steps_out_and_counts_them_in_a_row():
    meter = feed(StepMeter(torch.device("cpu")), (1.0, 10.0, 0.0), BAD, (2.0, 20.0, 0.0))
    feed(meter, (float("inf"), 5.0, 0.0))  # such a loss counts as little
    assert meter.read() == (1.5, 15.0, 1)
    assert math.isnan(feed(meter, *[BAD] * 3).read()[0])
    # a row goes on past a reading, and past a resume
    resumed = StepMeter(torch.device("cpu"))
    resumed.load_state_dict(meter.state_dict())
    assert feed(resumed, BAD, GOOD, BAD).read() == (1.0, 2.0, 4)
    assert feed(resumed, GOOD, BAD).read() == (1.0, 2.0, 1)


# the end of a run after too many bad steps in a row


def bad_steps(path: Path, first: int, *bad: int) -> BadSteps:
    """Limit 3, after steps from `first` on; step s took images 2 s and 2 s + 1 at lr s / 100."""
    sampler = SimpleNamespace(images=lambda step: [2 * step, 2 * step + 1])
    steps = BadSteps(path, limit=3, window=20, is_main=True, sampler=sampler)
    for step, is_bad in enumerate(bad, start=first):
        steps.add(step, step / 100, torch.tensor(1.0), torch.tensor(float(is_bad)))
    return steps


@pytest.mark.fault("R16")
@pytest.mark.parametrize(
    ("first", "bad", "most", "written"),
    [
        (1, (0, 1, 1, 1, 0, 1), 3, [2, 3, 4, 6]),
        (7, (1, 1, 1, 1), 4, [7, 8, 9, 10]),
        (7, (1, 1, 0, 1), 9, [7, 8, 10]),
        (7, (0, 1, 0), 5, [8]),
    ],
    ids=["ended", "goes on", "began before a resume", "ended before a resume"],
)
def test_the_error_names_a_bad_step_and_the_file_that_has_all(tmp_path, first, bad, most, written):
    path = tmp_path / "bad_steps.jsonl"
    with pytest.raises(InputError, match=rf"^{most} steps in a row .* set clip_grad") as error:
        bad_steps(path, first, *bad).check(most)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries == [
        {"step": s, "lr": s / 100, "loss": 1.0, "images": [2 * s, 2 * s + 1], "process": 0}
        for s in written
    ]
    for named in (entries[0], path):
        assert str(named) in str(error.value)


def test_fewer_than_the_limit_are_no_error(tmp_path):
    bad_steps(tmp_path / "bad_steps.jsonl", 1, 1, 1, 0).check(2)
    assert list(tmp_path.iterdir()) == []


def spoil(monkeypatch, bad: range) -> None:
    """Fills the gradients of the steps `bad` of this process, counted from 1, with infinity."""
    taken = []

    def step_fn(*args, original=engine.loop.optimizer_step, **kwargs):
        taken.append(None)
        for group in args[0].param_groups if len(taken) in bad else ():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        return original(*args, **kwargs)

    monkeypatch.setattr(engine.loop, "optimizer_step", step_fn)


@pytest.mark.fault("R16")
def test_a_row_that_ends_between_two_lines_of_the_log_ends_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, range(4, 9))
    arguments = pretraining(
        make_pictures(tmp_path / "pictures"), tmp_path / "run", "--log_interval", 10
    )
    with pytest.raises(InputError, match=r"^5 steps in a row had .*'step': 4, 'lr': "):
        main_pretrain.main([*arguments, "--max_bad_steps", "5"])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.fault("R16")
def test_a_row_across_a_resume_ends_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, range(8, 13))
    more = ["--log_interval", 10, "--max_bad_steps", 5]
    arguments = pretraining(make_pictures(tmp_path / "pictures"), tmp_path / "run", *more)
    main_pretrain.main([*arguments, "--stop_epoch", "1"])
    expected = r"^5 steps in a row had .*'step': 11, 'lr': "
    with pytest.raises(InputError, match=expected):
        main_pretrain.main(arguments)


# checkpoint files


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "100 bytes": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one bit": flip_bit,
    "no checksum": lambda path: path.with_name(path.name + ".sha256").unlink(),
    "empty checksum": lambda path: path.with_name(path.name + ".sha256").write_bytes(b""),
}


@pytest.mark.fault("R8")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    older = save_checkpoint(tmp_path, checkpoint(1, model={"w": torch.ones(100)}), keep_last=5)
    newest = save_checkpoint(tmp_path, checkpoint(2, model={"w": torch.zeros(100)}), keep_last=5)
    damage(newest)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert load_newest_checkpoint(tmp_path).step == 1
    reason = rf"(.*No such file .*{newest.name}(\.sha256)?'|its sha256 does not agree)"
    assert re.search(rf"passing over the damaged checkpoint {newest}: {reason}", caplog.text)
    damage(older)
    with pytest.raises(InputError, match="every checkpoint in .* is damaged"):
        load_newest_checkpoint(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after.get(name)} <= {
        older.name,
        f"{older.name}.sha256",
    }


@pytest.mark.fault("R7", "R8")
def test_a_checksum_alone_is_damage_unless_a_first_save_was_cut_off(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, checkpoint(1, model={}), keep_last=5)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=rf"is damaged \({path.name}: .*No such file"):
        load_newest_checkpoint(tmp_path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    assert load_newest_checkpoint(tmp_path) is None

    def killed(path, missing_ok=False, original=Path.unlink):
        original(path, missing_ok)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        take_over_folder(tmp_path, PretrainConfig(), 0, set())
    assert load_newest_checkpoint(tmp_path) is None  # wherever it is cut off in its turn
    take_over_folder(tmp_path, PretrainConfig(), 0, set())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


class Trace:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


FOREIGN = {
    "malicious": lambda path: path.write_bytes(
        pickle.dumps(Trace(path.with_name("trace")), protocol=2)
    ),
    "malicious zip": lambda path: torch.save(
        {"format_version": 2, "x": Trace(path.with_name("trace"))}, path
    ),
    "malicious old": lambda path: torch.save(
        {"format_version": 2, "x": Trace(path.with_name("trace"))},
        path,
        _use_new_zipfile_serialization=False,
    ),
    "text": lambda path: path.write_text("not a checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: torch.save([1], path),
    "other dict": lambda path: torch.save({"model": {}}, path),
}


@pytest.mark.fault("R8")
@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_no_checkpoint_is_passed_over_though_its_checksum_fits(
    tmp_path, caplog, write
):
    save_checkpoint(tmp_path, checkpoint(1, model={}), keep_last=5)
    newest = tmp_path / "checkpoint-00000002.pth"
    write(newest)
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()
    newest.with_name(newest.name + ".sha256").write_text(f"{digest}  {newest.name}\n")
    assert load_newest_checkpoint(tmp_path).step == 1
    reason = r"it is no checkpoint of a run \(\w+\)"
    (message,) = caplog.messages
    assert re.fullmatch(rf"passing over the damaged checkpoint {newest}: {reason}", message)
    (tmp_path / "checkpoint-00000001.pth").unlink()
    with pytest.raises(
        InputError, match=rf"is damaged \({newest.name}: {reason}; checkpoint-00000001.pth: "
    ):
        load_newest_checkpoint(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_what_cannot_be_read_is_passed_over_as_well(tmp_path, caplog):
    save_checkpoint(tmp_path, checkpoint(1, model={}), keep_last=5)
    newest = save_checkpoint(tmp_path, checkpoint(2, model={}), keep_last=5)
    newest.unlink()
    newest.mkdir()
    assert load_newest_checkpoint(tmp_path).step == 1
    assert f"{newest}: [Errno 21] Is a directory" in caplog.text


def test_a_disk_that_is_full_when_a_line_is_logged_is_one_clear_line(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    records = Records(tmp_path, is_main=True)
    with pytest.raises(InputError, match="log.jsonl cannot be written: No space left on device"):
        records.write("epoch", 1, {"loss": 0.5}, "epoch 1")


@pytest.mark.parametrize(
    "able, expected",
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, None),
        ({"avx512_bf16": True, "avx512_fp16": True}, None),
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, torch.bfloat16),
        (None, None),
    ],
)
def test_auto_precision_of_a_cpu_is_bf16_only_where_that_is_known_to_be_fast(
    able, expected, monkeypatch
):
    """torch 2.9 cannot tell what a CPU can do; a virtual machine may hide the matrix unit."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if able is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert autocast_dtype("auto", torch.device("cpu")) == expected
