"""What an autoencoder predicts, as pixels: the original, what the encoder saw, the prediction, and
the visible patches with the prediction in the gaps.

Shapes: `N` patches, `C` channels. Pixels are float in [0, 1].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data.transforms import PixelNormalizer
from models.mae import MaskedAutoencoder
from models.masks import Mask

REMOVED = 0.5  # grey of a removed patch
LOSS = "PSNR counts removed patches only; those of visible ones are trained only by visible_weight."
CAPTIONS = {  # by `norm_pix_loss`: what a reader has to know about pictures of predictions
    True: "The model predicts normalised pixels; "
    f"each patch's mean and variance are the original's. {LOSS}",
    False: f"The model predicts pixels as they are. {LOSS}",
}

LOWPASS = "Its target is the image without high frequencies."


class Reconstruction(NamedTuple):
    """Images `(C, H, W)`, and the psnr `()` in dB over the removed patches.

    masked: removed patches are grey. prediction: of every patch. pasted: the visible patches, and
    the prediction in place of the removed ones.
    """

    original: Tensor
    masked: Tensor
    prediction: Tensor
    pasted: Tensor
    psnr: Tensor


COLUMNS = Reconstruction._fields[:-1]  # the pictures among them


def caption_of(model: MaskedAutoencoder) -> str:
    """What a reader has to know about pictures of the model's predictions."""
    of_target = f" {LOWPASS}" if model.spec.target == "lowpass" else ""
    return CAPTIONS[model.norm_pix_loss] + of_target


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, image: Tensor, mask: Mask, normalize: PixelNormalizer
) -> Reconstruction:
    """The reconstruction of an image of pixels `(C, H, W)` under a mask."""
    images = normalize(image[None])  # (1, C, H, W)
    pred, removed = model.reconstruct(
        images, mask.ids_shuffle[None].to(normalize.device), mask.kept
    )  # (1, N, P*P*C) and (1, N)
    prediction = normalize.to_unit(model.to_pixels(pred, images))[0]  # (C, H, W)
    removed = model.unpatchify(removed.unsqueeze(-1).expand_as(pred))[0].bool()  # (C, H, W)
    original = normalize.to_unit(images)[0]  # (C, H, W)
    return Reconstruction(
        original=original,
        masked=torch.where(removed, REMOVED, original),
        prediction=prediction,
        pasted=torch.where(removed, prediction, original),
        psnr=-10 * (((prediction - original).square() * removed).sum() / removed.sum()).log10(),
    )
