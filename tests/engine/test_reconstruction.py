"""Masks for pictures, and what is made of a prediction: pixels, masked and pasted images, PSNR, the
caption.

Expected values come from numpy loops over the patches, not from the functions that are under test.
"""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from data.transforms import PixelNormalizer
from engine.pictures.drawing import to_picture
from engine.pictures.reconstruction import Reconstruction, reconstruct, target_caption
from models.mae import MaskedAutoencoder
from models.masks import MASKS, Mask, draw_mask
from util.errors import InputError
from util.settings.base import IMAGENET_MEAN, IMAGENET_STD

MAE = {
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "class_token": True,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "decoder_class_token": True,
    "mask_ratio": 0.75,
}
# image, patch: square; both of them not, over a grid of 4 x 3; a single row
SHAPES = [((32, 32), (8, 8)), ((24, 30), (6, 10)), ((8, 96), (8, 6))]
GRIDS = [(14, 14), (7, 7), (2, 2), (1, 12), (9, 1), (3, 5), (12, 8)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def removed_of(mask: Mask, grid_size: tuple[int, int]) -> np.ndarray:
    """Where a patch is removed, bool `(rows, columns)`."""
    removed = np.ones(math.prod(grid_size), dtype=bool)
    removed[mask.ids_shuffle[: mask.kept].numpy()] = False
    return removed.reshape(grid_size)


def autoencoder(
    shape=SHAPES[0], in_chans: int = 3, norm_pix_loss: bool = True
) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(
        img_size=shape[0],
        patch_size=shape[1],
        in_chans=in_chans,
        norm_pix_loss=norm_pix_loss,
        **MAE,
    ).eval()


def normalizer(in_chans: int) -> PixelNormalizer:
    return PixelNormalizer(IMAGENET_MEAN[:in_chans], IMAGENET_STD[:in_chans], torch.device("cpu"))


def pixels(model: MaskedAutoencoder) -> torch.Tensor:
    """Three uint8 images `(3, C, H, W)`: ramps of a direction and slope for each channel, noise,
    and all grey."""
    height, width = model.img_size
    rows, columns = np.mgrid[0:height, 0:width]
    ramps = np.stack([255 * columns // width, 255 - 200 * rows // height, 3 * rows + 2 * columns])[
        : model.in_chans
    ]
    noise = np.random.default_rng(0).integers(0, 256, ramps.shape)
    return torch.from_numpy(np.stack([ramps, noise, np.full_like(ramps, 90)]).astype(np.uint8))


def places(model: MaskedAutoencoder) -> list[tuple[slice, slice]]:
    """Rows and columns of the pixels of each patch, row by row."""
    (height, width), (p, q) = model.img_size, model.patch_size
    return [
        (slice(y, y + p), slice(x, x + q)) for y in range(0, height, p) for x in range(0, width, q)
    ]


def to_vectors(images: torch.Tensor, model: MaskedAutoencoder) -> np.ndarray:
    """Patches `(B, N, P*P*C)`, each vector in (p, p, c) order."""
    return np.stack(
        [
            [image[:, y, x].transpose(1, 2, 0).ravel() for y, x in places(model)]
            for image in images.double().numpy()
        ]
    )


def to_images(vectors: np.ndarray, model: MaskedAutoencoder) -> np.ndarray:
    """The way back, `(B, C, H, W)`."""
    images = np.empty((len(vectors), model.in_chans, *model.img_size))
    for image, of_image in zip(images, vectors, strict=True):
        for (y, x), vector in zip(places(model), of_image, strict=True):
            image[:, y, x] = vector.reshape(*model.patch_size, model.in_chans).transpose(2, 0, 1)
    return images


def statistics(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return vectors.mean(-1, keepdims=True), np.sqrt(vectors.var(-1, ddof=1, keepdims=True) + 1e-6)


def perfect(images: torch.Tensor, model: MaskedAutoencoder) -> torch.Tensor:
    """What a model without error would predict for uint8 images."""
    vectors = to_vectors(normalizer(model.in_chans)(images), model)
    if model.norm_pix_loss:
        mean, std = statistics(vectors)
        vectors = (vectors - mean) / std
    return torch.from_numpy(vectors).float()


def answer_with(monkeypatch, model: MaskedAutoencoder, pred: torch.Tensor) -> None:
    """Puts a prediction in the place of the model's; the mask stays its own."""
    real = model.reconstruct
    monkeypatch.setattr(model, "reconstruct", lambda *arguments: (pred, real(*arguments)[1]))


def reconstructed(
    model: MaskedAutoencoder, images: torch.Tensor, masks: list[Mask]
) -> Reconstruction:
    return reconstruct(model, images, masks, normalizer(model.in_chans))


def random_masks(model: MaskedAutoencoder, count: int, mask_ratio: float = 0.6) -> list[Mask]:
    return [draw_mask("random", model.grid_size, mask_ratio, seeded(seed)) for seed in range(count)]


# Masks


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize("grid_size", GRIDS)
def test_exactly_the_ratio_is_kept(kind, grid_size):
    total = math.prod(grid_size)
    checked = 0
    for mask_ratio in (0.1, 0.25, 0.5, 0.6, 0.75, 0.8, 0.9, 0.95):
        kept = math.floor(total * (1 - mask_ratio) + 1e-6)
        if kept in (0, total):
            continue
        for seed in range(3):
            mask = draw_mask(kind, grid_size, mask_ratio, seeded(seed))
            assert mask.kept == kept
            assert mask.mask_ratio == pytest.approx(1 - kept / total)
            assert sorted(mask.ids_shuffle.tolist()) == list(range(total))
            assert mask.ids_shuffle.dtype == torch.int64
            checked += 1
    assert checked >= 9


def test_no_float_noise_in_what_is_kept():
    assert draw_mask("random", (2, 5), 0.9, seeded(0)).kept == 1  # 10 * (1 - 0.9) is 0.99999...
    assert draw_mask("block", (14, 14), 0.75, seeded(0)).kept == 49


@pytest.mark.parametrize("kind", ["random", "block"])
def test_a_mask_is_a_function_of_its_seed(kind):
    masks = [
        removed_of(draw_mask(kind, (14, 14), 0.75, seeded(seed)), (14, 14)) for seed in range(5)
    ]
    again = [
        removed_of(draw_mask(kind, (14, 14), 0.75, seeded(seed)), (14, 14)) for seed in range(5)
    ]
    assert np.array_equal(masks, again)
    assert not any(np.array_equal(*pair) for pair in combinations(masks, 2))


def test_at_random_every_patch_is_as_likely():
    masks = [removed_of(draw_mask("random", (6, 4), 0.5, seeded(i)), (6, 4)) for i in range(200)]
    share = np.mean(masks, axis=0)  # 0.5 with a standard deviation of 0.035
    assert share.min() > 0.35 and share.max() < 0.65


def test_blocks_are_large():
    """The side of the largest square that is removed, on average."""

    def side(removed: np.ndarray) -> int:
        windows = (
            sliding_window_view(removed, (n, n)).all(axis=(2, 3)).any() for n in range(2, 15)
        )
        return 1 + sum(windows)

    sides = {
        kind: np.mean(
            [
                side(removed_of(draw_mask(kind, (14, 14), 0.5, seeded(i)), (14, 14)))
                for i in range(40)
            ]
        )
        for kind in ("random", "block")
    }
    assert sides["random"] < 4 and sides["block"] > 5


@pytest.mark.parametrize("grid_size", [(14, 14), (7, 7), (5, 9), (4, 4), (16, 8)])
@pytest.mark.parametrize(
    ("mask_ratio", "stride"), [(0.75, 2), (0.89, 3), (0.889, 3), (8 / 9, 3), (0.9375, 4)]
)
def test_a_grid_keeps_the_first_patch_of_every_square(grid_size, mask_ratio, stride):
    for seed in range(2):  # nothing is drawn
        mask = draw_mask("grid", grid_size, mask_ratio, seeded(seed))
        expected = np.ones(grid_size, dtype=bool)
        expected[::stride, ::stride] = False
        assert np.array_equal(removed_of(mask, grid_size), expected)
        assert mask.kept == (~expected).sum()
        assert sorted(mask.ids_shuffle.tolist()) == list(range(math.prod(grid_size)))


@pytest.mark.parametrize(
    ("kind", "mask_ratio"),
    [
        ("grid", 0.5),
        ("grid", 0.86),
        ("random", 0.0),
        ("block", 1.0),
        ("random", 0.95),
        ("grid", -1),
    ],
)
def test_a_ratio_that_cannot_be_is_refused(kind, mask_ratio):
    with pytest.raises(InputError, match=f"mask_ratio .*{mask_ratio:g}"):
        draw_mask(kind, (4, 4), mask_ratio, seeded(0))


def test_drawing_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for kind in MASKS:
        draw_mask(kind, (14, 14), 0.75, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)


# Pixels


@pytest.mark.parametrize("in_chans", [1, 3])
def test_to_unit_is_the_inverse_of_the_normaliser(in_chans):
    normalize = normalizer(in_chans)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, in_chans, 16, 16)
    assert (normalize.to_unit(normalize(every)).double() - every.double() / 255).abs().max() < 1e-6
    mean, std = (torch.tensor(v[:in_chans]).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    by_hand = (every.double() / 255 - mean) / std
    assert (normalize(every).double() - by_hand).abs().max() < 1e-5


def test_to_unit_cuts_off_what_no_pixel_can_be():
    values = torch.tensor([-math.inf, -1e9, -3.0, 3.0, 1e9, math.inf]).expand(1, 3, 1, 6)
    assert normalizer(3).to_unit(values)[0, 2, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_perfect_prediction_gives_the_original_back(monkeypatch, shape, in_chans, norm_pix_loss):
    """The channels' ramps differ in direction and slope: no other order of a patch's vector gives
    them back."""
    model = autoencoder(shape, in_chans, norm_pix_loss)
    images = pixels(model)
    answer_with(monkeypatch, model, perfect(images, model))
    found = reconstructed(model, images, random_masks(model, len(images)))
    expected = images.double() / 255
    assert (found.original - expected).abs().max() < 1e-6
    for made in (found.prediction, found.pasted):
        assert (made - expected).abs().max() < 1e-5
        for picture, image in zip(made, images, strict=True):
            assert np.array_equal(to_picture(picture), to_picture(image))
    assert (found.psnr > 90).all()


# What is masked, and what is pasted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_each_image_of_a_batch_has_its_own_gaps(shape, in_chans):
    model = autoencoder(shape, in_chans, norm_pix_loss=False)
    images = pixels(model).flip(-1)[[0, 1, 1, 0]]
    masks = random_masks(model, len(images))
    gaps = [removed_of(mask, model.grid_size).ravel() for mask in masks]
    assert not any(np.array_equal(*pair) for pair in combinations(gaps, 2))
    found = reconstructed(model, images, masks)
    p, q = model.patch_size
    for b, removed in enumerate(gaps):
        grey = int((found.masked[b] == 0.5).sum())  # no pixel of an original is 127.5 / 255
        assert grey == removed.sum() * p * q * in_chans
        for (y, x), gone in zip(places(model), removed, strict=True):
            original, masked, prediction, pasted = (made[b][:, y, x] for made in found[:4])
            assert torch.equal((original * 255).round(), images[b][:, y, x].float())
            assert not torch.equal(prediction, original)
            if gone:
                assert (masked == 0.5).all()
                assert torch.equal(pasted, prediction)
            else:
                assert torch.equal(masked, original)
                assert torch.equal(pasted, original)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.9])
def test_the_model_is_asked_with_the_mask_of_each_image(mask_ratio):
    """Alone or in a batch, and for another ratio than the model's own."""
    model, normalize = autoencoder(norm_pix_loss=False), normalizer(3)
    images = pixels(model)
    masks = random_masks(model, 3, mask_ratio)
    found = reconstructed(model, images, masks)
    for b, mask in enumerate(masks):
        assert mask.kept == math.floor(16 * (1 - mask_ratio) + 1e-6)
        pred, _ = model.reconstruct(normalize(images[b : b + 1]), mask.ids_shuffle[None], mask.kept)
        expected = torch.from_numpy(to_images(pred.detach().numpy(), model)).float()
        expected = normalize.to_unit(expected)
        torch.testing.assert_close(found.prediction[b : b + 1], expected, rtol=0, atol=1e-5)
        # With other pixels in the removed patches the prediction is the same.
        other = images[b].clone()
        for (y, x), removed in zip(places(model), removed_of(mask, (4, 4)).ravel(), strict=True):
            if removed:
                other[:, y, x] = 255 - other[:, y, x]
        again = reconstructed(model, other[None], [mask])
        torch.testing.assert_close(again.prediction[0], found.prediction[b], rtol=0, atol=1e-5)
        assert not torch.equal(again.original[0], found.original[b])


# PSNR


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_psnr_is_that_of_the_removed_patches_alone(monkeypatch, in_chans, norm_pix_loss):
    model = autoencoder(SHAPES[1], in_chans, norm_pix_loss)
    images = pixels(model)
    masks = random_masks(model, len(images))
    gaps = np.stack([removed_of(mask, model.grid_size).ravel() for mask in masks])  # (B, N)
    pred = perfect(images, model)
    noise = torch.randn(pred.shape, generator=seeded(0))
    answer_with(monkeypatch, model, pred + 0.3 * noise)
    found = reconstructed(model, images, masks)
    for b in range(len(images)):
        shown, wanted = (
            to_vectors(made[b : b + 1], model)[0] for made in (found.prediction, images / 255)
        )
        error = np.mean([(shown[n] - wanted[n]) ** 2 for n in np.flatnonzero(gaps[b])])
        assert found.psnr[b].item() == pytest.approx(10 * math.log10(1 / error), abs=1e-3)

    visible = torch.from_numpy(~gaps)[:, :, None]
    answer_with(monkeypatch, model, pred + torch.where(visible, 5.0, 0.3) * noise)
    assert torch.equal(reconstructed(model, images, masks).psnr, found.psnr)
    answer_with(monkeypatch, model, pred + torch.where(visible, 0.3, 0.6) * noise)
    assert (reconstructed(model, images, masks).psnr[:2] < found.psnr[:2] - 2).all()


def test_psnr_of_an_error_of_a_tenth_is_20_db(monkeypatch):
    """10 log10(1 / 0.1^2)."""
    model = autoencoder(in_chans=1, norm_pix_loss=False)
    images = torch.full((1, 1, 32, 32), 102, dtype=torch.uint8)  # 0.4
    answer_with(
        monkeypatch, model, torch.full((1, 16, 64), (0.5 - IMAGENET_MEAN[0]) / IMAGENET_STD[0])
    )
    assert reconstructed(model, images, random_masks(model, 1)).psnr.item() == pytest.approx(
        20, abs=1e-3
    )


def test_the_caption_tells_the_two_targets_apart():
    normalised, raw = (target_caption(autoencoder(norm_pix_loss=value)) for value in (True, False))
    assert "variance" in normalised and "variance" not in raw
