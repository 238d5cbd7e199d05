"""`tools/notebooks/first_look.ipynb` runs as it is, and what it prints is right."""

import re

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from sklearn.neighbors import KNeighborsClassifier
from test_rollout import saved
from torchvision.transforms.v2.functional import resize

from data.known_sets import read_mnist5k
from hubconf import encoder
from util.files import pretrained
from util.settings.pretrain import PretrainConfig

NOTEBOOK = ROOT / "tools/notebooks/first_look.ipynb"
NAMED = 'WEIGHTS = "cifar10-tiny"'
SECONDS = 180  # that it may take
SMALL = {"size": "debug", "img_size": 32, "patch_size": 8, "decoder_embed_dim": 16}
SMALL |= {"decoder_depth": 1, "decoder_num_heads": 2, "class_tokens": 1}


def printed_by(weights: str) -> str:
    """What the cells print, in the notebook's own folder."""
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(NAMED, f"WEIGHTS = {weights!r}")
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=SECONDS, resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    return "".join(output.get("text", "") for output in outputs)


def percent(printed: str, name: str) -> float:
    (found,) = re.findall(rf"^{name}: ([\d.]+) %$", printed, re.M)
    return float(found)


@torch.no_grad()
def digits(weights: str, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features `(n, D)` and labels of every second digit."""
    model = encoder(weights, global_pool="avg")
    pixels, labels = read_mnist5k(train)
    images = torch.from_numpy(pixels[::2]).expand(-1, 3, -1, -1).float() / 255
    images = resize(images, list(model.img_size), antialias=True)
    return model((images - model.mean) / model.std).numpy(), labels[::2]


@pytest.mark.long
@pytest.mark.parametrize("weights", ["small", *pretrained()])
def test_the_notebook_prints_what_the_weights_can_do(weights, tmp_path):
    if weights == "small":
        path = saved(tmp_path / "small.safetensors", PretrainConfig(**SMALL))
    else:
        path = pretrained()[weights]
    printed = printed_by(str(path))
    neighbours = KNeighborsClassifier(10, metric="cosine").fit(*digits(str(path), True))
    expected = 100 * neighbours.score(*digits(str(path), False))
    assert percent(printed, "10-NN, pretrained") == pytest.approx(expected, abs=0.5)
    if weights != "small":  # it is trained
        for name in ("10-NN", "linear probe"):
            assert percent(printed, f"{name}, pretrained") > 10 + percent(
                printed, f"{name}, untrained"
            )


def test_the_notebook_is_stored_as_a_newcomer_opens_it():
    """Without outputs, which would age, and with the weights that come with the project."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    assert sum(NAMED in cell.source for cell in cells) == 1
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
