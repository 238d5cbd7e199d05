"""compare.html of `tools/plot_run.py`: the table over runs, its order, filter and exports, and what
it reads of ten thousand runs."""

import csv
import json
import os
import re
import time
from pathlib import Path

import pytest
import yaml
from runs import log_lines, pictures, pretrain_pictures, results_of

import main_knn
from tools import plot_run
from tools.reporting import compare
from util.errors import InputError
from util.settings.pretrain import PretrainConfig
from util.settings.read import dump_config

HOSTILE = "<img src=x onerror=alert(1)>&%_$#{}~^\\"


def make_run(folder: Path, number: int, **more: object) -> Path:
    """A run's folder with a log of 50 epochs; loss and accuracy tell the run's number."""
    folder.mkdir(parents=True)
    settings = {"output_dir": str(folder), "data_path": "x", "seed": number, **more}
    (folder / "config.yaml").write_text(dump_config(PretrainConfig(**settings)))
    with (folder / "log.jsonl").open("w") as file:
        for step in range(1, 251):
            values = {"step": step, "epoch": step / 5, "grad_norm": 1.0, "lr": 1e-3}
            lines = [{"kind": "train", **values, "loss": number + 1 / step}]
            if step % 5 == 0:
                lines.append({"kind": "epoch", **values, "epoch_loss": number + 1 / step})
            if step % 50 == 0:
                lines.append({"kind": "monitor", **values, "knn_acc1": (37 * number + step) % 100})
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def data_of(folder: Path, *more: str) -> dict:
    """What the page holds."""
    page = plot_run.main([str(folder), "--compare", *more])["compare"]
    assert page == folder / "compare.html"
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])


def table_of(data: dict) -> dict[str, dict]:
    """The rows by name, without values that a run has not."""
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    return {row["run"]: {k: v for k, v in row.items() if v is not None} for row in rows}


def test_real_runs_show_their_figures_and_the_settings_that_differ(tmp_path, data):
    one = pretrain_pictures(data, tmp_path / "one", "--monitor_epochs", 1, "--monitor_images", 2)
    two = pretrain_pictures(data, tmp_path / "two", "--mask_ratio", 0.5, "--clip_grad", 1)
    knn = tmp_path / "evaluations" / "knn"
    weights = one / "model.safetensors"
    main_knn.main(pictures(data, knn, "--finetune", weights, training=False))
    made = plot_run.main([str(tmp_path)])
    assert made["compare"] == tmp_path / "compare.html" and len(made["reports"]) == 3
    found = data_of(tmp_path)
    rows = table_of(found)
    assert found["links"] == [f"{name}/report.html" for name in ("evaluations/knn", "one", "two")]
    last = {k: v for record in log_lines(one) for k, v in record.items()}
    titles = {"mean training loss": "epoch_loss", "10-NN, top-1 %": "knn_acc1"}
    titles |= {"PSNR of reconstructions, dB": "psnr", "held-out loss": "held_out_loss"}
    assert {words: rows["one"][words] for words in titles} == {
        words: last[key] for words, key in titles.items()
    }
    assert rows["two"]["mean training loss"] == log_lines(two)[-1]["epoch_loss"]
    (knn / "results.json").rename(knn / "eval.json")  # as --eval leaves it
    assert table_of(data_of(tmp_path)) == rows
    (one / "eval.json").write_text('{"acc1": 1}')  # which may be of other weights
    assert table_of(data_of(tmp_path)) == rows
    (knn / "eval.json").rename(knn / "results.json")
    assert (rows["one"]["mask_ratio"], rows["two"]["mask_ratio"]) == (0.75, 0.5)
    assert (rows["one"]["clip_grad"], rows["two"]["clip_grad"]) == ("null", 1.0)
    assert {"lr", "epochs", "output_dir", "seed", "data_path"}.isdisjoint(found["columns"])
    assert rows["evaluations/knn"] == {
        "run": "evaluations/knn",
        "protocol": "k-NN, cosine, temperature 0.07",
        "state": "finished",
        "top-1 %": results_of(knn)["acc1"],
    }
    (curve,) = [c["series"]["10-NN, top-1 %"] for c in found["curves"] if len(c["series"]) > 1]
    assert curve == [[r["epoch"], r["knn_acc1"]] for r in log_lines(one) if "knn_acc1" in r]


def test_only_the_end_of_a_long_log_is_read(tmp_path, monkeypatch):
    """A line that the limit cuts, or that is still being written, does not count."""
    monkeypatch.setattr(compare, "TAIL", 300)
    folder = make_run(tmp_path / "run", 3)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "monitor", "step": 251, "epo')
    row = table_of(data_of(tmp_path / "run"))["."]
    assert row["mean training loss"] == 3 + 1 / 250 and row["epoch"] == 50
    assert row["10-NN, top-1 %"] == (3 * 37 + 250) % 100
    text = (folder / "log.jsonl").read_bytes()
    # of the last record of an epoch only the first character is cut off
    monkeypatch.setattr(compare, "TAIL", len(text) - text.rindex(b'{"kind": "epoch"') - 1)
    last = compare.last_values(folder / "log.jsonl")
    assert last["knn_acc1"] == 61 and "epoch_loss" not in last


def test_a_page_is_bounded(tmp_path, monkeypatch):
    """Rows, curves, points and texts; the newest runs are drawn."""
    for number in range(5):
        log = make_run(tmp_path / f"{number}", number, data_path="x" * (300 + number)) / "log.jsonl"
        os.utime(log, (1e9 - number, 1e9 - number))
    for name, most in (("ROWS", 4), ("DRAWN", 2), ("POINTS", 7)):
        monkeypatch.setattr(compare, f"MOST_{name}", most)
    found = data_of(tmp_path)
    assert (len(found["rows"]), [curve["row"] for curve in found["curves"]]) == (4, [0, 1])
    points = found["curves"][1]["series"]["mean training loss"]
    assert points == [[epoch, 1 + 1 / (5 * epoch)] for epoch in range(2, 51, 8)]
    assert "data_path" not in found["columns"]  # they differ behind what is shown
    assert all(len(str(value)) < 250 for row in found["rows"] for value in row)
    page = (tmp_path / "compare.html").read_text()
    assert "Only the first 4 are listed" in page and "the 2 runs of 4 that were written" in page


def test_a_page_stands_beside_the_picture_of_the_curves(tmp_path):
    """And says of a run that it stopped before its last epoch."""
    for number in range(2):
        make_run(tmp_path / "runs" / f"{number}", number, epochs=(50, 60)[number])
        (tmp_path / "runs" / f"{number}" / "model.safetensors").touch()
    (tmp_path / "pages").mkdir()
    picture = tmp_path / "pages" / "both.png"
    made = plot_run.main([str(tmp_path / "runs"), "--save_path", str(picture)])
    assert made["compare"] == tmp_path / "pages" / "compare.html" and picture.is_file()
    page = made["compare"].read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["links"] == ["../runs/0/report.html", "../runs/1/report.html"]
    assert [row["state"] for row in table_of(data).values()] == ["finished", "stopped"]


def test_many_runs_have_no_pages_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot_run, "MOST_REPORTS", 2)
    for number in range(3):
        make_run(tmp_path / f"{number}", number)
    assert plot_run.main([str(tmp_path)]) == {"compare": tmp_path / "compare.html"}
    assert "compare.html alone" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["compare.html"]
    assert set(plot_run.main([str(tmp_path / "0")])) == {"curves", "reports"}
    (tmp_path / "compare.html").write_text("the user's own")
    with pytest.raises(InputError, match=r"compare\.html was not made by this tool"):
        plot_run.main([str(tmp_path)])
    with pytest.raises(InputError, match="holds no run"):
        plot_run.main([str(tmp_path / "absent")])


def test_files_that_cannot_be_read_leave_blanks(tmp_path, capsys):
    for number, (name, content) in enumerate(
        [
            ("log.jsonl", b"\xff\n[]\n"),
            ("log.jsonl", b"[1]\n"),
            ("log.jsonl", b""),
            ("config.yaml", b"a: [\n"),
            ("config.yaml", b"- 1\n"),
            ("results.json", b"[]"),
            ("results.json", b'{"acc1": NaN, "protocol": {"a": [1]}, "num_train": true}'),
        ]
    ):
        (make_run(tmp_path / f"{number}", number) / name).write_bytes(content)
    rows = table_of(data_of(tmp_path))
    assert [*rows] == [*"0123456"]
    assert [name for name in "0123456" if "epoch" in rows[name]] == [*"3456"]
    assert [name for name in "0123456" if "seed" in rows[name]] == [*"01256"]
    assert re.findall(r"skipped .*/(\d)/(?:log|conf|res)", capsys.readouterr().out)[:6]
    assert "top-1 %" not in rows["6"]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> Path:
    """The folder above twelve runs, of which one has a hostile name and one no k-NN."""
    folder = tmp_path_factory.mktemp("compared")
    for number in range(10):
        make_run(folder / f"run{number}", number, size=("tiny", "small")[number % 2])
    hostile = make_run(folder / HOSTILE, 10, data_path=HOSTILE)
    (hostile / "report.html").touch()
    other = make_run(folder / "javascript:alert(1)", 11, data_path='=2+3,"x"')
    (other / "report.html").touch()
    (other / "log.jsonl").write_text('{"kind": "epoch", "step": 1, "epoch": 1, "epoch_loss": 2}\n')
    plot_run.main([str(folder), "--compare"])
    return folder


def shown(browser, column: int) -> list[str]:
    return browser.locator(f"tbody tr > :nth-child({column + 1})").all_inner_texts()


@pytest.mark.long
def test_a_table_is_sorted_by_keyboard_filtered_and_exported(twelve, browser):
    browser.goto((twelve / "compare.html").as_uri())
    columns = browser.locator("thead button").all_inner_texts()
    knn, loss = columns.index("10-NN, top-1 %"), columns.index("mean training loss")
    for key, state, sign in (("Enter", "ascending", 1), ("Space", "descending", -1)):
        browser.locator("thead button").nth(knn).focus()
        browser.keyboard.press(key)
        assert browser.locator("thead th").nth(knn).get_attribute("aria-sort") == state
        *values, missing = shown(browser, knn)
        assert missing == "" and len(values) == 11
        assert values == sorted(values, key=lambda text: sign * float(text))
    assert browser.evaluate("document.activeElement.textContent") == "10-NN, top-1 %"
    align = "cells => cells.map(cell => getComputedStyle(cell).textAlign)"
    assert set(browser.locator(f"tbody td:nth-child({knn + 1})").evaluate_all(align)) == {"right"}

    browser.fill("#filter", "RUN small")
    browser.wait_for_function("document.querySelectorAll('tbody tr').length === 5")
    assert browser.locator("#legend button").count() == 5
    browser.fill("#filter", "")
    browser.wait_for_function("document.querySelectorAll('tbody tr').length === 12")
    order = shown(browser, 0)
    with browser.expect_download() as download:
        browser.click("#csv")
    raw = Path(download.value.path()).read_bytes()
    assert raw.count(b"\r\n") == 13 and b'"\'=2+3,""x"""' in raw  # a formula is a text
    read = [*csv.DictReader(raw.decode().splitlines())]
    assert [row["run"] for row in read] == order and set(order) >= {HOSTILE, "run0"}
    exact = table_of(data_of(twelve))
    assert all(float(row[columns[loss]]) == exact[row["run"]][columns[loss]] for row in read)
    assert [row["10-NN, top-1 %"] for row in read][-1] == ""

    with browser.expect_download() as download:
        browser.click("#latex")
    latex = Path(download.value.path()).read_text()
    special = (
        r"<img src=x onerror=alert(1)>\&\%\_\$\#\{\}\textasciitilde{}\textasciicircum{}"
        r"\textbackslash{}"
    )
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 13 and sum(line.startswith(f"  {special} &") for line in body) == 1
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in body)
    assert latex.startswith("\\begin{tabular}{lllr") and latex.endswith("\\end{tabular}\n")


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_page_is_readable_and_hostile_names_are_only_text(
    twelve, browser, violations, scheme, width
):
    opened = []
    browser.on("dialog", lambda dialog: (opened.append(dialog.message), dialog.dismiss()))
    browser.emulate_media(color_scheme=scheme)
    browser.set_viewport_size({"width": width, "height": 844})
    browser.goto((twelve / "compare.html").as_uri())
    assert violations() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.locator("tbody img, main script").count() == 0 and opened == []
    assert HOSTILE in shown(browser, 0)
    links = browser.locator("tbody a").evaluate_all("links => links.map(link => link.href)")
    assert len(links) == 2 and all(
        link.startswith(twelve.as_uri()) and link.endswith("/report.html") for link in links
    )
    lines = browser.locator("#panels polyline")
    entry = browser.locator("#legend button").nth(2)
    for action in (entry.focus, entry.hover, entry.click):
        action()
        chosen = browser.locator("#panels polyline.chosen")
        assert 2 == chosen.count() < lines.count()
    assert entry.get_attribute("aria-pressed") == "true"
    assert browser.locator("tbody tr.chosen th").inner_text() == entry.inner_text()


@pytest.mark.long
def test_a_thousand_runs_are_listed_in_a_moment(tmp_path, browser):
    """The limit is of processor time, as other programs may have the machine; and the page shows
    the first rows of all."""
    for number in range(1000):
        make_run(tmp_path / f"{number % 7}/run{number}", number, lr=1e-4 * (1 + number % 3))
    before = time.process_time()
    page = plot_run.main([str(tmp_path)])["compare"]
    assert time.process_time() - before < 1.5
    assert page.stat().st_size < 1e6
    browser.goto(page.as_uri())
    assert browser.locator("tbody tr").count() == 200
    assert "1000 of 1000 rows" in browser.inner_text("#count")
    browser.click("#more")
    assert browser.locator("tbody tr").count() == 400
    settings = yaml.safe_load((tmp_path / "0/run7/config.yaml").read_text())
    cells = {name: compare.cell(value) for name, value in settings.items()}
    assert compare.read_settings(tmp_path / "0/run7/config.yaml") == cells
