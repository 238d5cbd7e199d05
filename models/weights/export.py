"""Models as graphs for other programs: ONNX, and `torch.export`. The number of images of a batch
stays open, and what a graph computes is compared with the model before its file counts.

Shapes: `B` batch, `C` channels, `H` and `W` height and width, `N` patches, `D` width.
"""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.mae import MaskedAutoencoder
from models.spec import MAESpec
from models.vit import VisionTransformer
from models.weights.info import WeightsInfo
from models.weights.load import load_autoencoder, load_classifier
from util.errors import InputError

GRAPHS = ("onnx", "export")
PARTS = ("encoder", "classifier", "autoencoder")
LARGEST_DIFFERENCE = 1e-4  # of a graph's fp32 output to PyTorch's
ONE_FILE = 3 * 2**29  # bytes of weights in one ONNX file; its format ends at 2 GiB
Run = Callable[..., Tensor | Sequence[Tensor]]  # a written graph, as the model is called


class Graph(nn.Module):
    """What a file holds: the model, and with `mean` and `std` the normalisation before it.

    Takes images `(B, C, H, W)` of the model's size: float and normalised, or uint8 with `mean` and
    `std`. An autoencoder also takes `ids_shuffle` `(B, N)` int64, whose first patches it sees.

    Gives features `(B, D)` or logits `(B, num_classes)`; of an autoencoder the painted images
    `(B, C, H, W)`, as normalised as its input or with `mean` and `std` in [0, 1], and the mask
    `(B, N)`, 1 = removed.
    """

    def __init__(
        self,
        model: MaskedAutoencoder | VisionTransformer,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        self.model = model
        self.normalizes = mean is not None
        self.mean = nn.Buffer(torch.tensor(mean or 0.0).view(-1, 1, 1))  # (C, 1, 1)
        self.std = nn.Buffer(torch.tensor(std or 1.0).view(-1, 1, 1))

    def forward(
        self, images: Tensor, ids_shuffle: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.normalizes:
            images = (images.float() / 255 - self.mean) / self.std  # (B, C, H, W)
        if isinstance(self.model, VisionTransformer):
            output: Tensor = self.model(images)
            return output
        pred, mask = self.model.reconstruct(images, ids_shuffle)
        painted = self.model.to_pixels(pred, images)  # (B, C, H, W)
        return painted * self.std + self.mean if self.normalizes else painted, mask


def model_part(
    tensors: dict[str, Tensor],
    info: WeightsInfo,
    path: str | Path,
    part: str | None = None,
    global_pool: Literal["avg", "token"] | None = None,
) -> MaskedAutoencoder | VisionTransformer:
    """A part of the model of a file; None is all that the file holds. `global_pool` is an encoder's
    (see `load_classifier`).

    Raises: InputError for a part that is not there, or if the file does not tell the model's heads
    or target.
    """
    if part is None:
        if info.task in ("segment", "detect"):
            raise InputError(
                f"{path} ({info.kind}): a graph holds no head for it: give --part encoder"
            )
        others = "classifier" if info.task else "encoder"
        part = "autoencoder" if isinstance(info.spec, MAESpec) else others
    if part == "autoencoder":
        return load_autoencoder(tensors, info, path)
    uses_head = part == "classifier"
    return load_classifier(tensors, info, path, uses_head=uses_head, global_pool=global_pool)


def check_can_write(target: Path, form: str) -> None:
    """Raises: InputError if a graph's file is already there, or its library is not installed."""
    for path in (target, data_path(target)):
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} is already there: name another target, or remove it")
    missing = [name for name in ("onnx", "onnxscript") if form == "onnx" and not find_spec(name)]
    if missing:
        raise InputError(
            f"format onnx needs {' and '.join(missing)}, not installed: pip install -e .[onnx]"
        )


def write_graph(graph: Graph, inputs: Sequence[Tensor], target: Path, form: str) -> float | None:
    """Writes a graph, and `<target>.data` beside a large ONNX one, and compares it with the model.

    Args:
        inputs: a batch to compare on, of two images or more; the first is compared alone, too.

    Returns: the largest difference of an output; None if the file could not be run, as onnxruntime
    is not installed. Raises: InputError, and no file is left, if it is above LARGEST_DIFFERENCE.
    """
    shapes = ({0: torch.export.Dim("batch")},) * len(inputs)  # the first dimension stays open
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        # torch.export.save asks for this ending
        path = folder / ("graph.pt2" if form == "export" else target.name)
        if form == "onnx":
            _write_onnx(graph, inputs, path, shapes)
        else:
            program = torch.export.export(graph, tuple(inputs), dynamic_shapes=shapes)
            torch.export.save(program, path)
        run = _onnx_runner(path) if form == "onnx" else torch.export.load(path).module()
        difference = None if run is None else _difference(graph, inputs, run)
        if difference is not None and not difference <= LARGEST_DIFFERENCE:
            raise InputError(
                f"{target} is not written: its output differs from PyTorch's by {difference:.3g}, "
                f"more than {LARGEST_DIFFERENCE:g}"
            )
        if data_path(path).exists():
            data_path(path).replace(data_path(target))
        path.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return difference


def data_path(path: Path) -> Path:
    """Where the weights of a large ONNX graph are."""
    return path.with_name(path.name + ".data")


def _write_onnx(
    graph: Graph, inputs: Sequence[Tensor], path: Path, shapes: tuple[object, ...]
) -> None:
    is_autoencoder = len(inputs) == 2
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    for name in ("onnxscript", "onnx_ir"):  # they tell of hundreds of steps
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of axes and the exporter's own libraries
        torch.onnx.export(
            graph,
            tuple(inputs),
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images", "ids_shuffle"][: len(inputs)],
            output_names=["images_painted", "mask"] if is_autoencoder else ["output"],
            external_data=size > ONE_FILE,
            verbose=False,
        )


def _onnx_runner(path: Path) -> Run | None:
    """None without onnxruntime."""
    if not find_spec("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
        return [torch.from_numpy(output) for output in session.run(None, arrays)]

    return run


@torch.no_grad()
def _difference(graph: Graph, inputs: Sequence[Tensor], run: Run) -> float:
    """The largest absolute difference on the whole batch and on its first image."""
    found = [0.0]
    for batch in (inputs, [tensor[:1] for tensor in inputs]):
        expected, outputs = (
            (output,) if isinstance(output, Tensor) else output
            for output in (graph(*batch), run(*batch))
        )
        for ours, theirs in zip(expected, outputs, strict=True):
            found.append((ours - theirs).abs().max().item())
    return max(found)
