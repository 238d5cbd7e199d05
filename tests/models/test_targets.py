"""What is predicted: low frequencies in place of pixels, and visible patches beside the removed
ones."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from reference import MAE, randomized

from models.mae import PAPER_CUTOFF, MaskedAutoencoder, lowpass


def build(**changes) -> MaskedAutoencoder:
    return randomized(MaskedAutoencoder(**MAE | changes)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.rand(2, 16, generator=generator).argsort(dim=1)


def filtered_by_numpy(images: np.ndarray, cutoff: Fraction) -> np.ndarray:
    """The complete spectrum, of which the frequencies at the cut-off stay, exactly."""
    height, width = images.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(images), axes=(-2, -1))
    for row in range(height):
        for column in range(width):
            rows, columns = (
                Fraction(row - height // 2, height),
                Fraction(column - width // 2, width),
            )
            if 4 * (rows**2 + columns**2) > cutoff**2:
                spectrum[..., row, column] = 0
    result = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1)))
    assert np.abs(result.imag).max() < 1e-12
    return result.real


@pytest.mark.parametrize(
    ("size", "cutoff"),
    [
        ((32, 32), Fraction(1, 4)),
        ((12, 20), Fraction(1, 2)),
        ((9, 15), Fraction(1, 3)),
        ((56, 56), Fraction(40, 112)),  # (6, 8) has the length 10, and (10, 0), which just stay
        ((8, 8), Fraction(1)),
    ],
)
def test_low_frequencies_are_numpys_on_any_grid(size, cutoff):
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = filtered_by_numpy(images.numpy(), cutoff)
    found = lowpass(images, float(cutoff))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    assert (found - images).abs().max() > 0.1
    torch.testing.assert_close(lowpass(found, float(cutoff)), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("decoder", ["self", "cross"])
@pytest.mark.parametrize("cutoff", [None, 0.6])
def test_the_loss_on_low_frequencies_by_hand(norm_pix_loss, decoder, cutoff):
    of_target = {"target": "lowpass", "target_cutoff": cutoff}
    model = build(norm_pix_loss=norm_pix_loss, decoder=decoder, **of_target)
    images, ids = batch()
    pred, mask = model.reconstruct(images, ids)
    low = lowpass(images, cutoff or PAPER_CUTOFF)
    patches = model.patchify(low)
    if norm_pix_loss:
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        patches = (patches - mean) / (var + 1e-6).sqrt()
    error = (pred - patches).square().mean(-1)
    expected = ((error * mask).sum() / mask.sum()).item()
    assert model(images, ids).item() == pytest.approx(expected, abs=1e-12)
    # and a perfect prediction is drawn as the image without high frequencies
    torch.testing.assert_close(model.to_pixels(patches, images), low, rtol=0, atol=1e-9)
    # which the encoder never sees
    plain = build(norm_pix_loss=norm_pix_loss, decoder=decoder)
    assert torch.equal(plain.reconstruct(images, ids)[0], pred)


@pytest.mark.parametrize(
    "changes",
    [{}, {"decoder": "cross"}, {"decoder": "cross", "pred_ratio": 0.25}, {"target": "lowpass"}],
)
def test_visible_patches_count_by_their_weight(changes):
    model = build(**changes)
    images, ids = batch()
    pred, _ = model.reconstruct(images, ids)
    target = model.target(model.patchify(model.filtered(images)))
    error = (pred - target).square().mean(-1).gather(1, ids)  # in shuffled order, 4 are kept
    predicted = error[:, 4:8] if "pred_ratio" in changes else error[:, 4:]
    expected = predicted.mean() + 0.3 * error[:, :4].mean()
    torch.testing.assert_close(model(images, ids, 0.3), expected, rtol=0, atol=1e-12)
    assert torch.equal(model(images, ids, 0.0), model(images, ids))
