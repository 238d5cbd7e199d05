"""What a model is: its geometry, tokens, decoder and readout as one frozen record.

Settings make a specification (`models/build.py`), the constructors take its fields by keyword,
checkpoints and weight files hold it, and recognising a foreign file yields one. A new
architecture flag is a field here, with its check in `problems`, and its use in the model.

Shapes: `N` patches, `K` kept patches, `M` predicted patches.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, TypeVar

from util.errors import InputError, where
from util.settings.base import pair as pair  # others take it from here

Size = int | tuple[int, int]
GRID_STRIDES = (2, 3, 4)  # of mask "grid"


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """K = floor(N * (1 - mask_ratio)), safe against float noise (N = 10, ratio 0.9 keeps 1)."""
    return math.floor(num_patches * (1 - mask_ratio) + 1e-6)


def mask_problems(num_patches: int, mask_ratio: float) -> list[str]:
    """Why this share of the patches cannot be removed."""
    kept = num_kept(num_patches, mask_ratio)
    return where(
        (
            num_patches and not 0 < kept < num_patches,
            f"mask_ratio {mask_ratio:g} keeps {kept} of {num_patches} patches: at least one must "
            "stay and one must go",
        )
    )


def grid_stride(mask_ratio: float) -> int | None:
    """Side in patches of the squares of which mask "grid" keeps one patch each; None for a ratio
    that it cannot have."""
    return next((s for s in GRID_STRIDES if abs(1 - 1 / s**2 - mask_ratio) < 0.01), None)


def kind_problems(
    kind: str, grid_size: tuple[int, int], mask_ratio: float, block: int
) -> list[str]:
    """Why a mask of this kind in `models/masks.py` does not go with this grid and ratio; `block` is
    the side in patches of the squares of kind "block"."""
    (rows, columns), stride = grid_size, grid_stride(mask_ratio)
    side = {"block": block, "grid": stride or 1}.get(kind, 1)
    fits = rows % side == columns % side == 0
    total, kept = rows * columns, num_kept(rows * columns, mask_ratio)
    ratios = ", ".join(f"{math.floor(1e4 * (1 - 1 / s**2)) / 1e4:g}" for s in GRID_STRIDES)
    return where(
        (
            kind == "block" and not fits,
            f"mask_block {block} does not divide the grid of {rows} x {columns} patches (large "
            "rectangles, for any grid, are mask blockwise)",
        ),
        (
            kind == "block" and fits and block**2 == total,
            f"mask_block {block} makes one square of all {rows} x {columns} patches",
        ),
        (
            kind == "grid" and stride is None,
            f"mask grid keeps one patch of every 4, 9 or 16: mask_ratio {ratios}, "
            f"got {mask_ratio:g}",
        ),
        (
            kind == "grid" and not fits,
            f"mask grid with mask_ratio {mask_ratio:g} needs a grid that {side} divides, got "
            f"{rows} x {columns} patches",
        ),
        (
            kind == "grid" and stride is not None and fits and side**2 * kept != total,
            f"mask_ratio {mask_ratio:g} keeps {kept} of {total} patches, and mask grid one of "
            f"every {side**2}: give one of {ratios}",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The encoder that all models share.

    img_size, patch_size: pixels, an int or (H, W); the patch divides the image.
    in_chans: image channels, any number.
    embed_dim, depth, num_heads: width, blocks and attention heads.
    mlp_ratio: width of the MLP over `embed_dim`; it holds for a decoder, too.
    class_tokens: number of learned tokens that precede the patches; their positions are zero.
    """

    img_size: Size
    patch_size: Size
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    class_tokens: int

    def __post_init__(self) -> None:
        # A square size is an int, so that equal models have equal records.
        for name in ("img_size", "patch_size"):
            height, width = pair(getattr(self, name))
            object.__setattr__(self, name, height if height == width else (height, width))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (p, q) = pair(self.img_size), pair(self.patch_size)
        return height // p, width // q

    @property
    def num_patches(self) -> int:
        """Number of patches, N."""
        return math.prod(self.grid_size)

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of the encoder's MLPs."""
        return int(self.embed_dim * self.mlp_ratio)

    def problems(self) -> list[str]:
        """What is wrong with this model, one line each."""
        sides = zip(pair(self.img_size), pair(self.patch_size), strict=True)
        return where(
            (self.class_tokens < 0, f"class_tokens must be 0 or more, got {self.class_tokens}"),
            (
                any(image % patch for image, patch in sides),
                f"patch_size {self.patch_size} does not divide img_size {self.img_size}",
            ),
            *_width_rows("", self.embed_dim, self.num_heads),
        )

    def checked(self) -> Self:
        """This specification. Raises: InputError with all its problems."""
        if found := self.problems():
            raise InputError("; ".join(found))
        return self

    def as_dict(self) -> dict[str, object]:
        """The fields as plain values, as checkpoints and weight files hold them."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class MAESpec(EncoderSpec):
    """A masked autoencoder.

    decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
    decoder_class_token: whether the class tokens go on through the decoder, as in the paper;
        otherwise they leave after `norm`.
    mask_ratio: share of the patches that is removed, in (0, 1).
    norm_pix_loss: the target is each patch normalised by its own mean and (unbiased) variance.
    decoder: "self", the paper's, or "cross" (arXiv 2401.14391).
    pred_ratio: "cross" only: share of all N patches that is predicted, drawn among the removed;
        None is all of those.
    decoder_fusion: number of encoder layers that the decoder reads a learned mix of (arXiv
        2308.00261; "cross": arXiv 2401.14391); 0 reads the last one.
    target: "pixels", or "lowpass", the image without high frequencies (arXiv 2303.02416).
    target_cutoff: "lowpass" only: the highest frequency that stays, over half the sampling rate;
        None is the paper's 40 / 112.
    """

    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    decoder_class_token: bool
    mask_ratio: float
    norm_pix_loss: bool
    decoder: Literal["self", "cross"] = "self"
    pred_ratio: float | None = None
    decoder_fusion: int = 0
    target: Literal["pixels", "lowpass"] = "pixels"
    target_cutoff: float | None = None

    @property
    def num_kept(self) -> int:
        """Number of patches that the encoder sees, K."""
        return num_kept(self.num_patches, self.mask_ratio)

    @property
    def decoder_class_tokens(self) -> int:
        """Number of class tokens that go on through the decoder."""
        return self.class_tokens if self.decoder_class_token else 0

    @property
    def num_predicted(self) -> int:
        """Number of predicted patches, M: all removed ones, or floor(N * pred_ratio) of them."""
        share = 1.0 if self.pred_ratio is None else self.pred_ratio
        return min(self.num_patches - self.num_kept, math.floor(self.num_patches * share + 1e-6))

    def problems(self) -> list[str]:
        """What is wrong with this model, one line each."""
        longest = max(pair(self.img_size))
        return [
            *super().problems(),
            *where(*_width_rows("decoder_", self.decoder_embed_dim, self.decoder_num_heads)),
            *mask_problems(self.num_patches, self.mask_ratio),
            *where(
                (
                    self.decoder_class_token and not self.class_tokens,
                    "decoder_class_token true needs class_tokens 1 or more: there is none to "
                    "pass on",
                ),
                (
                    self.decoder not in ("self", "cross"),
                    f"decoder must be self or cross, got {self.decoder!r}",
                ),
                (
                    self.pred_ratio is not None and self.decoder != "cross",
                    "pred_ratio belongs to decoder cross: the standard decoder sees all removed "
                    "patches",
                ),
                (
                    self.pred_ratio is not None
                    and (self.pred_ratio > self.mask_ratio or self.num_predicted <= 0),
                    f"pred_ratio {self.pred_ratio} must be at most mask_ratio "
                    f"{self.mask_ratio:g} and predict at least one of {self.num_patches} patches",
                ),
                (
                    self.decoder_fusion and not 2 <= self.decoder_fusion <= self.depth,
                    f"decoder_fusion {self.decoder_fusion} must be 2 to {self.depth}, the "
                    "encoder's depth, or 0 for the last layer alone",
                ),
                (
                    self.target not in ("pixels", "lowpass"),
                    f"target must be pixels or lowpass, got {self.target!r}",
                ),
                (
                    self.target_cutoff is not None and self.target != "lowpass",
                    "target_cutoff belongs to target lowpass",
                ),
                (
                    self.target_cutoff is not None and not 0 < self.target_cutoff <= 1,
                    f"target_cutoff must be in (0, 1], got {self.target_cutoff}",
                ),
                (
                    self.target == "lowpass" and (self.target_cutoff or 1) * longest < 2,
                    f"target_cutoff {self.target_cutoff} leaves less than one period of an image "
                    f"of {longest} pixels: take {2 / longest:.3g} or more",
                ),
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec(EncoderSpec):
    """A Vision Transformer classifier.

    num_classes: outputs of the head; 0 is a model without a head.
    global_pool: "avg", the mean over the patch tokens, "token", that over the class tokens, or
        "attentive", what learned queries gather from the patch tokens (arXiv 2506.10178).
    fc_norm: not with "token". True: mean, then `fc_norm` (no `norm`). False: `norm` on each token,
        then the mean. None becomes True with "avg" and False otherwise. With "attentive" each
        patch token passes the one norm or the other.
    drop_path_rate: stochastic depth (arXiv 1603.09382) of the last block, rising linearly from 0.
    probe_queries, probe_dim: "attentive" only: number of queries, and width of what they gather
        together.
    last_norm: False has neither norm: the readout takes the tokens as the last block leaves them.
    """

    num_classes: int
    global_pool: Literal["avg", "token", "attentive"]
    fc_norm: bool | None = None
    drop_path_rate: float = 0.0
    probe_queries: int | None = None
    probe_dim: int | None = None
    last_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fc_norm is None:
            object.__setattr__(self, "fc_norm", self.global_pool == "avg" and self.last_norm)

    def problems(self) -> list[str]:
        """What is wrong with this model, one line each."""
        reads_token, is_attentive = self.global_pool == "token", self.global_pool == "attentive"
        queries, dim = self.probe_queries, self.probe_dim
        return super().problems() + where(
            (
                self.global_pool not in ("avg", "token", "attentive"),
                f"global_pool must be avg, token or attentive, got {self.global_pool!r}",
            ),
            (
                [queries is None, dim is None] != [not is_attentive] * 2,
                "probe_queries and probe_dim go with global_pool attentive, which needs both, got "
                f"{queries} and {dim} with {self.global_pool}",
            ),
            (
                queries is not None
                and dim is not None
                and (queries < 1 or dim < 1 or dim % queries),
                f"probe_queries {queries} must be 1 or more and divide the width of the probe's "
                f"values, embed_dim * probe_value_ratio = {dim}",
            ),
            (
                reads_token and not self.class_tokens,
                "global_pool token reads the class tokens: it needs class_tokens 1 or more",
            ),
            (
                reads_token and self.fc_norm,
                "fc_norm does not go with global_pool token, whose norm comes first",
            ),
            (
                self.fc_norm and not self.last_norm,
                "last_norm false has no norm at all, and fc_norm is one",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class DenseSpec(EncoderSpec):
    """A Vision Transformer that says something about each place of an image.

    task: "segment", the class of each pixel, or "detect", boxes and perhaps masks of objects.
    num_classes: of the masks, the background being one if it has a value there; of detection those
        of the objects alone.
    dense_head: of "segment", "linear" or "fpn".
    instance_masks: of "detect", whether objects have masks (Mask R-CNN) or boxes alone.
    window_size: side in patches of the windows within which blocks attend; None attends to the
        whole image.
    global_blocks: number of blocks that attend to the whole image in spite of it.
    head_dim: channels of the pyramid and of the heads on it.
    region_samples: of "detect", boxes of an image that its second stage is trained on; half as many
        anchors train the first.
    drop_path_rate: as of a classifier.
    """

    task: Literal["segment", "detect"]
    num_classes: int
    dense_head: Literal["linear", "fpn"] = "fpn"
    instance_masks: bool = True
    window_size: int | None = None
    global_blocks: int = 4
    head_dim: int = 256
    region_samples: int = 512
    drop_path_rate: float = 0.0

    @property
    def head_fields(self) -> dict[str, object]:
        """What two models must have in common to have the same head."""
        names = ["task", "num_classes"]
        if self.task == "detect" or self.dense_head == "fpn":
            names.append("head_dim")
        names.append("dense_head" if self.task == "segment" else "instance_masks")
        return {name: getattr(self, name) for name in names}

    def problems(self) -> list[str]:
        """What is wrong with this model, one line each."""
        height, width = pair(self.patch_size)
        needs_pyramid = self.task == "detect" or self.dense_head == "fpn"
        return super().problems() + where(
            (self.num_classes < 1, f"num_classes must be 1 or more, got {self.num_classes}"),
            (
                self.task not in ("segment", "detect"),
                f"task must be segment or detect, got {self.task!r}",
            ),
            (
                self.dense_head not in ("linear", "fpn"),
                f"dense_head must be linear or fpn, got {self.dense_head!r}",
            ),
            (
                self.window_size is not None and self.window_size < 1,
                f"window_size must be 1 or more, got {self.window_size}",
            ),
            (
                self.window_size is not None and self.global_blocks > self.depth,
                f"global_blocks {self.global_blocks} is more than the encoder's depth {self.depth}",
            ),
            (
                needs_pyramid and (height != width or height % 4),
                f"patch_size {self.patch_size} must be square and a multiple of 4: the pyramid's "
                "finest map has a step of a quarter patch",
            ),
            (
                self.task == "detect" and height & (height - 1),
                f"patch_size {height} must be a power of 2 for task detect, as torchvision's RoI "
                "pooling needs it",
            ),
        )


ModelSpec = MAESpec | ClassifierSpec | DenseSpec
SpecT = TypeVar("SpecT", MAESpec, ClassifierSpec, DenseSpec)


def encoder_spec(
    spec: EncoderSpec, global_pool: Literal["avg", "token"] | None = None
) -> ClassifierSpec:
    """The encoder of a pretrained model, read through its own norm and without a head. Without
    `global_pool` the class tokens are read, if there are any."""
    shared = {f.name: getattr(spec, f.name) for f in fields(EncoderSpec)}
    return ClassifierSpec(
        **shared,
        num_classes=0,
        global_pool=global_pool or ("token" if spec.class_tokens else "avg"),
        fc_norm=False,
    )


def block_numbers(layers: Collection[int], depth: int) -> list[int]:
    """Blocks of a model with `depth` of them, counted from 0 and each once, in their order, from
    numbers that are also counted from -1 backwards. Raises: InputError for one that is not there.
    """
    if wrong := [layer for layer in layers if not -depth <= layer < depth]:
        raise InputError(
            f"layer {wrong[0]}: the model has {depth} blocks, from 0 to {depth - 1}",
            settings=("layer",),
        )
    return sorted({layer % depth for layer in layers})


def spec_from_dict(values: Mapping[str, Any]) -> ModelSpec:
    """The record that `as_dict` turned into plain values, or the one that a constructor's keywords
    describe. Raises: TypeError for other fields."""
    if "class_token" in values:  # of an earlier version, true or false
        values = dict(values)
        values["class_tokens"] = int(values.pop("class_token"))
    if "decoder_embed_dim" in values:
        return MAESpec(**values)
    return DenseSpec(**values) if "task" in values else ClassifierSpec(**values)


def checked_spec(kind: type[SpecT], fields: Mapping[str, Any]) -> SpecT:
    """The specification of this kind that a constructor's keywords describe. Raises: TypeError for
    other keywords, InputError with all problems."""
    spec = spec_from_dict(fields)
    if not isinstance(spec, kind):
        raise TypeError(
            f"these are the fields of a {type(spec).__name__}, not of a {kind.__name__}"
        )
    return spec.checked()


def _width_rows(part: str, embed_dim: int, num_heads: int) -> list[tuple[object, str]]:
    """For `where`: what is wrong with a transformer's width; `part` is a prefix of the names, as
    `decoder_`."""
    return [
        (
            num_heads <= 0 or embed_dim % num_heads,
            f"{part}num_heads {num_heads} must be 1 or more and divide {part}embed_dim {embed_dim}",
        ),
        (
            embed_dim % 4,
            f"{part}embed_dim {embed_dim} must be divisible by 4, for the position table",
        ),
    ]
