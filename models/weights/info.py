"""What a file of weights holds: the specification of its model, and what of it the file cannot
tell.

Files of other projects record neither the number of attention heads nor the target. A published
size may settle them; otherwise they are named in `WeightsInfo.unknown`, and `complete` takes them
from the user.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from models.spec import DenseSpec, ModelSpec, spec_from_dict
from util.errors import InputError

# What the model needs; the readout of a foreign classifier follows from its norm and class token.
ASKED_FOR = ("num_heads", "decoder_num_heads", "norm_pix_loss")


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """A description of a file of weights.

    kind: whose format it is and what it holds, as "MAE (autoencoder)".
    spec: the model. Without a decoder or a head for segmentation or detection it is a classifier,
        with `num_classes` 0 if there is no head.
    sha256: of the file's bytes; of several files, of their bytes one after the other.
    unknown: fields of `spec` that the file does not tell; the values there are stand-ins.
    mean, std: of the pixels in training, per channel; None is unknown.
    pixels: how files became pixels in training, by setting; empty is unknown.
    objective: what a classifier of this project is for, multiclass, multilabel or regression; None
        is unknown.
    class_names: of the outputs of a model of this project; None is unknown.
    """

    kind: str
    spec: ModelSpec
    sha256: str
    unknown: frozenset[str] = frozenset()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pixels: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    objective: str | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def task(self) -> str | None:
        """What the head is for: classify, segment or detect; None without a head."""
        if isinstance(self.spec, DenseSpec):
            return self.spec.task
        return "classify" if self.known("num_classes") else None

    def known(self, name: str) -> Any:
        """A field of `spec`; None if the file does not tell it or its model has no such field."""
        return None if name in self.unknown else getattr(self.spec, name, None)

    @property
    def head_problem(self) -> str:
        """Why the head cannot be used, nothing if it can. That of a regression in training predicts
        standardised numbers, and a checkpoint does not say of which mean and deviation."""
        if self.objective != "regression" or not self.kind.startswith("this project's checkpoint"):
            return ""
        return (
            "the checkpoint of a regression does not say the unit of its outputs: name the "
            "model.safetensors or best.safetensors of its run"
        )

    def __str__(self) -> str:
        values = [
            f"{name} {'unknown' if name in self.unknown else spelled(value)}"
            for name, value in asdict(self.spec).items()
        ]
        return f"{self.kind}: {', '.join(values)}"


def spelled(value: object) -> str:
    """A value as the settings spell it, with (H, W) as HxW."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower()


def complete(info: WeightsInfo, **given: object) -> WeightsInfo:
    """Fills in fields of the specification that the file does not tell; None leaves one unknown.

    Raises: InputError naming both sides where the file says otherwise, or for a model that cannot
    be.
    """
    given = {name: value for name, value in given.items() if value is not None}
    clashes = [
        f"{name} {spelled(info.known(name))} in the file, {spelled(value)} given"
        for name, value in given.items()
        if name not in info.unknown and info.known(name) != value
    ]
    if clashes:
        raise InputError("; ".join(clashes))
    spec = spec_from_dict({**vars(info.spec), **given}).checked()
    return replace(info, spec=spec, unknown=info.unknown - given.keys())


def require_known(info: WeightsInfo, names: Collection[str] = ASKED_FOR) -> None:
    """Raises: InputError naming those of these fields that the file does not tell."""
    if missing := sorted(info.unknown.intersection(names)):
        raise InputError(
            f"{info.kind}: the file does not say {', '.join(missing)}, which has to be given"
        )
