"""`make quickstart` from its first command to what a person sees in the end: table, pictures, page,
TensorBoard."""

import re
import subprocess
from pathlib import Path

import pytest
from browser import (
    browser,
    eventually,
    loaded_images,
    open_page,
    tensorboard,
    text_of,
    time_series_cards,
)
from conftest import ROOT
from PIL import Image
from runs import environment, log_lines
from selenium.webdriver.common.by import By

from tools import results_table

CURVES = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/images_per_s",
    "train/data_wait",
    "monitor/knn_acc1",
}


def quickstart(output: Path) -> str:
    """What `make quickstart` prints."""
    result = subprocess.run(
        ["make", "quickstart", f"OUTPUT={output}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment(MAKEFLAGS=""),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.long
def test_make_quickstart_and_what_a_person_sees(tmp_path):
    quickstart(tmp_path)
    first_pictures = {path: path.read_bytes() for path in tmp_path.glob("*/*.png")}
    printed = quickstart(tmp_path)  # again
    assert (
        printed.count("already finished") == 5
    )  # pretraining, linear and fine-tuning; k-NN computes again
    table = results_table.main([str(tmp_path)])
    assert f"{table['knn']['pretrained']:.2f}" in printed
    for stage, of_stage in table.items():
        assert of_stage["pretrained"] > of_stage["untrained"] + 3, stage
    lines = log_lines(tmp_path / "pretrain")
    epochs = [line["epoch_loss"] for line in lines if "epoch_loss" in line]
    assert epochs[-1] < 0.6 * epochs[0]

    looks = [line for line in lines if "monitor_s" in line]
    assert [look["epoch"] for look in looks] == [0, 4, 8, 12, 16]
    assert looks[-1]["knn_acc1"] > looks[0]["knn_acc1"] + 10
    assert looks[-1]["psnr"] > looks[0]["psnr"] + 2

    paths = [Path(path) for path in re.findall(r"^wrote (\S+\.(?:png|html))", printed, re.M)]
    names = {path.relative_to(tmp_path).as_posix() for path in paths}
    assert {"reconstructions/grid.png", "rollout/rollouts.png", "pretrain/report.html"} <= names
    assert all(path.exists() for path in paths)
    assert Image.open(tmp_path / "reconstructions" / "grid.png").width > 500
    assert {
        path: path.read_bytes() for path in tmp_path.glob("*/*.png")
    } == first_pictures  # the same, bit for bit

    with browser() as window:
        see_tensorboard(
            window, tmp_path / "pretrain", f"{epochs[-1]:.4f}", f"{looks[-1]['knn_acc1']:.1f}"
        )
        see_report(
            window, tmp_path / "pretrain" / "report.html", f"{table['knn']['pretrained']:.2f}"
        )


def see_tensorboard(window, folder: Path, epoch_loss: str, knn: str) -> None:
    """The curves with their last values, the picture at its own size, and the settings are on the
    page."""
    with tensorboard(folder) as address:
        cards = time_series_cards(window, address, {"epoch", "final", "monitor", "train"})
        assert cards.keys() >= CURVES | {"epoch/epoch_loss", "final/loss", "monitor"}
        eventually(lambda: epoch_loss.rstrip("0") in text_of(window, cards["epoch/epoch_loss"]))
        eventually(lambda: knn.removesuffix(".0") in text_of(window, cards["monitor/knn_acc1"]))
        text_of(window, cards["monitor"])
        size = Image.open(folder / "monitor.png").size
        assert eventually(lambda: loaded_images(window, "card-view img")) == [size]
        open_page(window, f"{address}/#hparams")
        eventually(
            lambda: "final/loss" in window.execute_script("return document.body.textContent")
        )


def see_report(window, page: Path, knn: str) -> None:
    """The page opens from disk with its pictures, and needs nothing from elsewhere."""
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http" not in text
    open_page(window, page.as_uri())
    sizes = loaded_images(window)
    assert len(sizes) == 2 and Image.open(page.parent / "monitor.png").size in sizes
    for part, words in (("looks", "16"), ("evaluations", knn), ("settings", "mask_ratio: 0.75")):
        assert words in window.find_element(By.ID, part).text, part
