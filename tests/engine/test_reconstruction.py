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
from engine.pictures.reconstruction import Reconstruction, caption_of, reconstruct
from models.mae import MaskedAutoencoder
from models.masks import KINDS, RADIUS, Mask, draw_mask, draw_orders
from util.errors import InputError
from util.settings.base import IMAGENET_MEAN, IMAGENET_STD

MAE = {
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "class_tokens": 1,
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
    real = type(model).reconstruct
    monkeypatch.setattr(model, "reconstruct", lambda *given: (pred, real(model, *given)[1]))


def reconstructed(model: MaskedAutoencoder, image: torch.Tensor, mask: Mask) -> Reconstruction:
    return reconstruct(model, image, mask, normalizer(model.in_chans))


def random_mask(model: MaskedAutoencoder, seed: int = 0, mask_ratio: float = 0.6) -> Mask:
    return draw_mask("random", model.grid_size, mask_ratio, seeded(seed))


# Masks


@pytest.mark.parametrize("kind", ["random", "blockwise", "green", "block"])
@pytest.mark.parametrize("grid_size", GRIDS)
@pytest.mark.parametrize("mask_ratio", [0.1, 0.25, 0.5, 0.6, 0.75, 0.8, 0.9, 0.95])
def test_exactly_the_ratio_is_kept(kind, grid_size, mask_ratio):
    total = math.prod(grid_size)
    kept = math.floor(total * (1 - mask_ratio) + 1e-6)
    for seed in range(3 if 0 < kept < total else 0):
        mask = draw_mask(kind, grid_size, mask_ratio, seeded(seed), block=1)
        assert (mask.kept, mask.ids_shuffle.dtype) == (kept, torch.int64)
        assert mask.mask_ratio == pytest.approx(1 - kept / total)
        assert sorted(mask.ids_shuffle.tolist()) == list(range(total))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_a_function_of_its_seed(kind):
    """Drawn alone, or in training with those of other samples."""
    before, seeds = torch.get_rng_state(), (2, 5, 9, 2)  # of mask grid, other places of a square
    alone = [draw_mask(kind, (14, 14), 0.75, seeded(seed)) for seed in seeds]
    together = draw_orders(kind, (14, 14), 0.75, 2, map(seeded, seeds))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(together, torch.stack([mask.ids_shuffle for mask in alone]))
    masks = [removed_of(mask, (14, 14)) for mask in alone]
    assert np.array_equal(masks[0], masks[3])
    assert not any(np.array_equal(*pair) for pair in combinations(masks[:3], 2))


@pytest.mark.parametrize("kind", ["random", "block", "grid", "green"])
def test_every_patch_is_as_likely_to_be_kept_and_to_come_first(kind):
    """The last of 400: a decoder may predict only the first of the removed patches."""
    orders = draw_orders(kind, (6, 4), 0.75, 2, map(seeded, range(400)))  # (400, 24)
    for place in (slice(0, 6), slice(0, 1), slice(6, 7), slice(6, 15)):
        counts = torch.bincount(orders[:, place].flatten(), minlength=24)
        expected = counts.sum().item() / 24
        spread = (counts - expected).abs().max().item()
        assert spread < 5 * math.sqrt(expected * 2), (place, counts)


@pytest.mark.parametrize(("block", "grid_size"), [(2, (6, 8)), (4, (8, 12)), (3, (3, 9))])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_squares_are_kept_or_removed_together(block, grid_size, mask_ratio):
    """All but one, if K is not a multiple of its patches; and each with the same chance."""
    total = math.prod(grid_size)
    kept = math.floor(total * (1 - mask_ratio) + 1e-6)
    shares = []
    for seed in range(40):
        removed = removed_of(
            draw_mask("block", grid_size, mask_ratio, seeded(seed), block), grid_size
        )
        rows, columns = (side // block for side in grid_size)
        squares = removed.reshape(rows, block, columns, block).sum(axis=(1, 3)).flatten()
        assert removed.sum() == total - kept
        in_part = squares[(squares > 0) & (squares < block**2)]
        assert in_part.tolist() == ([block**2 - kept % block**2] if kept % block**2 else [])
        shares.append(squares < block**2)
    assert np.mean(shares, axis=0).min() > 0 and np.mean(shares, axis=0).max() < 1


@pytest.mark.parametrize("grid_size", [(14, 14), (8, 8), (5, 9), (1, 12)])
def test_green_masks_keep_the_lowest_values_of_filtered_noise(grid_size):
    """The noise is blurred here by loops over a kernel, in place of matrices."""
    total = math.prod(grid_size)
    kept = total // 4
    for seed in range(3):
        margin = RADIUS
        size = tuple(side + 2 * margin for side in grid_size)
        noise = torch.randn(size, generator=seeded(seed), dtype=torch.float64).numpy()
        offsets = np.arange(-margin, margin + 1)
        values = np.zeros(grid_size)
        for sign, sigma in ((1, 0.75), (-1, 1.5)):
            kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
            windows = sliding_window_view(noise, (len(offsets), len(offsets)))
            values += sign * (windows * kernel / kernel.sum()).sum(axis=(2, 3))
        expected = np.ones(total, dtype=bool)
        expected[values.flatten().argsort()[:kept]] = False
        mask = draw_mask("green", grid_size, 1 - kept / total, seeded(seed))
        assert np.array_equal(removed_of(mask, grid_size).flatten(), expected)


def test_green_masks_lack_high_and_low_frequencies():
    """Power of the kept patches by frequency, in periods over 32 patches: that of random masks is
    flat."""
    grid_size, bands = (32, 32), ((1, 3), (5, 8), (14, 16))
    frequency = np.abs(np.fft.fftfreq(32, 1 / 32))
    radius = np.hypot(frequency[:, None], frequency)
    power = {}
    for kind in ("random", "green"):
        drawn = [
            removed_of(draw_mask(kind, grid_size, 0.75, seeded(seed)), grid_size)
            for seed in range(30)
        ]
        spectrum = np.mean([np.abs(np.fft.fft2(one - one.mean())) ** 2 for one in drawn], axis=0)
        power[kind] = np.array(
            [spectrum[(low <= radius) & (radius <= high)].mean() for low, high in bands]
        )
    low, middle, high = power["green"] / power["random"]
    assert middle > 1.5 and low < 0.6 * middle and high < 0.6 * middle


def test_blockwise_masks_are_large():
    """The side of the largest square that is removed, on average."""

    def side(removed: np.ndarray) -> int:
        windows = (
            sliding_window_view(removed, (n, n)).all(axis=(2, 3)).any() for n in range(2, 15)
        )
        return 1 + sum(windows)

    def average(kind: str) -> float:
        masks = (draw_mask(kind, (14, 14), 0.5, seeded(seed)) for seed in range(40))
        return np.mean([side(removed_of(mask, (14, 14))) for mask in masks])

    assert average("random") < 4 and average("blockwise") > 5


@pytest.mark.parametrize(
    ("grid_size", "mask_ratio", "stride"),
    [((14, 14), 0.75, 2), ((6, 9), 0.8888, 3), ((6, 9), 8 / 9, 3), ((16, 8), 0.9375, 4)],
)
def test_a_grid_keeps_one_patch_of_every_square(grid_size, mask_ratio, stride):
    places = set()
    for seed in range(60):
        removed = removed_of(draw_mask("grid", grid_size, mask_ratio, seeded(seed)), grid_size)
        row, column = np.argwhere(~removed)[0]
        expected = np.ones(grid_size, dtype=bool)
        expected[row::stride, column::stride] = False
        assert np.array_equal(removed, expected)
        places.add((int(row), int(column)))
    assert places == {*np.ndindex(stride, stride)}


@pytest.mark.parametrize(
    ("kind", "mask_ratio"),
    [
        ("grid", 0.5),
        ("grid", 0.86),
        ("random", 0.0),
        ("block", 1.0),
        ("random", 0.95),
        ("grid", -1),
        ("grid", 0.89),  # of which 3 divides no grid of 4 x 4
    ],
)
def test_a_ratio_that_cannot_be_is_refused(kind, mask_ratio):
    with pytest.raises(InputError, match=f"mask_ratio .*{mask_ratio:g}"):
        draw_mask(kind, (4, 4), mask_ratio, seeded(0))


@pytest.mark.parametrize("grid_size", [(4, 6), (6, 4)])
def test_squares_that_do_not_fill_the_grid_are_refused(grid_size):
    with pytest.raises(InputError, match="mask_block 4"):
        draw_mask("block", grid_size, 0.75, seeded(0), block=4)


# Pixels


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
    for image, pred in zip(images, perfect(images, model), strict=True):
        answer_with(monkeypatch, model, pred[None])
        found = reconstructed(model, image, random_mask(model))
        assert (found.original - image.double() / 255).abs().max() < 1e-6
        for made in (found.prediction, found.pasted):
            assert (made - image.double() / 255).abs().max() < 1e-5
            assert np.array_equal(to_picture(made), to_picture(image))
        assert found.psnr > 90
    assert ("variance" in caption_of(model)) == norm_pix_loss
    assert "frequencies" not in caption_of(model)
    low = MaskedAutoencoder(**vars(model.spec) | {"target": "lowpass"})
    assert "frequencies" in caption_of(low)


# What is masked, and what is pasted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_gaps_are_grey_and_then_filled(shape, in_chans):
    model = autoencoder(shape, in_chans, norm_pix_loss=False)
    for seed, image in enumerate(pixels(model)[:2].flip(-1)):  # no pixel is 127.5 / 255
        mask = random_mask(model, seed)
        found = reconstructed(model, image, mask)
        for (y, x), gone in zip(places(model), removed_of(mask, model.grid_size).flat, strict=True):
            original, masked, prediction, pasted = (made[:, y, x] for made in found[:4])
            assert torch.equal((original * 255).round(), image[:, y, x].float())
            assert not torch.equal(prediction, original)
            assert torch.equal(masked, torch.full_like(original, 0.5) if gone else original)
            assert torch.equal(pasted, prediction if gone else original)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.9])
def test_the_model_is_asked_with_the_mask_of_the_image(mask_ratio):
    """Also for another ratio than the model's own."""
    model, normalize = autoencoder(norm_pix_loss=False), normalizer(3)
    for seed, image in enumerate(pixels(model)):
        mask = random_mask(model, seed, mask_ratio)
        found = reconstructed(model, image, mask)
        assert mask.kept == math.floor(16 * (1 - mask_ratio) + 1e-6)
        pred, _ = model.reconstruct(normalize(image[None]), mask.ids_shuffle[None], mask.kept)
        expected = normalize.to_unit(model.unpatchify(pred))[0]
        torch.testing.assert_close(found.prediction, expected, rtol=0, atol=1e-5)
        # With other pixels in the removed patches the prediction is the same.
        removed = torch.from_numpy(np.kron(removed_of(mask, (4, 4)), np.ones((8, 8))))
        again = reconstructed(model, torch.where(removed > 0, 255 - image, image), mask)
        torch.testing.assert_close(again.prediction, found.prediction, rtol=0, atol=1e-5)
        assert not torch.equal(again.original, found.original)


# PSNR


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_psnr_is_that_of_the_removed_patches_alone(monkeypatch, in_chans, norm_pix_loss):
    model = autoencoder(SHAPES[1], in_chans, norm_pix_loss)
    image, mask = pixels(model)[:1], random_mask(model)
    removed = removed_of(mask, model.grid_size).ravel()  # (N,)
    pred = perfect(image, model)
    noise = torch.randn(pred.shape, generator=seeded(0))

    def found(of_removed: float, of_visible: float) -> Reconstruction:
        scale = torch.from_numpy(np.where(removed, of_removed, of_visible)).float()[:, None]
        answer_with(monkeypatch, model, pred + scale * noise)
        return reconstructed(model, image[0], mask)

    usual = found(0.3, 0.3)
    shown, wanted = (to_vectors(made, model)[0] for made in (usual.prediction[None], image / 255))
    error = np.square(shown - wanted)[removed].mean()
    assert usual.psnr.item() == pytest.approx(10 * math.log10(1 / error), abs=1e-3)
    assert torch.equal(found(0.3, 5.0).psnr, usual.psnr)
    assert found(0.6, 0.3).psnr < usual.psnr - 2
