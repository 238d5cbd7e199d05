"""A Vision Transformer with a head for each place of an image: segmentation and detection.

Source: plain ViT backbones of ViTDet (arXiv 2203.16527).

Shapes: `B` batch, `C` channels or classes, `D` width, `H` and `W` height and width of an image,
`h` and `w` rows and columns of patches.
"""

from typing import Any

from torch import Tensor, nn

from models.blocks import LAYER_NORM_EPS, init_weights
from models.heads.segmentation import LinearHead, to_pixels
from models.spec import DenseSpec
from models.vit import PatchEncoder, draw_normal


class DenseTransformer(PatchEncoder):
    """An encoder and a head, of images of any size that the patches divide.

    Args: the fields of `DenseSpec`, by keyword.

    Raises: InputError for a model that cannot be.
    """

    def __init__(self, **fields: Any):
        spec = DenseSpec(**fields).checked()
        super().__init__(spec, spec.drop_path_rate)
        self.spec = spec
        self.norm = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        init_weights(self, draw_normal)
        self.head = LinearHead(spec.embed_dim, spec.num_classes)

    def forward_map(self, images: Tensor) -> Tensor:
        """The normalised feature of each patch, `(B, C, H, W)` -> `(B, D, h, w)`."""
        x = self.run_blocks(self.blocks, self._embed(images))
        return self._as_map(self.norm(x), self.grid_of(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of each pixel: `(B, C, H, W)` float, already normalised -> `(B, classes, H, W)`
        float32."""
        return to_pixels(self.head(self.forward_map(images)), images.shape[-2:])
