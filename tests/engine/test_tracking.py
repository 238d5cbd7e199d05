"""The setting `track`: what Weights & Biases and MLflow get of a run, read back from the files that
they keep without a network."""

import getpass
import importlib.util
import json
import logging
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import (
    Cut,
    cut_after,
    launch,
    log_lines,
    pictures,
    pretrain_pictures,
    pretraining,
    results_of,
    run,
)

import main_finetune
import main_knn
import main_pretrain
from engine.run import tracking
from engine.run.records import Records
from util.errors import InputError

Rows = dict[tuple[str, int], list[float]]  # name and step -> values, several if they are doubled
UNSENT = "of the environment"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path) -> None:
    """No service is reached, and no account of the user's is found."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SOME_VARIABLE", UNSENT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "ALLOW_FILE_STORE"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


def wandb_records(folder: Path) -> list[Any]:
    """The records of all offline runs in a folder, in their order, once W&B's own process has
    written the last ones."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    for _ in range(100):
        runs = [[*records_of(path)] for path in files]
        if all(any(record.HasField("exit") for record in records) for records in runs):
            return [record for records in runs for record in records]
        time.sleep(0.1)
    raise TimeoutError(f"a run in {folder} has no end")


def records_of(path: Path) -> Iterator[Any]:
    """The records of a file that may still be written.

    A file has a head of 7 bytes, then blocks of 32 KiB with pieces of records, as in LevelDB's log
    format (https://github.com/google/leveldb/blob/main/doc/log_format.md).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, piece = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no head fits into the rest of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        piece += content[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(content):
            return
        if kind in (1, 4):  # complete, or the last piece
            record = Record()
            record.ParseFromString(piece)
            piece = b""
            yield record


def of_wandb(folder: Path) -> Rows:
    rows: Rows = {}
    for record in wandb_records(folder):
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for name in items.keys() - {"step"}:
            if not name.startswith("_"):
                place = (name, int(items["step"]))
                rows.setdefault(place, []).append(json.loads(items[name]))
    return rows


def of_mlflow(folder: Path) -> Rows:
    from mlflow import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # as a run does, which may be another process
    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    rows: Rows = {}
    for found in client.search_runs([client.get_experiment_by_name("mae").experiment_id]):
        for name in found.data.metrics:
            for metric in client.get_metric_history(found.info.run_id, name):
                rows.setdefault((name, metric.step), []).append(metric.value)
    return rows


def logged(folder: Path) -> Rows:
    """What the services should have of a run's log."""
    return {
        (f"{record['kind']}/{name}", record["step"]): [value]
        for record in log_lines(folder)
        for name, value in record.items()
        if name not in ("kind", "step", "epoch")
    }


def without_final(rows: Rows) -> Rows:
    return {place: values for place, values in rows.items() if not place[0].startswith("final/")}


READERS = {"wandb": of_wandb, "mlflow": of_mlflow}
BOTH = pytest.mark.parametrize("service", READERS)


@BOTH
def test_a_service_has_the_scalars_of_the_log_once_after_a_cut(
    service, tmp_path, data, monkeypatch
):
    """The cut run was past its checkpoint, which is that of step 10, and its record goes on."""
    arguments = pretraining(data, tmp_path, "--track", service, "--monitor_epochs", 1)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 14)
        main_pretrain.main(arguments)
    before = READERS[service](tmp_path)
    assert max(step for _, step in before) == 14
    state = json.loads((tmp_path / "tracking.json").read_text())
    main_pretrain.main(arguments)
    found, expected = READERS[service](tmp_path), logged(tmp_path)
    kinds = {name.split("/")[0] for name, _ in expected}
    assert kinds == {"train", "epoch", "monitor"}
    # times differ in the steps that were taken twice, whose first values stay
    timed = {f"train/{name}" for name in ("images_per_s", "data_wait", "eta_s")}
    assert without_final(found).keys() == expected.keys()
    assert all(len(values) == 1 for values in found.values())
    for place, values in expected.items():
        if place[0] not in timed or place[1] not in range(11, 15):
            assert found[place] == values, place
    assert found["final/loss", 20] == expected["epoch/epoch_loss", 20]
    assert json.loads((tmp_path / "tracking.json").read_text())["id"] == state["id"]
    assert main_pretrain.main(arguments)["step"] == 20  # a finished run is left alone
    assert READERS[service](tmp_path) == found


@BOTH
def test_a_copy_of_a_folder_and_another_service_have_records_of_their_own(
    service, tmp_path, data, monkeypatch
):
    """The original, a copy, and a copy that is tracked by the other service all go on."""
    other = next(name for name in READERS if name != service)
    folders = {"one": service, "copy": service, "other": other}
    arguments = pretraining(data, tmp_path / "one", "--track", service)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 14)
        main_pretrain.main(arguments)
    for name in ("copy", "other"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    first = json.loads((tmp_path / "one" / "tracking.json").read_text())["id"]
    ids = []
    for name, by in folders.items():
        main_pretrain.main([*arguments, "--output_dir", str(tmp_path / name), "--track", by])
        ids.append(json.loads((tmp_path / name / "tracking.json").read_text())["id"])
    assert ids[0] == first and len(set(ids)) == 3
    assert all(len(values) == 1 for values in READERS[service](tmp_path / "one").values())
    assert min(step for _, step in READERS[other](tmp_path / "other")) == 11


def test_nothing_but_scalars_settings_and_the_name_is_sent(tmp_path, data):
    folder = pretrain_pictures(data, tmp_path / "pretrain" / "one", "--track", "wandb")
    records = wandb_records(folder)
    (begun,) = [record.run for record in records if record.HasField("run")]
    assert (begun.project, begun.display_name) == ("mae", "pretrain/one")
    sent = {item.key: json.loads(item.value_json) for item in begun.config.update}
    settings = {name: value for name, value in sent.items() if name != "_wandb"}
    assert settings["mask_ratio"] == 0.75 and settings["dataset"] == "folder"
    assert settings.keys() == main_pretrain.PretrainConfig.model_fields.keys()
    assert (begun.host, begun.git.commit, begun.git.remote_url) == ("", "", "")
    kinds = {record.WhichOneof("record_type") for record in records}
    assert not kinds & {"stats", "output", "output_raw", "artifact", "environment"}
    assert [f.path for record in records for f in record.files.files] in (
        [],
        ["wandb-summary.json"],
    )
    content = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))
    for text in (UNSENT, "main_pretrain", f"{getpass.getuser()}@"):
        assert text.encode() not in content
    files = [path.name for path in folder.glob("wandb/offline-run-*/files/*")]
    assert not {"requirements.txt", "wandb-metadata.json", "output.log", "diff.patch"} & {*files}


def test_mlflow_has_settings_and_whether_a_run_came_to_its_end(tmp_path, data, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
    for steps in (3, 100):
        with monkeypatch.context() as patch:
            cut_after(patch, steps)
            try:
                pretrain_pictures(data, tmp_path / "one", "--track", "mlflow")
            except Cut:
                assert steps == 3
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    # cut before the first checkpoint: the run began again, with a record of its own
    assert [one.info.status for one in found] == ["FINISHED", "KILLED"]
    assert found[0].data.params["mask_ratio"] == "0.75"
    assert {*found[0].data.tags} == {"mlflow.runName"} and found[0].info.user_id == "unknown"
    assert not (tmp_path / "one" / "mlruns").exists()


@BOTH
def test_evaluations_without_training_send_their_results(service, tmp_path, data, weights):
    for name in ("knn", "eval"):
        arguments = ["--finetune", weights, "--track", service]
        if name == "knn":
            main_knn.main(pictures(data, tmp_path / name, *arguments, training=False))
        else:
            trained = ["--finetune", weights, "--epochs", 1, "--lr", 1e-3, "--track", service]
            main_finetune.main(pictures(data, tmp_path / name, *trained))
            state = (tmp_path / name / "tracking.json").read_bytes()
            model = tmp_path / name / "model.safetensors"
            again = ["--finetune", model, "--eval", "--track", service]
            main_finetune.main(pictures(data, tmp_path / "eval", *again))
            assert (tmp_path / name / "tracking.json").read_bytes() == state
    assert READERS[service](tmp_path / "knn") == {
        ("final/acc1", 0): [results_of(tmp_path / "knn")["acc1"]]
    }
    found = READERS[service](tmp_path / "eval")
    results = results_of(tmp_path / "eval")
    assert found["final/acc1", 10] == [results["acc1"]] == found["val/acc1", 10]
    assert found["final/acc1", 0] == [results_of(tmp_path / "eval", "eval.json")["acc1"]]


@BOTH
@pytest.mark.parametrize("method", ["__init__", "log", "close"])
def test_a_service_that_fails_never_ends_a_run(
    service, method, tmp_path, data, monkeypatch, caplog
):
    """One warning, and the same losses."""
    calls = []

    def fails(self, *arguments):
        calls.append(arguments)
        raise ConnectionError("the network\nis down")

    monkeypatch.setattr(tracking.SERVICES[service], method, fails)
    with caplog.at_level(logging.WARNING):
        pretrain_pictures(data, tmp_path / "tracked", "--track", service)
    said = [r.getMessage() for r in caplog.records if service in r.getMessage()]
    assert len(said) == len(calls) == 1 and "network\\nis down" in said[0]
    pretrain_pictures(data, tmp_path / "plain")
    losses = [[r.get("loss") for r in log_lines(tmp_path / n)] for n in ("tracked", "plain")]
    assert losses[0] == losses[1] and len(losses[0]) == 22


def test_a_server_that_is_not_there_is_a_warning(tmp_path, data, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    pretrain_pictures(data, tmp_path, "--track", "mlflow")
    assert sum("mlflow failed" in record.getMessage() for record in caplog.records) == 1
    assert "secret" not in (tmp_path / "log.txt").read_text()


@BOTH
def test_numbers_that_are_not_finite_and_names_that_are_no_utf8_pass(service, tmp_path, caplog):
    """A folder with such a name is one that W&B refuses, with a warning."""
    caplog.set_level("INFO")
    cfg = main_knn.KnnConfig(track=service, data_path="caf\udce9")
    records = Records(tmp_path, is_main=True)
    records.track(cfg)
    records.write("train", 1, {"loss": math.nan, "lr": 1.5}, "")
    records.close()
    found = READERS[service](tmp_path)
    assert found["train/lr", 1] == [1.5] and math.isnan(float(found["train/loss", 1][0]))
    (tmp_path / "caf\udce9").mkdir()
    records = Records(tmp_path / "caf\udce9", is_main=True)
    records.track(cfg)
    records.write("train", 1, {"lr": 1.5}, "")
    records.close()
    assert caplog.text.encode()  # is text of a log, in UTF-8


@BOTH
def test_an_extra_that_is_not_installed_is_one_line(service, tmp_path, monkeypatch):
    original = importlib.util.find_spec
    for spec in (None, importlib.util.spec_from_loader(service, None)):  # the second is a folder
        monkeypatch.setattr(
            "util.settings.base.find_spec", lambda name, s=spec: s if name == service else original
        )
        with pytest.raises(InputError, match=rf"pip install -e \.\[{service}\]") as error:
            main_pretrain.read_pretrain(["--dataset", "mnist5k", "--track", service])
        assert error.value.settings == ("track",)
    assert main_pretrain.read_pretrain(["--dataset", "mnist5k", "--track", "none"]).track is None


@pytest.mark.long
def test_without_tracking_no_service_is_imported(tmp_path, data):
    script = "import sys, main_pretrain; main_pretrain.main(sys.argv[1:]); print(*sys.modules)"
    arguments = pretraining(data, tmp_path / "out", "--tensorboard", "true")
    done = run([sys.executable, "-c", script, *arguments])
    modules = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "tensorboard" in modules and modules.isdisjoint(READERS), done.stderr


@BOTH
@pytest.mark.long
def test_of_several_processes_the_main_one_alone_sends(service, tmp_path, data):
    done = launch(pretraining(data, tmp_path, "--track", service), 2)
    assert done.returncode == 0, done.stderr
    assert without_final(READERS[service](tmp_path)) == logged(tmp_path)
