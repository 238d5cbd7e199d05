"""The weights that come with this project are worth what the file beside them says."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from runs import results_of

import main_knn
import main_lincls
from engine.start import with_paths
from models.spec import MAESpec
from models.weights.read import read_weights
from util.files import PRETRAINED, pretrained
from util.settings.evaluation import KnnConfig

MARGIN = 0.3  # points of accuracy
STAGES = {"10-NN": main_knn.main, "logistic regression": main_lincls.main}
pytestmark = pytest.mark.parametrize("name", pretrained())


def told(name: str) -> dict:
    return json.loads((PRETRAINED / f"{name}.json").read_text())


def test_each_has_a_decoder_and_is_small(name):
    tensors, info = read_weights(name)
    assert isinstance(info.spec, MAESpec) and not info.unknown and info.mean and info.std
    assert Path(PRETRAINED / f"{name}.safetensors").stat().st_size < 8e6
    assert told(name)["sha256"] == info.sha256
    assert with_paths(KnnConfig(finetune=name, dataset="mnist5k")).finetune == name


@pytest.mark.long
@pytest.mark.parametrize("readout", STAGES)
def test_its_figures_can_be_measured_again(name, readout, cifar10_jpeg, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    figure = told(name)["figures"][readout]
    command = figure["command"].split()[2:]  # without "sh run_stage.sh"
    place = ["--dataset", "folder", "--data_path", str(cifar10_jpeg), "--output_dir", str(tmp_path)]
    STAGES[readout]([*command, *place])
    assert results_of(tmp_path)["acc1"] == pytest.approx(figure["top-1 %"], abs=MARGIN)
