"""`tools/plot_run.py`: curves of several runs, and a page about each; and the overview picture of
the README."""

import base64
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from runs import command, digits, log_lines, make_pictures, pictures, pretrain_pictures, run

import main_knn
import main_pretrain
from tools import draw_overview, plot_run
from util.errors import InputError


def log(folder: Path, *lines: dict) -> Path:
    """A run's folder with nothing but a log."""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def embedded(page: str) -> list[np.ndarray]:
    """The pictures in a page, decoded."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(BytesIO(base64.b64decode(content)))) for content in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a pretraining run that looked at itself, and a k-NN of its weights."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_pictures(tmp_path_factory.mktemp("digits"))
    pretrain_pictures(data, folder / "pretrain", "--monitor_epochs", 1, "--monitor_images", 2)
    weights = folder / "pretrain" / "model.safetensors"
    main_knn.main(pictures(data, folder / "knn", "--finetune", weights, training=False))
    main_knn.main(pictures(data, folder / "knn_untrained", "--finetune", "random", training=False))
    return folder


def test_a_page_tells_what_the_run_did(finished, capsys):
    made = plot_run.main([str(finished / "pretrain")])
    assert made == {
        "curves": finished / "pretrain" / "curves.png",
        "reports": [finished / "pretrain" / "report.html"],
    }
    page = made["reports"][0].read_text()
    assert str(made["reports"][0]) in capsys.readouterr().out
    curves, looks = embedded(page)
    assert (looks == np.asarray(Image.open(finished / "pretrain" / "monitor.png"))).all()
    assert curves.shape[0] > 900 and curves.std() > 10
    assert (
        not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
    )  # nothing from elsewhere
    lines = log_lines(finished / "pretrain")
    look = [line for line in lines if "monitor_s" in line][-1]
    assert f"<b>{look['knn_acc1']:.4g}</b>10-NN, top-1 %" in page
    assert (
        f"{[line['epoch_loss'] for line in lines if 'epoch_loss' in line][-1]:.4g}</b>mean training loss"
        in page
    )
    assert page.count('<tr><td class="number">') == 3  # looks at epochs 0, 1 and 2
    results = json.loads((finished / "knn" / "results.json").read_text())
    (row,) = re.findall(
        r"<tr><td>(\w+)</td><td>k-NN, cosine.*</td><td class=\"number\">([\d.]+)</td>", page
    )
    assert row == (
        "knn",
        f"{results['acc1']:.2f}",
    )  # of these weights; the untrained model's is not among them
    assert (
        "mask_ratio: 0.75" in page
        and "patch_size: 4" in page
        and ">step 20, epoch 2, finished</div>" in page
    )


def test_the_same_command_writes_the_same(finished):
    first = {path: path.read_bytes() for path in plot_run.main([str(finished)])["reports"]}
    assert {path: path.read_bytes() for path in plot_run.main([str(finished)])["reports"]} == first


def test_curves_are_those_of_the_logs(tmp_path):
    one = log(tmp_path / "one", *({"step": i, "epoch": i / 2, "loss": 1 / i} for i in range(1, 5)))
    read = plot_run.RunLog(one, "one", plot_run.read_log(one / "log.jsonl"))
    assert read.series("loss") == ([0.5, 1.0, 1.5, 2.0], [1.0, 0.5, 1 / 3, 0.25])
    assert (
        read.series("acc1") == ([], []) and read.last("loss") == 0.25 and read.last("acc1") is None
    )


def test_several_runs_share_a_picture(tmp_path):
    one = log(
        tmp_path / "a" / "one",
        {"step": 1, "epoch": 1.0, "loss": 0.5},
        {"step": 2, "epoch": 2.0, "loss": 0.4},
    )
    two = log(
        tmp_path / "b" / "two",
        {"step": 1, "epoch": 1.0, "val_loss": 0.5, "acc1": 20.0, "ema_acc1": None},
    )
    made = plot_run.main([str(one), str(two)])
    assert made["curves"] == tmp_path / "curves.png"
    assert made["reports"] == [one / "report.html", two / "report.html"]
    both = np.asarray(Image.open(made["curves"]))
    alone = np.asarray(
        Image.open(plot_run.main([str(one), "--save_path", str(tmp_path / "alone.png")])["curves"])
    )
    assert both.shape == alone.shape and (both != alone).any()
    assert plot_run.main([str(tmp_path / "a"), str(one)])["reports"] == [
        one / "report.html"
    ]  # a folder of runs; once


def test_a_run_that_goes_on_can_be_looked_at(tmp_path):
    folder = log(
        tmp_path / "run",
        {"step": 1, "epoch": 0.5, "loss": None},
        {"step": 2, "epoch": 1.0, "loss": 0.5},
    )
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    page = plot_run.main([str(folder)])["reports"][0].read_text()
    assert ">step 2, epoch 1, not finished</div>" in page and len(embedded(page)) == 1


def test_a_run_that_has_only_looked_has_a_page(tmp_path):
    folder = log(tmp_path / "run", {"step": 0, "epoch": 0.0, "psnr": 11.0, "monitor_s": 0.5})
    assert len(embedded(plot_run.main([str(folder)])["reports"][0].read_text())) == 1


def test_a_run_that_stopped_on_its_schedule_is_not_finished(tmp_path):
    folder = log(tmp_path / "run", {"step": 1, "epoch": 1.0, "loss": 0.5})
    (folder / "config.yaml").write_text("epochs: 2\n")
    (folder / "model.safetensors").write_bytes(b"")
    page = plot_run.main([str(folder)])["reports"][0].read_text()
    assert ">step 1, epoch 1, stopped, of 2 epochs</div>" in page


def test_evaluations_are_found_in_the_default_folders_and_strange_files_passed_over(
    finished, tmp_path
):
    run = tmp_path / "output" / "pretrain" / "one"
    shutil.copytree(finished / "pretrain", run)
    shutil.copytree(finished / "knn", tmp_path / "output" / "knn" / "two")
    (tmp_path / "output" / "knn" / "broken").mkdir()
    (tmp_path / "output" / "knn" / "broken" / "results.json").write_bytes(b"\xff{")
    made = plot_run.main([str(tmp_path / "output")])  # a folder above
    assert made["reports"] == [run / "report.html"]
    assert "<tr><td>../knn/two</td><td>k-NN, cosine" in made["reports"][0].read_text()


def test_names_and_settings_cannot_break_the_page(tmp_path):
    folder = log(tmp_path / "<b>$x_1^", {"step": 1, "epoch": 1.0, "loss": 0.5})
    (folder / "config.yaml").write_text(
        "output_dir: <script>alert(1)</script>\nclip_grad: null\nmean: [0.5, 0.4]\n"
    )
    page = plot_run.main([str(folder)])["reports"][0].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;$x_1^" in page
    assert "clip_grad: null" in page and "mean: [0.5, 0.4]" in page


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"step": 1, "epoch"\n{"step": 2, "epoch": 1.0}\n', "line 1 is no line of a run's log"),
        ('{"loss": 1}\n{"step": 2, "epoch": 1.0}\n', "line 1 is no line of a run's log"),
        ('[]\n{"step": 2, "epoch": 1.0}\n', "line 1 is no line of a run's log"),
    ],
)
def test_a_log_that_is_none_is_one_clear_line(tmp_path, content, words):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=re.escape(words)):
        plot_run.main([str(tmp_path)])
    assert not list(tmp_path.glob("*.png"))


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="is no run's folder and holds none"):
        plot_run.main([str(tmp_path)])
    with pytest.raises(InputError, match="OUTPUT"):
        plot_run.main([])
    folder = log(tmp_path / "run", {"step": 1, "epoch": 1.0, "loss": 0.5})
    with pytest.raises(InputError, match="cannot be written"):
        plot_run.main([str(folder), "--save_path", str(folder / "log.jsonl" / "curves.png")])
    result = run(command(str(tmp_path / "nothing"), script="tools/plot_run.py"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and result.stderr.startswith(
        "error: "
    )


def test_the_overview_is_drawn(tmp_path):
    main_pretrain.main(digits(tmp_path / "run", "--epochs", 1, "--monitor_epochs", 0))
    flags = [
        "--dataset",
        "mnist5k",
        "--img_size",
        "28",
        "--in_chans",
        "1",
        "--mean",
        "0.1307",
        "--std",
        "0.3081",
    ]
    flags += [
        "--size",
        "debug",
        "--patch_size",
        "4",
        "--decoder_embed_dim",
        "16",
        "--decoder_depth",
        "1",
    ]
    flags += [
        "--decoder_num_heads",
        "2",
        "--model_path",
        str(tmp_path / "run" / "model.safetensors"),
    ]
    path = draw_overview.main([*flags, "--save_path", str(tmp_path / "new" / "overview.png")])
    picture = np.asarray(Image.open(path))
    assert picture.shape == (360, 1210, 3)
    assert (picture == (0x3B, 0x6E, 0xA5)).all(-1).sum() > 10_000  # the encoder
    with pytest.raises(InputError, match="norm_pix_loss"):
        draw_overview.main(
            [*flags, "--norm_pix_loss", "false", "--save_path", str(tmp_path / "x.png")]
        )


def test_the_pictures_of_the_readmes_are_there_and_small():
    files = list((ROOT / "figures").iterdir())
    readmes = [ROOT / "README.md", ROOT / "tools" / "README.md"]
    text = "".join(readme.read_text() for readme in readmes)
    assert set(re.findall(r"figures/([\w.]+)\)", text)) == {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 1_000_000
