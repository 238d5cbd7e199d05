"""Waiting for images: the line that names what to do about it, in real runs and for every kind of
settings."""

import logging
import os
import time

import pytest
import torch
from runs import log_lines, make_pictures, pretraining

import main_pretrain
from data.sources import FolderSource
from engine.run.stall import StallMeter, lever
from util.dist import Processes
from util.settings.evaluation import FinetuneConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig

WORDS = "went into waiting for images"


def processes(here: int = 1) -> Processes:
    return Processes(0, 2 * here, 0, here, torch.device("cpu"))


def spoken(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if WORDS in record.getMessage()]


def test_it_speaks_once_and_not_of_the_first_window(caplog):
    meter = StallMeter(PretrainConfig(), processes())
    for share, times in ((0.9, 0), (0.1, 0), (0.0, 0), (0.11, 1), (0.9, 1), (0.05, 1), (0.5, 1)):
        meter.update(share)
        assert len(spoken(caplog)) == times
    assert spoken(caplog)[0].startswith(
        "11 % of the time since the last line went into waiting for images: loading is"
    )


@pytest.mark.parametrize(
    ("cfg", "cores", "here", "words"),
    [
        # cores are left
        (
            PretrainConfig(num_workers=0),
            4,
            1,
            "is 0 and each process can have 4 cores: try --num_workers 4",
        ),
        (
            PretrainConfig(num_workers=3),
            8,
            2,
            "is 3 and each process can have 4 cores: try --num_workers 4",
        ),
        (PretrainConfig(num_workers=0), 1, 1, "try --num_workers 1"),
        (
            PretrainConfig(),
            16,
            1,
            "num_workers is 8 and each process can have 16 cores: try --num_workers 16",
        ),
        (PretrainConfig(dataset="packed", num_workers=1), 2, 1, "try --num_workers 2"),
        # all are taken
        (
            PretrainConfig(),
            8,
            1,
            "num_workers 8 takes all cores already: for the next run, pack the images with "
            "tools/pack_dataset.py --side 256,",
        ),
        (PretrainConfig(num_workers=9), 8, 8, "pack the images"),
        (FinetuneConfig(img_size=(448, 336)), 2, 1, "tools/pack_dataset.py --side 512,"),
        (LinclsConfig(img_size=32), 2, 1, "--side 37,"),
        (
            PretrainConfig(dataset="packed"),
            4,
            2,
            "num_workers 2 takes all cores already: for the next run, try "
            "--aug_repeats 2, which decodes half as many",
        ),
        (PretrainConfig(dataset="cifar10"), 4, 2, "--aug_repeats 2"),
        # nothing is left to turn
        (
            PretrainConfig(dataset="packed", aug_repeats=2),
            4,
            1,
            "more of them would help, or a faster disk",
        ),
        (
            PretrainConfig(dataset="packed", batch_size=7),
            4,
            1,
            "more of them would help, or a faster disk",
        ),
        (
            FinetuneConfig(dataset="packed"),
            4,
            1,
            "4 takes all cores already: more of them would help, or a faster",
        ),
        (
            FinetuneConfig(dataset="cifar10"),
            4,
            1,
            "num_workers 4 takes all cores already: more of them would help",
        ),
    ],
)
def test_the_lever_fits_the_settings(monkeypatch, cfg, cores, here, words):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    found = lever(cfg, processes(here))
    assert words in found
    assert ("faster" in found) == ("faster" in words)


def lines_of(run) -> list[str]:
    return (run / "log.txt").read_text().splitlines()


def test_a_slow_disk_is_noticed_in_the_second_window_and_once(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    data = make_pictures(tmp_path / "data")
    read = FolderSource.read

    def slow(self, index):
        time.sleep(0.005)
        return read(self, index)

    monkeypatch.setattr(FolderSource, "read", slow)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    main_pretrain.main(pretraining(data, tmp_path / "run", "--log_interval", 2, "--stop_epoch", 1))
    shares = [line["data_wait"] for line in log_lines(tmp_path / "run") if "data_wait" in line]
    assert len(shares) == 5 and min(shares) > 0.3
    (line,) = [line for line in lines_of(tmp_path / "run") if WORDS in line]
    assert line.endswith("num_workers is 0 and each process can have 3 cores: try --num_workers 3")
    assert f" {100 * shares[1]:.0f} % of the time" in line
    before = lines_of(tmp_path / "run")[lines_of(tmp_path / "run").index(line) - 1]
    assert "step 4/20" in before


def test_a_run_that_does_not_wait_says_nothing(tmp_path):
    data = make_pictures(tmp_path / "data")
    model = ["--embed_dim", 256, "--depth", 6, "--num_heads", 4, "--num_workers", 1]
    main_pretrain.main(
        pretraining(data, tmp_path / "run", "--log_interval", 2, "--stop_epoch", 1, *model)
    )
    shares = [line["data_wait"] for line in log_lines(tmp_path / "run") if "data_wait" in line]
    assert len(shares) == 5 and max(shares[1:]) < 0.1
    assert not [line for line in lines_of(tmp_path / "run") if WORDS in line]
