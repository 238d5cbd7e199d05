"""Weights as graphs by `tools/convert_checkpoint.py`: other programs compute what PyTorch does, for
any number of images, and a graph that does not is not written."""

import onnxruntime
import pytest
import torch
from reference import MAE, randomized
from safetensors import safe_open
from safetensors.torch import save_file

import hubconf
from data.images import PixelFormat
from data.sources import FolderSource
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights import export
from models.weights.own import own_bytes, read_header
from tools import convert_checkpoint
from util.errors import InputError

MEAN, STD = 0.1307, 0.3081  # of the digits


@pytest.fixture(scope="module")
def files(tmp_path_factory, weights):
    """Weights of each kind, of grey digits of 28 x 28."""
    folder = tmp_path_factory.mktemp("files")
    fields = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2}
    fields |= {"num_heads": 2, "mlp_ratio": 4.0, "class_tokens": 2, "num_classes": 3}
    torch.manual_seed(0)
    model = VisionTransformer(**fields, global_pool="avg", drop_path_rate=0.2)
    header = {"model_args": model.spec.as_dict(), "mean": [MEAN], "std": [STD]}
    (folder / "classifier").write_bytes(own_bytes(model.state_dict(), header))
    save_file(model.state_dict(), folder / "timm")  # which tells neither heads nor mean
    return {
        "autoencoder": weights,
        "encoder": weights,
        "classifier": folder / "classifier",
        "timm": folder / "timm",
    }


@pytest.fixture(scope="module")
def digits(data):
    """Five real digits, uint8 `(5, 1, 28, 28)`."""
    source = FolderSource(data / "val", PixelFormat(1), prefer_train=False)
    return torch.stack([source.read(index) for index in (0, 15, 30, 45, 59)])


def convert(*arguments):
    return convert_checkpoint.main([str(argument) for argument in arguments])


def computed(path, form, *inputs):
    """What the file's graph makes of a batch."""
    if form == "export":
        found = torch.export.load(path).module()(*inputs)
        return [found] if isinstance(found, torch.Tensor) else found
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    assert names == ["images", "ids_shuffle"][: len(inputs)]
    arrays = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


@pytest.mark.parametrize(
    ("form", "part", "normalizes"),
    [
        ("export", "autoencoder", True),
        ("export", "encoder", False),
        ("export", "classifier", True),
        ("onnx", "autoencoder", True),
        pytest.param("onnx", "autoencoder", False, marks=pytest.mark.long),
        pytest.param("onnx", "encoder", True, marks=pytest.mark.long),
        pytest.param("onnx", "classifier", False, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_a_graph_computes_what_the_model_does(
    tmp_path, capsys, data, files, digits, form, part, normalizes
):
    path = tmp_path / ("graph.onnx" if form == "onnx" else "graph.pt2")
    more = ["--with_preprocessing"] if normalizes else []
    convert(files[part], path, "--format", form, "--part", part, *more, "--images", data / "val")
    said = capsys.readouterr().out.splitlines()
    assert f"on 8 images of {data / 'val'}: " in said[1] and said[2] == f"wrote {path}"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    model = getattr(hubconf, part)(str(files[part]))
    pixels = (digits / 255 - MEAN) / STD
    for count in (1, 5):
        given = [(digits if normalizes else pixels)[:count]]
        if part == "autoencoder":
            given.append(torch.rand(count, 49).argsort(dim=1))
            pred, mask = model.reconstruct(pixels[:count], given[1])
            painted = model.to_pixels(pred, pixels[:count])
            expected = [painted * STD + MEAN if normalizes else painted, mask]
        else:
            expected = [model(pixels[:count])]
        for ours, theirs in zip(expected, computed(path, form, *given), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["export", pytest.param("onnx", marks=pytest.mark.long)])
@pytest.mark.parametrize("decoder", ["self", pytest.param("cross", marks=pytest.mark.long)])
def test_graphs_of_mixed_layers_and_of_low_frequencies_compute_the_same(tmp_path, form, decoder):
    fields = MAE | {"decoder": decoder, "decoder_fusion": 2, "target": "lowpass"}
    model = randomized(MaskedAutoencoder(**fields))
    header = {"model_args": model.spec.as_dict(), "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "source").write_bytes(own_bytes(model.state_dict(), header))
    convert(tmp_path / "source", tmp_path / "graph", "--format", form)
    images, ids = torch.randn(5, 3, 32, 32), torch.rand(5, 16).argsort(dim=1)
    with torch.no_grad():
        pred, mask = model.reconstruct(images, ids)
        expected = [model.to_pixels(pred, images), mask]
    for ours, theirs in zip(expected, computed(tmp_path / "graph", form, images, ids), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_large_onnx_graph_has_its_weights_beside_it(tmp_path, monkeypatch, files, digits):
    monkeypatch.setattr(export, "ONE_FILE", 1000)
    convert(files["classifier"], tmp_path / "a.onnx", "--format", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    (found,) = computed(tmp_path / "a.onnx", "onnx", digits.float())
    model = hubconf.classifier(str(files["classifier"]))
    torch.testing.assert_close(found, model(digits.float()).detach(), rtol=0, atol=1e-3)


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch, files):
    original = export._difference

    def off(graph, inputs, run):
        return original(graph, inputs, lambda *given: run(*given) + 2e-4)

    monkeypatch.setattr(export, "_difference", off)
    with pytest.raises(InputError, match=r"differs from PyTorch's by 0.0002.*more than 0.0001"):
        convert(files["classifier"], tmp_path / "a.pt2", "--format", "export")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, monkeypatch, files):
    target, form = tmp_path / "a", ("--format", "export")
    (tmp_path / "there").write_text("precious")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    refused = [
        ((files["encoder"], target, "--format", "onnx"), r"onnxscript.* pip install -e \.\[onnx\]"),
        ((files["encoder"], tmp_path / "there", *form), "already there"),
        ((files["encoder"], target, *form, "--part", "classifier"), "holds no head"),
        ((files["classifier"], target, *form, "--part", "autoencoder"), "holds no decoder"),
        ((files["timm"], target, *form), "num_heads"),
        (
            (files["timm"], target, *form, "--num_heads", 2, "--with_preprocessing"),
            "give --mean and --std",
        ),
        ((files["encoder"], target, *form, "--images", "/nowhere"), "/nowhere"),
    ]
    for arguments, words in refused:
        with pytest.raises(InputError, match=words) as error:
            convert(*arguments)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_without_onnxruntime_a_graph_is_written_and_the_missing_comparison_said(
    tmp_path, monkeypatch, capsys, files
):
    monkeypatch.setattr(export, "find_spec", lambda name: name != "onnxruntime" or None)
    convert(files["timm"], tmp_path / "a.onnx", "--format", "onnx", "--num_heads", 2)
    assert "not compared with PyTorch: onnxruntime is not installed" in capsys.readouterr().out
    assert (tmp_path / "a.onnx").exists()


def test_a_range_that_the_graph_does_not_know_is_said(tmp_path, capsys, files):
    with safe_open(files["classifier"], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    deep = tmp_path / "deep"
    header = read_header(files["classifier"])
    deep.write_bytes(own_bytes(tensors, {**header, "pixel_range": ["-1", "3000"]}))
    for source, words in ((deep, ["-1 3000"]), (files["classifier"], [])):
        convert(
            source, tmp_path / f"{source.name}.pt2", "--format", "export", "--with_preprocessing"
        )
        said = [line for line in capsys.readouterr().out.splitlines() if "pixel_range" in line]
        assert len(said) == len(words) and all(word in said[0] for word in words)
