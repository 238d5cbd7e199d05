"""What an autoencoder predicts, as pixels: the original, what the encoder saw, the prediction, and
the visible patches with the prediction in the gaps.

Shapes: `B` batch, `N` patches, `C` channels. Pixels are float in [0, 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.transforms import PixelNormalizer
from models.mae import MaskedAutoencoder
from models.masks import Mask

COLUMNS = ("original", "masked", "prediction", "pasted")
REMOVED = 0.5  # grey of a removed patch
NORMALISED_TARGET = (
    "The model predicts normalised pixels; each patch's mean and variance are the original's."
)
RAW_TARGET = "The model predicts pixels as they are."
LOSS = "Loss and PSNR count removed patches only; the predictions of visible ones are untrained."


class Reconstruction(NamedTuple):
    """Images `(B, C, H, W)` and psnr `(B,)` in dB over the removed patches.

    masked: removed patches are grey. prediction: of every patch. pasted: the visible patches, and
    the prediction in place of the removed ones.
    """

    original: Tensor
    masked: Tensor
    prediction: Tensor
    pasted: Tensor
    psnr: Tensor


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, images: Tensor, masks: Sequence[Mask], normalize: PixelNormalizer
) -> Reconstruction:
    """Reconstructions of uint8 images `(B, C, H, W)`, one mask each; all masks keep the same number
    of patches."""
    (kept,) = {mask.kept for mask in masks}
    ids_shuffle = torch.stack([mask.ids_shuffle for mask in masks]).to(normalize.device)  # (B, N)
    original = normalize(images)
    pred, mask = model.reconstruct(original, ids_shuffle, kept)
    pixels = normalize.to_unit(model.to_pixels(pred, original))
    original = normalize.to_unit(original)
    removed = model.unpatchify(mask.unsqueeze(-1).expand_as(pred)).bool()  # (B, C, H, W)
    errors = ((pixels - original).square() * removed).sum(dim=(1, 2, 3))  # (B,)
    return Reconstruction(
        original=original,
        masked=torch.where(removed, REMOVED, original),
        prediction=pixels,
        pasted=torch.where(removed, pixels, original),
        psnr=-10 * (errors / removed.sum(dim=(1, 2, 3))).log10(),
    )


def target_caption(model: MaskedAutoencoder) -> str:
    """What a reader has to know about pictures of this model's predictions."""
    return f"{NORMALISED_TARGET if model.norm_pix_loss else RAW_TARGET} {LOSS}"
