"""A run's folder holds what the run made: nothing else in it is removed or overwritten (R27), and
its log is complete though nobody reads the terminal (R31)."""

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import checkpoint, identity
from runs import changed_files, command, digits, files_of, in_child, run
from torch import nn

from engine.run.checkpoint import save_checkpoint, save_weights
from engine.run.folder import Run, open_run, take_over_folder
from engine.run.records import Records, drop_records, logging_to, read_log, write_log
from util.dist import Processes
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


def refused(cfg, match: str) -> None:
    """Its command is refused with one line, and nothing in its folder is touched."""
    before = files_of(Path(cfg.output_dir))
    with pytest.raises(InputError, match=match) as error, open_run(cfg):
        pass
    assert error.value.settings == ("output_dir",) and "\n" not in str(error.value)
    assert changed_files(Path(cfg.output_dir), before) <= {".lock"}


@pytest.mark.fault("R27")
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "best.safetensors", "results.json", "config.yaml", "log.jsonl", "tb/x"],
)
def test_a_run_does_not_begin_beside_files_of_others(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("lr: 0.1\n")
    for stage in (PretrainConfig, FinetuneConfig):
        refused(config(stage, tmp_path), name.split("/")[0])


@pytest.mark.fault("R27")
@pytest.mark.parametrize("kept", ["model.safetensors", "results.json", "best.safetensors"])
def test_a_finished_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path, kept):
    """Neither beside all of its files, nor beside one result without its log."""
    cfg = killed_run(tmp_path)
    (tmp_path / "results.json").write_text(RESULT)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "best.safetensors").read_bytes())
    refused(cfg, "model.safetensors, results.json")
    for name in {"model.safetensors", "results.json", "best.safetensors", "log.jsonl"} - {kept}:
        (tmp_path / name).unlink()
    refused(cfg, kept)


@pytest.mark.fault("R27")
def test_a_config_of_another_version_is_own_and_one_of_another_stage_is_not(tmp_path):
    text = dump_config(config(PretrainConfig, tmp_path)).replace("seed:", "one_more: 0\nothers:")
    (tmp_path / "config.yaml").write_text(text)
    refused(config(FinetuneConfig, tmp_path), "config.yaml")
    with open_run(config(PretrainConfig, tmp_path)):
        pass


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
def test_predictions_of_others_beside_a_checkpoint_are_not_removed(tmp_path):
    """An earlier version wrote none, so they may be the user's."""
    cfg = killed_run(tmp_path)
    save_checkpoint(tmp_path, checkpoint(10), keep_last=1)
    (tmp_path / "predictions.npz").write_bytes(b"mine")
    refused(cfg, "predictions.npz")
    (tmp_path / "predictions.npz").write_bytes(b"PK of_truth.npy")
    with open_run(cfg):
        take_over_folder(tmp_path, cfg, 10, {"val"})
    assert not (tmp_path / "predictions.npz").exists()


@pytest.mark.fault("R27")
def test_the_weights_to_start_from_are_never_overwritten(tmp_path):
    """Not even in a folder whose checkpoint would let the run go on."""
    folder = tmp_path / "w"
    folder.mkdir()
    save_checkpoint(folder, checkpoint(10), keep_last=1)
    weights = save_weights(folder / "model.safetensors", nn.Linear(2, 2), identity())
    for finetune in (weights, folder, folder / "checkpoint-00000010.pth", tmp_path / "w/../w"):
        refused(config(FinetuneConfig, folder, finetune=str(finetune)), "finetune")
    with open_run(config(FinetuneConfig, tmp_path / "elsewhere", finetune=str(weights))):
        pass


@pytest.mark.fault("R27", "R7")
def test_only_own_unfinished_files_are_removed(tmp_path):
    names = ["checkpoint-00000007.pth.tmp", "checkpoint-00000007.pth.sha256.tmp"]
    names += ["config.yaml.tmp", "model.safetensors.tmp", "best.safetensors.tmp"]
    others = ["notes.tmp", "checkpoint-7.pth.tmp", "model.pth", "x.safetensors.tmp"]
    for name in names + others:
        (tmp_path / name).write_bytes(b"half")
    take_over_folder(tmp_path, cfg := PretrainConfig(lr=0.5), 0, set())
    assert (tmp_path / "config.yaml").read_text() == dump_config(cfg)
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
        refused(cfg, name)
    (tmp_path / name).write_text(json.dumps({"protocol": protocol}))
    for other in ("model.safetensors", "log.jsonl"):
        (tmp_path / other).write_text("of others")
    with open_run(cfg):
        pass
    assert (tmp_path / "log.jsonl").read_text() == "of others"


@pytest.mark.parametrize(
    ("step", "pending", "kept"),
    [(10, set(), 5), (10, {"val"}, 4), (10, {"val", "monitor"}, 3), (0, set(), 0)],
)
def test_records_past_a_step_and_pending_ones_are_dropped(tmp_path, step, pending, kept):
    kinds = ["train", "train", "epoch", "monitor", "val", "train"]
    losses = zip((9, 10, 10, 10, 10, 11), kinds, (0.1, 1 / 3, None, 1e-9, 2.5, 0.3), strict=True)
    records = [{"kind": kind, "step": at, "loss": loss} for at, kind, loss in losses]
    path = tmp_path / "log.jsonl"
    write_log(path, records)
    with path.open("a") as file:
        file.write('{"kind": "tra')
    drop_records(path, step, pending)
    assert read_log(path) == [r for r in records if r["kind"] not in pending][:kept]


# R31: the terminal


@pytest.mark.fault("R31")
@pytest.mark.parametrize("stdout", ["none", "closed", "broken pipe"])
def test_lines_that_nobody_reads_are_dropped(tmp_path, stdout):
    """In a process of its own, whose standard output ends before its first line."""

    def logged():
        out, into = os.pipe()
        os.close(out)
        sys.stdout = None if stdout == "none" else os.fdopen(into, "w")
        if stdout == "closed":
            sys.stdout.close()
        with logging_to(tmp_path / "log.txt"):
            for number in range(3):
                logging.getLogger("x").info("line %d", number)
        if sys.stdout is not None:
            sys.stdout.close()  # as at the end of a process

    assert in_child(logged) == 0
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["line 0", "line 1", "line 2"]


@pytest.mark.fault("R31")
@pytest.mark.long
@pytest.mark.parametrize("ending", [">&- 2>&-", "2>&1 | head -1"])
def test_a_run_goes_on_without_a_terminal(tmp_path, ending):
    arguments = command(*digits(tmp_path, "--epochs", 1, "--warmup_epochs", 0))
    result = run(["bash", "-c", f"set -o pipefail; {' '.join(arguments)} {ending}"])
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) <= 1 and result.stderr == ""
    assert "epoch 1 done" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "model.safetensors").exists()


def test_a_line_is_on_the_terminal_once_and_in_the_file(tmp_path, capsys):
    with open_run(config(KnnConfig, tmp_path, finetune="random")):
        logging.getLogger("x").info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "log.txt").read_text().count("hello") == 1


def test_a_log_that_is_none_is_of_others(tmp_path):
    cfg = PretrainConfig(data_path="x", output_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(dump_config(cfg))
    (tmp_path / "log.jsonl").write_bytes(b"[]\n\xff\n")
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(InputError, match="best.safetensors"), open_run(cfg):
        pass


def test_a_figure_that_is_not_finite_is_no_curve(tmp_path):
    """TensorBoard takes none."""
    seen: list[dict] = []
    records = SimpleNamespace(write_settings=seen.append)
    run = Run(tmp_path, Processes(0, 1, 0, 1, torch.device("cpu")), records)
    results = run.finish({"acc1": 0.0, "loss": None})
    assert results == {"acc1": 0.0, "loss": None} and seen == [{"final/acc1": 0.0}]
