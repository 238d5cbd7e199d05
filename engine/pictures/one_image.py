"""Everything that a file of weights says about one image: the reconstruction under any mask, the
attention, the nearest images of an index, the classes.

Shapes: `C` channels, `H` and `W` height and width, `N` patches, `T` tokens, `D` width, `n` images.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from data.images import BadImageError, array_kind, decode_image, open_image, pixel_format
from data.parquet import import_parquet
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.apply import Answers, with_weights
from engine.evaluation.features import on_pixels
from engine.evaluation.readers import feature_reader, head_of, output_reader
from engine.pictures.reconstruction import Reconstruction, reconstruct
from engine.pictures.rollout import read_patches, rollout
from models.mae import MaskedAutoencoder
from models.masks import Mask
from models.vit import VisionTransformer
from models.weights.info import ASKED_FOR, WeightsInfo, complete
from models.weights.load import load_autoencoder, load_classifier
from models.weights.read import read_weights
from util.errors import InputError, where
from util.settings.tools import DemoConfig, EmbedConfig

MOST_BYTES = 20 * 2**20  # of a file
MOST_PIXELS = 32_000_000  # of a photograph; arrays have the limits of `data/arrays.py`


class Seen(NamedTuple):
    """An image as the model sees it, `(C, H, W)`: `covering` resized to cover its size, as pictures
    of reconstructions have it, and `cropped` as features and classes are computed from it; and the
    attention of each block on `cropped`, `(heads, T, T)`."""

    covering: Tensor
    cropped: Tensor
    attentions: list[Tensor]


@dataclass(frozen=True)
class Viewer:
    """The models of a file of weights, and what there is besides; None is what is not there, which
    `lacks` says in a sentence each.

    cfg: the settings of the features, with what the weights record.
    cover: resizes images to cover the size of those that are reconstructed.
    normalize: makes pixels what the models take, on their device.
    features, names: `(n, D)` of length 1, of the images of an index, and what these are called.
    """

    cfg: EmbedConfig
    info: WeightsInfo
    cover: EvalTransform
    normalize: PixelNormalizer
    encoder: VisionTransformer
    autoencoder: MaskedAutoencoder | None
    classifier: VisionTransformer | None
    features: Tensor | None
    names: list[str]
    lacks: list[str]

    @torch.no_grad()
    def see(self, path: Path) -> Seen:
        """Raises: BadImageError for a file that is no image, too large, or of another kind than
        the settings ask for."""
        image = read_bounded(path, self)
        cropped = EvalTransform(self.encoder.spec.img_size, self.cfg.crop_pct)(image)
        pixels = self.normalize(cropped[None])
        attentions = [a[0].float().cpu() for a in self.encoder.iterate_attention(pixels)]
        return Seen(self.cover(image), cropped, attentions)

    def reconstruct(self, seen: Seen, mask: Mask) -> tuple[Reconstruction, float]:
        """The reconstruction, and the structural similarity of its `pasted` to the original."""
        from torchmetrics.image import StructuralSimilarityIndexMeasure  # here, as it takes long

        assert self.autoencoder is not None, "the page offers no mask without one"
        found = reconstruct(self.autoencoder, seen.covering, mask, self.normalize)
        measure = StructuralSimilarityIndexMeasure(data_range=1.0)
        return found, measure(found.pasted[None].cpu(), found.original[None].cpu()).item()

    def rollout(self, seen: Seen) -> Tensor:
        """Each patch's contribution to the class tokens, or without one to the mean patch, over all
        layers, `(N,)`."""
        return rollout((a[None] for a in seen.attentions), "mean", 0.0, self.encoder.class_tokens)[
            0
        ]

    def heads(self, seen: Seen, layer: int, patch: int | None) -> Tensor:
        """What the heads of a layer attend to from a patch, or without one from the class tokens
        (from the mean patch where there are none): `(heads, N)`."""
        attention, first = seen.attentions[layer], self.encoder.class_tokens
        return (
            read_patches(attention, first) if patch is None else attention[:, first + patch, first:]
        )

    def neighbours(self, seen: Seen, count: int) -> list[tuple[str, float]]:
        """The names and cosine distances of the images of the index that are nearest."""
        if self.features is None:
            return []
        feature = F.normalize(self._answer(feature_reader, self.encoder, seen), dim=0)  # (D,)
        distances = (1 - self.features @ feature).clamp(min=0)  # (n,)
        nearest = distances.topk(min(count, len(distances)), largest=False)
        return [
            (self.names[number], distance)
            for distance, number in zip(*map(Tensor.tolist, nearest), strict=True)
        ]

    def thumbnail(self, name: str) -> Tensor | None:
        """The image `(C, H, W)`, in [0, 1], of a name in the index; None if no such file can be
        read."""
        try:
            return self.cover(read_bounded(Path(name), self)).float() / 255
        except (OSError, BadImageError):
            return None

    def classes(self, seen: Seen) -> list[tuple[str, float]]:
        """The names and probabilities of the classes, the most probable first; of a regression the
        names and values of what it predicts."""
        if self.classifier is None:
            return []
        outputs = self._answer(output_reader, self.classifier, seen).double()  # (classes,)
        head = head_of(self.info)
        if head.objective == "regression":
            return list(zip(head.names, outputs.tolist(), strict=True))
        shares = outputs.softmax(dim=0) if head.objective == "multiclass" else outputs.sigmoid()
        return sorted(zip(head.names, shares.tolist(), strict=True), key=lambda of: -of[1])

    @torch.no_grad()
    def _answer(
        self,
        reader: Callable[
            [EmbedConfig, VisionTransformer, WeightsInfo], tuple[Callable[[Tensor], Answers], int]
        ],
        model: VisionTransformer,
        seen: Seen,
    ) -> Tensor:
        """The one array that is read off a model for an image, `(D,)` or `(classes,)`."""
        read, device = reader(self.cfg, model, self.info)[0], self.normalize.device
        answers = on_pixels(read, self.cfg, self.cfg.precision, device)(seen.cropped[None])
        return next(iter(answers.values()))[0].float().cpu()


def open_viewer(cfg: DemoConfig, device: torch.device) -> Viewer:
    """Reads the weights and the index.

    Raises: InputError for weights or an index that cannot be read, that do not belong together, or
    that do not fit the settings.
    """
    tensors, info = read_weights(cfg.model_path)
    info = complete(info, **{name: getattr(cfg, name) for name in ASKED_FOR})
    if problems := where(*cfg.show_rows(info.spec.in_chans)):
        raise InputError("; ".join(problems), settings=("show_channels",))
    stated = cfg.model_fields_set & EmbedConfig.model_fields.keys()
    settings = {**cfg.model_dump(include={*stated}), "finetune": cfg.model_path}
    embed, features, names = EmbedConfig.model_validate(settings), None, list[str]()
    name, lacks, autoencoder, classifier = Path(cfg.model_path).name, [], None, None
    if cfg.index is None:
        lacks.append("Neighbours are off: --index names a file that tools/embed.py has written.")
    else:
        embed, features, names = read_index(Path(cfg.index), info, settings)
    embed = with_weights(embed, info)
    load = partial(load_classifier, tensors, info, name, img_size=embed.img_size)
    encoder = load(uses_head=False).to(device)
    try:
        autoencoder = load_autoencoder(tensors, info, name).to(device)
    except InputError as error:
        lacks.append(f"Reconstruction is off: {error}.")
    try:
        classifier = load(uses_head=True).to(device)
    except InputError as error:
        lacks.append(f"Classes are off: {error}.")
    return Viewer(
        cfg=embed,
        info=info,
        cover=EvalTransform((autoencoder or encoder).spec.img_size, 1.0),
        normalize=PixelNormalizer(embed.mean, embed.std, device),
        encoder=encoder,
        autoencoder=autoencoder,
        classifier=classifier,
        features=features,
        names=names,
        lacks=lacks,
    )


def read_bounded(path: Path, viewer: Viewer) -> Tensor:
    """An image file that anybody may have sent, `(C, H, W)`, as `decode_image` reads it.

    Raises: BadImageError for a file that is no image or larger than MOST_BYTES or MOST_PIXELS.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise BadImageError(f"has {size:,} bytes: {MOST_BYTES:,} are allowed")
    encoded = path.read_bytes()
    pixels = pixel_format(viewer.cfg, viewer.info.spec.in_chans)
    if not array_kind(encoded, pixels):
        with open_image(BytesIO(encoded)) as image:  # before anything is decoded
            if image.height * image.width > MOST_PIXELS:
                raise BadImageError(
                    f"has {image.width} x {image.height} pixels: {MOST_PIXELS:,} are allowed, so "
                    "make it smaller"
                )
    return decode_image(encoded, pixels)


def painted_mask(removed: Collection[int], num_patches: int) -> Mask:
    """The mask that removes exactly these patches.

    Raises: InputError if it removes none, all, or some that do not exist.
    """
    gone = set(removed)
    if not 0 < len(gone) < num_patches or not gone <= set(range(num_patches)):
        raise InputError(
            f"{len(gone)} of {num_patches} patches are removed: remove at least one, and keep one"
        )
    kept = [patch for patch in range(num_patches) if patch not in gone]
    return Mask(torch.tensor([*kept, *sorted(gone)]), len(kept))


def read_index(
    path: Path, info: WeightsInfo, settings: dict[str, object]
) -> tuple[EmbedConfig, Tensor, list[str]]:
    """What tools/embed.py wrote from the weights of `info`, if it agrees with the `settings` that
    the user states: its settings, the features `(n, D)`, of length 1, and the images' names.

    Raises: InputError for another file, other weights or settings, or several features of an image.
    """
    try:
        arrays, names, origin = _read_features(path)
        stored = json.loads(origin)
        weights = stored["weights"]
        of_features = {name: stored[name] for name in EmbedConfig.model_fields if name in stored}
        cfg = EmbedConfig.model_validate(settings | of_features)
    except Exception as error:
        raise InputError(
            f"index {path} is no complete file of tools/embed.py: {error}", settings=("index",)
        ) from error
    ours = EmbedConfig.model_validate(settings)
    others = [name for name in settings if getattr(cfg, name) != getattr(ours, name)]
    shapes = {name: array.shape for name, array in arrays.items()}
    if problems := where(
        (weights != info.sha256, "it comes from other weights"),
        (others, f"it was written with another {' '.join(others)}"),
        (
            len(arrays) != 1 or any(len(shape) != 2 for shape in shapes.values()),
            f"it must have one feature of each image, and has {shapes}: --output image, one "
            "--pool and one --layer write such a file",
        ),
    ):
        raise InputError(f"index {path}: {'; '.join(problems)}", settings=("index",))
    features = torch.from_numpy(next(iter(arrays.values()))).float()  # (n, D)
    return cfg, F.normalize(features, dim=1), names


def _read_features(path: Path) -> tuple[dict[str, np.ndarray], list[str], str]:
    """The arrays, the images' names and the JSON of their origin in a file of tools/embed.py."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        return arrays, arrays.pop("names").tolist(), str(arrays.pop("origin"))
    if path.suffix == ".parquet":
        table = import_parquet().read_table(path)
        columns = {*table.column_names} - {"names"}
        arrays = {name: np.stack(table[name].to_numpy()) for name in columns}
        return arrays, table["names"].to_pylist(), table.schema.metadata[b"origin"].decode()
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        origin = file.metadata()["origin"]
    return arrays, arrays.pop("names").tobytes().decode().splitlines(), origin
