"""A run's folder holds what the run made: nothing else in it is removed or overwritten (R27), and
its log is complete though nobody reads the terminal (R31)."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from compare import checkpoint, identity
from conftest import ROOT
from runs import changed_files, command, digits, environment, files_of
from torch import nn

from engine.run.checkpoint import save_checkpoint, save_weights
from engine.run.folder import open_run, take_over_folder
from engine.run.records import Records, drop_records, read_log
from util.errors import InputError
from util.settings.evaluation import FinetuneConfig, KnnConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import dump_config

RESULT = json.dumps({"protocol": "fine-tuning", "acc1": 50.0})


def config(stage: type, folder: Path, **more):
    return stage(output_dir=str(folder), device="cpu", **more)


def killed_run(folder: Path) -> FinetuneConfig:
    """Makes `folder` that of a fine-tuning that was killed before its first checkpoint, after the
    evaluation of epoch 1."""
    cfg = config(FinetuneConfig, folder)
    take_over_folder(folder, cfg, 0, set())
    records = Records(folder, is_main=True)
    records.write("train", 5, {"epoch": 0.5, "loss": 1.0}, "step 5")
    records.write("val", 10, {"epoch": 1.0, "acc1": 50.0}, "epoch 1")
    save_weights(folder / "best.safetensors", nn.Linear(2, 2), identity(), acc1=50.0, epoch=1)
    (folder / "tb").mkdir()
    return cfg


@pytest.mark.fault("R27")
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "best.safetensors", "results.json", "config.yaml", "log.jsonl", "tb"],
)
def test_a_run_does_not_begin_beside_files_of_others(tmp_path, name):
    if name == "tb":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("lr: 0.1\n")
    before = files_of(tmp_path)
    for stage in (PretrainConfig, FinetuneConfig):
        with pytest.raises(InputError) as error, open_run(config(stage, tmp_path)):
            pass
        assert name in str(error.value) and "\n" not in str(error.value)
        assert error.value.settings == ("output_dir",)
    assert files_of(tmp_path) == before


@pytest.mark.fault("R27")
@pytest.mark.parametrize("kept", ["model.safetensors", "results.json", "best.safetensors"])
def test_a_finished_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path, kept):
    """Neither beside all of its files, nor beside one result without its log."""
    cfg = killed_run(tmp_path)
    (tmp_path / "results.json").write_text(RESULT)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "best.safetensors").read_bytes())
    for _ in range(2):
        before = files_of(tmp_path)
        with pytest.raises(InputError, match=kept), open_run(cfg):
            pass
        assert not changed_files(tmp_path, before)
        for name in ("model.safetensors", "results.json", "best.safetensors", "log.jsonl"):
            if name != kept:
                (tmp_path / name).unlink(missing_ok=True)


@pytest.mark.fault("R27")
def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    cfg = killed_run(tmp_path)
    with open_run(cfg):
        take_over_folder(tmp_path, cfg, 0, set())
    assert not (tmp_path / "best.safetensors").exists()
    assert read_log(tmp_path / "log.jsonl") == []


@pytest.mark.fault("R27")
def test_a_run_goes_on_beside_its_own_results(tmp_path):
    """It removes those of an earlier stop, and keeps its best weights."""
    cfg = killed_run(tmp_path)
    (tmp_path / "results.json").write_text(RESULT)
    save_checkpoint(tmp_path, checkpoint(10), keep_last=1)
    with open_run(cfg):
        take_over_folder(tmp_path, cfg, 10, {"val"})
    assert (tmp_path / "best.safetensors").exists()
    assert not (tmp_path / "results.json").exists()
    assert [record["kind"] for record in read_log(tmp_path / "log.jsonl")] == ["train"]


@pytest.mark.fault("R27")
def test_the_weights_to_start_from_are_never_overwritten(tmp_path):
    """Not even in a folder whose checkpoint would let the run go on."""
    folder = tmp_path / "w"
    folder.mkdir()
    save_checkpoint(folder, checkpoint(10), keep_last=1)
    weights = save_weights(folder / "model.safetensors", nn.Linear(2, 2), identity())
    before = files_of(folder)
    for finetune in (weights, folder, folder / "checkpoint-00000010.pth", tmp_path / "w/../w"):
        cfg = config(FinetuneConfig, folder, finetune=str(finetune))
        with pytest.raises(InputError, match="finetune"), open_run(cfg):
            pass
    assert files_of(folder) == before
    with open_run(config(FinetuneConfig, tmp_path / "elsewhere", finetune=str(weights))):
        pass


@pytest.mark.fault("R27", "R7")
def test_only_own_unfinished_files_are_removed(tmp_path):
    names = ["checkpoint-00000007.pth.tmp", "checkpoint-00000007.pth.sha256.tmp"]
    names += ["config.yaml.tmp", "model.safetensors.tmp", "best.safetensors.tmp"]
    others = ["notes.tmp", "checkpoint-7.pth.tmp", "model.pth", "x.safetensors.tmp"]
    for name in names + others:
        (tmp_path / name).write_bytes(b"half")
    take_over_folder(tmp_path, PretrainConfig(), 0, set())
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", *others}


EVALUATIONS = [
    (KnnConfig, {}, "results.json", "k-NN, cosine, temperature 0.07"),
    (FinetuneConfig, {"eval": True}, "eval.json", "evaluation"),
]


@pytest.mark.fault("R27")
@pytest.mark.parametrize(("stage", "more", "name", "protocol"), EVALUATIONS)
def test_an_evaluation_overwrites_only_results_of_its_own_kind(
    tmp_path, stage, more, name, protocol
):
    cfg = config(stage, tmp_path, finetune="w.pth", **more)
    for content in (RESULT, "[1]", "not JSON", '{"protocol": null}'):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name), open_run(cfg):
            pass
        assert (tmp_path / name).read_text() == content
    (tmp_path / name).write_text(json.dumps({"protocol": protocol}))
    for other in ("model.safetensors", "log.jsonl"):
        (tmp_path / other).write_text("of others")
    with open_run(cfg):
        pass
    assert (tmp_path / "log.jsonl").read_text() == "of others"


def test_records_past_a_step_and_pending_ones_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [
        {"kind": kind, "step": step, "loss": loss}
        for step, kind, loss in [
            (9, "train", 0.1),
            (10, "train", 1 / 3),
            (10, "epoch", None),
            (10, "val", 2.5),
            (10, "monitor", 1e-9),
            (11, "train", 0.3),
        ]
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    for pending, kept in [(set(), 5), ({"val"}, 4), ({"val", "monitor"}, 3)]:
        path.write_text(text + '{"kind": "tra')
        drop_records(path, 10, pending)
        found = read_log(path)
        assert len(found) == kept and all(record in records for record in found)
        assert not pending & {record["kind"] for record in found}
    drop_records(path, 0, set())
    assert path.read_text() == ""


def test_the_settings_of_a_folder_are_those_of_its_command(tmp_path):
    cfg = config(PretrainConfig, tmp_path, lr=0.5)
    take_over_folder(tmp_path, cfg, 0, set())
    assert (tmp_path / "config.yaml").read_text() == dump_config(cfg)


# R31: the terminal


@pytest.mark.fault("R31")
@pytest.mark.parametrize("stdout", ["none", "closed", "broken pipe"])
def test_lines_that_nobody_reads_are_dropped(tmp_path, stdout):
    """In a process of its own, whose standard output ends before its first line."""
    script = f"""
import os, sys, logging
from pathlib import Path
from engine.run.records import logging_to
if {stdout!r} == "closed":
    sys.stdout.close()
elif {stdout!r} == "none":
    sys.stdout = None
with logging_to(Path({str(tmp_path / "log.txt")!r})):
    for number in range(3):
        logging.getLogger("x").info("line %d", number)
"""
    pipe = subprocess.PIPE if stdout == "broken pipe" else subprocess.DEVNULL
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=pipe,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    ) as process:
        if process.stdout is not None:
            process.stdout.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == (b"", 0)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["line 0", "line 1", "line 2"]


@pytest.mark.fault("R31")
@pytest.mark.long
@pytest.mark.parametrize("ending", [">&- 2>&-", "2>&1 | head -1"])
def test_a_run_goes_on_without_a_terminal(tmp_path, ending):
    arguments = " ".join(command(*digits(tmp_path, "--epochs", 1, "--warmup_epochs", 0)))
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {arguments} {ending}"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) <= 1 and result.stderr == ""
    assert "epoch 1 done" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "model.safetensors").exists()


def test_a_line_is_on_the_terminal_once_and_in_the_file(tmp_path, capsys):
    with open_run(config(KnnConfig, tmp_path, finetune="random")):
        logging.getLogger("x").info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "log.txt").read_text().count("hello") == 1
