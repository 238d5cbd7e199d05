"""`tools/plot_run.py`: curves of several runs, and a page about each; and the overview picture of
the README."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import log_lines, pictures, pretrain_pictures, results_of

import main_knn
from engine.pictures.drawing import write_png
from tools import plot_run
from util.errors import InputError

ONE = {"step": 1, "epoch": 1.0, "loss": 0.5, "kind": "train"}
TWO = {"step": 2, "epoch": 2.0, "loss": 0.4, "kind": "train"}


def log(folder: Path, *records: dict[str, object]) -> Path:
    """A run's folder with nothing but a log."""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def page_of(*folders: Path) -> str:
    """The page of the first run."""
    return plot_run.main([str(folder) for folder in folders])["reports"][0].read_text()


def note_of(page: str) -> str:
    """How far a page says that its run is."""
    return re.search(r'<div class="note">(.*)', page)[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """A folder with a monitored run, and k-NN evaluations of its weights and of untrained ones."""
    folder = tmp_path_factory.mktemp("runs") / "output"  # the page shows evaluations nearby
    pretrain_pictures(data, folder / "pretrain", "--monitor_epochs", 1, "--monitor_images", 2)
    weights = folder / "pretrain" / "model.safetensors"
    for name, source in (("knn", weights), ("knn_untrained", "random")):
        main_knn.main(pictures(data, folder / name, "--finetune", source, training=False))
    return folder


def test_a_browser_shows_the_page_from_disk(finished, browser):
    """Figures, decoded pictures and tables are there, and the console has no errors."""
    made = plot_run.main([str(finished / "pretrain")])
    assert made["curves"] == finished / "pretrain" / "curves.png"
    (page,) = made["reports"]
    last = {k: v for record in log_lines(finished / "pretrain") for k, v in record.items()}
    browser.goto(page.as_uri())
    looks = browser.evaluate(
        "[...document.images].map(image => [image.naturalWidth, image.naturalHeight])"
    )
    size = Image.open(page.parent / "monitor.png").size
    assert [*map(tuple, looks)] == [size] * 3  # before, and after each of two epochs
    assert browser.locator("#curves svg").count() == 10  # memory among them
    figures = browser.locator(".figures").inner_text()
    shown = {f"{last[name]:.4g}" for name in ("epoch_loss", "knn_acc1", "psnr")}
    assert shown <= {*figures.splitlines()}
    rows = browser.locator("#monitor tr").all_inner_texts()
    assert [row.split()[0] for row in rows[1:]] == ["0", "1", "2"]
    (row,) = browser.locator("#evaluations tr").all_inner_texts()[1:]  # of these weights
    accuracy = results_of(finished / "knn")["acc1"]
    assert row.startswith("knn\t") and f"{accuracy:.2f} (top-1 %)\t120 / 60" in row
    assert "mask_ratio: 0.75" in browser.locator("#settings").inner_text()
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)|http|url\((?!#)", text)
    assert note_of(text) == "step 20, epoch 2, finished</div>"


def test_several_runs_share_a_picture(tmp_path):
    one = log(tmp_path / "a" / "one", ONE, TWO, TWO | {"loss": None})
    two = log(tmp_path / "b" / "two", {"step": 1, "epoch": 1.0, "val_loss": 0.5, "acc1": 20.0})
    read = plot_run.RunLog(one, "one", plot_run.read_records(one / "log.jsonl"))
    assert (read.series("loss"), read.series("acc1")) == ([(1.0, 0.5), (2.0, 0.4)], [])
    made = plot_run.main([str(one), str(two)])
    assert made["curves"] == tmp_path / "curves.png"
    assert made["reports"] == [one / "report.html", two / "report.html"]
    alone = plot_run.main([str(one), "--save_path", str(tmp_path / "alone.png")])["curves"]
    both, alone = (np.asarray(Image.open(path)) for path in (made["curves"], alone))
    assert both.shape == alone.shape and (both != alone).any()
    again = plot_run.main([str(tmp_path / "a"), str(one)])["reports"]
    assert again == [one / "report.html"]  # a folder of runs, and each run once


def test_names_of_several_runs_may_be_any(tmp_path):
    """A formula that is not complete, and bytes that are no UTF-8."""
    for name in (b"$x_1^$", b"caf\xe9"):
        log(tmp_path / os.fsdecode(name), ONE, TWO)
    made = plot_run.main([str(tmp_path)])
    assert made["curves"].is_file() and "caf\\udce9" in made["compare"].read_text()


def test_a_run_that_has_not_ended_has_a_page(tmp_path):
    folder = log(tmp_path / "run", ONE | {"loss": None}, TWO)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    assert note_of(page_of(folder)).startswith("step 2, epoch 2, not finished")
    (folder / "config.yaml").write_text("epochs: 3\n")
    (folder / "model.safetensors").write_bytes(b"")  # as a run writes that stops on its schedule
    assert "stopped, of 3 epochs" in note_of(page_of(folder))
    observed = {"step": 0, "epoch": 0.0, "psnr": 11.0, "monitor_s": 0.5, "kind": "monitor"}
    gauges = {"held_out_loss": 0.45678, "effective_rank": 9.5, "dead_share": 12.25}
    page = page_of(log(tmp_path / "new", observed | gauges))
    assert all(text in page for text in ("11.00", "0.4568", "9.50", "12.25"))


def test_the_page_shows_predictions(tmp_path):
    scores = ONE | {"kind": "val", "box_ap": 12.5, "mask_ap": 10.25}
    folder = log(tmp_path / "run", ONE, scores)
    for name in ("predictions.png", "per_class.png"):
        write_png(folder / name, np.zeros((2, 2, 3), np.uint8))
    page = page_of(folder)
    assert re.findall(r'<img id="picture-(.*?)"', page) == ["predictions", "per_class"]
    assert "12.5" in page and "10.25" in page


def test_strange_results_beside_a_run_are_skipped_with_a_line(finished, tmp_path, capsys):
    output = tmp_path / "output"
    shutil.copytree(finished / "pretrain", output / "pretrain" / "one")
    shutil.copytree(finished / "knn", output / "knn" / "two")
    high = json.dumps(results_of(finished / "knn") | {"acc1": "high"}).encode()
    for number, content in enumerate([b"\xff{", b"[]", b"3", b"{}", high]):
        (output / f"x/{number}").mkdir(parents=True)
        (output / f"x/{number}/results.json").write_bytes(content)
    (output / "x/5/results.json").mkdir(parents=True)  # a folder
    assert re.findall("<td>(../[kx].*?)</td>", page_of(output / "pretrain")) == ["../knn/two"]
    skipped = re.findall(r"^skipped .*/(x/\d/results.json)", capsys.readouterr().out, re.M)
    assert skipped == [f"x/{number}/results.json" for number in (0, 1, 2, 5)]


def test_the_page_lists_evaluations_of_every_task(finished, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(finished / "pretrain", output / "pretrain" / "one")
    results = results_of(finished / "knn")
    del results["acc1"]
    for key in ("map", "rmse", "miou", "box_ap"):
        (output / "knn" / key).mkdir(parents=True)
        text = json.dumps(results | {key: 12.5})
        (output / "knn" / key / "results.json").write_text(text)
    found = re.findall(r'<td class="number">(12.50 .*?)</td>', page_of(output / "pretrain"))
    assert sorted(found) == [
        "12.50 (RMSE)",
        "12.50 (box AP, %)",
        "12.50 (mean IoU, %)",
        "12.50 (mean average precision)",
    ]


@pytest.mark.parametrize("name", ["curves.png", "report.html"])
def test_only_its_own_files_are_replaced(tmp_path, name):
    folder = log(tmp_path / "run", ONE)
    for _ in range(2):
        plot_run.main([str(folder)])
    (folder / name).write_bytes(b"<html>the user's own</html>")
    with pytest.raises(InputError, match=name):
        plot_run.main([str(folder)])
    assert (folder / name).read_bytes() == b"<html>the user's own</html>"


def test_names_and_settings_cannot_break_the_page(tmp_path, monkeypatch):
    folder = log(tmp_path / os.fsdecode(b"<b>$x_1^caf\xe9"), ONE)  # no UTF-8
    (folder / "config.yaml").write_text("output_dir: <script>alert(1)</script>\nclip_grad: null\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), errors="surrogateescape"))
    page = page_of(folder)
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "&lt;b&gt;$x_1^caf&#56553;" in page and "clip_grad: null" in page
