"""Detection and instance segmentation: torchvision's Faster R-CNN (arXiv 1506.01497) and Mask R-CNN
(arXiv 1703.06870) on the simple feature pyramid, as in ViTDet (arXiv 2203.16527).

The heads are torchvision's own: two linear layers on boxes, four convolutions on masks, without
the norms of ViTDet's.

Shapes: `B` batch, `D` width of the encoder, `E` width of the pyramid, `h` and `w` rows and columns
of patches, `n` objects of an image.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads.pyramid import Pyramid
from models.spec import DenseSpec, pair

ANCHOR_STEPS = 8  # side of an anchor in steps of its map, as 32 pixels at a step of 4
RATIOS = (0.5, 1.0, 2.0)  # of an anchor's height to its width
LEVELS = ("0", "1", "2", "3", "pool")  # torchvision's names of the maps, the finest first


class DetectionHead(nn.Module):
    """Boxes, scores, labels and perhaps masks of objects, from `(B, D, h, w)`.

    torchvision counts the background as class 0; outside this class labels count from 0.
    """

    def __init__(self, spec: DenseSpec):
        super().__init__()
        from torchvision.models.detection import FasterRCNN, MaskRCNN
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

        width, classes = spec.head_dim, spec.num_classes + 1
        self.pyramid = Pyramid(spec.embed_dim, width)
        self.patch_size = pair(spec.patch_size)[0]
        backbone = nn.Identity()  # what the constructor asks for; never called
        backbone.out_channels = width  # type: ignore[assignment]
        parts: dict[str, Any] = {
            "rpn_anchor_generator": anchors(self.patch_size),
            "rpn_batch_size_per_image": max(spec.region_samples // 2, 1),
            "box_batch_size_per_image": spec.region_samples,
            "box_head": TwoMLPHead(width * 7 * 7, 4 * width),
            "box_predictor": FastRCNNPredictor(4 * width, classes),
        }
        if spec.instance_masks:
            parts |= {
                "mask_head": MaskRCNNHeads(width, (width,) * 4, dilation=1),
                "mask_predictor": MaskRCNNPredictor(width, width, classes),
            }
        detector = (MaskRCNN if spec.instance_masks else FasterRCNN)(backbone, **parts)
        self.rpn, self.roi_heads = detector.rpn, detector.roi_heads

    def forward(
        self, features: Tensor, images: Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> Any:
        """As `DenseTransformer.forward`; `images` `(B, C, H, W)` say the size."""
        assert self.training == (targets is not None), "losses are for training, boxes for the rest"
        from torchvision.models.detection.image_list import ImageList

        maps = self.pyramid(features)
        maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))  # (B, E, h/4, w/4)
        if self.rpn.anchor_generator.cell_anchors[0].is_meta:  # they are no part of the state
            self.rpn.anchor_generator = anchors(self.patch_size)
        shown = ImageList(images, [(images.shape[-2], images.shape[-1])] * len(images))
        # Coordinates need more than half precision.
        with torch.autocast(images.device.type, enabled=False):
            levels = {name: x.float() for name, x in zip(LEVELS, maps, strict=True)}
            if targets is not None:
                targets = [_from_one(target, images.device) for target in targets]
            proposals, losses = self.rpn(shown, levels, targets)
            found, more = self.roi_heads(levels, proposals, shown.image_sizes, targets)
        return {**losses, **more} if targets is not None else [_from_nought(each) for each in found]


def anchors(patch_size: int) -> nn.Module:
    """torchvision's anchors on five maps whose steps begin at a quarter patch and double."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    steps = [patch_size // 4 * 2**level for level in range(len(LEVELS))]
    sizes = tuple((ANCHOR_STEPS * step,) for step in steps)
    return AnchorGenerator(sizes, (RATIOS,) * len(steps))


def _from_one(target: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """An annotation as torchvision takes it."""
    target = {name: values.to(device) for name, values in target.items()}
    return target | {"labels": target["labels"] + 1}


def _from_nought(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torchvision found in an image, with labels from 0 and masks `(n, 28, 28)`."""
    masks = {"masks": found["masks"].squeeze(1)} if "masks" in found else {}
    return found | {"labels": found["labels"] - 1} | masks
