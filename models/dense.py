"""A Vision Transformer with a head for each place of an image: segmentation and detection.

Source: plain ViT backbones of ViTDet (arXiv 2203.16527).

Shapes: `B` batch, `C` channels or classes, `D` width, `H` and `W` height and width of an image,
`h` and `w` rows and columns of patches.
"""

from typing import Any

from torch import Tensor, nn

from models.blocks import LAYER_NORM_EPS, init_weights
from models.heads.detection import DetectionHead
from models.heads.segmentation import FpnHead, LinearHead, to_pixels
from models.spec import DenseSpec, checked_spec
from models.vit import PatchEncoder, draw_normal


class DenseTransformer(PatchEncoder):
    """An encoder and a head, of images of any size that the patches divide.

    Args: the fields of `DenseSpec`, by keyword.

    Raises: InputError for a model that cannot be.
    """

    def __init__(self, **fields: Any):
        spec = checked_spec(DenseSpec, fields)
        super().__init__(spec, spec.drop_path_rate)
        self.spec = spec
        self.norm = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        init_weights(self, draw_normal)
        places = global_places(spec.depth, spec.global_blocks)
        for index, block in enumerate(self.blocks):
            if index not in places:
                block.attn.window_size = spec.window_size  # type: ignore[union-attr]
        self.head: nn.Module
        if spec.task == "detect":
            self.head = DetectionHead(spec)
        elif spec.dense_head == "fpn":
            self.head = FpnHead(spec.embed_dim, spec.num_classes, spec.head_dim)
        else:
            self.head = LinearHead(spec.embed_dim, spec.num_classes)

    def forward_map(self, images: Tensor) -> Tensor:
        """The normalised feature of each patch, `(B, C, H, W)` -> `(B, D, h, w)`."""
        grid = self.grid_of(images)
        x = self.run_blocks(self.blocks, self._embed(images), grid=grid)
        return self._as_map(self.norm(x), grid)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """What the task asks for, of images `(B, C, H, W)`, float and already normalised.

        segment: logits of each pixel, `(B, classes, H, W)` float32. detect with `targets`, which
        are annotations with boxes in pixels of the images: the losses by torchvision's names,
        scalars whose sum is the loss. detect without: of each image up to 100 objects, the surest
        first, as "boxes" `(n, 4)` (left, top, right, bottom in pixels), "scores" `(n,)`, "labels"
        `(n,)` and with `instance_masks` "masks" `(n, 28, 28)`, probabilities within the box.
        """
        features = self.forward_map(images)
        if self.spec.task == "detect":
            return self.head(features, images, targets)
        return to_pixels(self.head(features), images.shape[-2:])


def global_places(depth: int, count: int) -> set[int]:
    """The indices of `count` blocks of `depth`, evenly spaced with the last one among them."""
    return {depth * (i + 1) // count - 1 for i in range(count)}
