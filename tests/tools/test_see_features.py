"""`tools/see_features.py`: directions, neighbours and pictures of features."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import hubconf
from tools import embed, see_features
from tools.see_features import Seen, clusters, draw_neighbours, main_directions
from util.errors import InputError

CPU = ("--device", "cpu", "--precision", "fp32", "--num_workers", "0")


@pytest.fixture
def seen(monkeypatch) -> list[Seen]:
    """What the tool saw of each model."""
    found: list[Seen] = []
    see = see_features.see
    monkeypatch.setattr(
        see_features, "see", lambda *arguments: found.append(see(*arguments)) or found[-1]
    )
    return found


def draw(*arguments) -> dict[str, np.ndarray]:
    paths = see_features.main([*map(str, arguments), *CPU])
    return {name: np.asarray(Image.open(path)) for name, path in paths.items()}


def test_main_directions_are_those_of_a_singular_value_decomposition():
    features = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1.0, 9, 3, 7, 2, 5])
    found = main_directions(features, 3).numpy()
    centred = features.numpy() - features.numpy().mean(axis=0)
    u, s, vt = np.linalg.svd(centred)
    signs = np.sign(vt[range(3), np.abs(vt[:3]).argmax(axis=1)])
    np.testing.assert_allclose(found, u[:, :3] * s[:3] * signs, rtol=0, atol=1e-9)


def test_clusters_of_blobs_are_the_blobs():
    blobs = torch.arange(10).repeat(20)
    means = 100.0 * F.one_hot(blobs, 10) + torch.randn(200, 10)
    found = torch.tensor(clusters(means, 3))
    for number in range(10):  # two starts in one blob may share it, but none is mixed with another
        assert len(blobs[found == number].unique()) <= 2
    assert found.tolist() == clusters(means, 3)


def test_pictures_of_two_models(tmp_path, data, weights, seen):
    """Means are those of tools/embed.py, neighbours those of a plain search, and one basis and one
    scale serve all images of a model."""
    more = ("--finetune", weights, "--data_path", data, "--split", "val")
    drawn = draw(*more, "--save_path", tmp_path, "--beside", "random", "--num_images", 3)
    assert set(drawn) == {"patches", "similar", "neighbours", "map"}
    assert all(picture.std() > 10 for picture in drawn.values())
    embed.main([*map(str, more), "--output_file", str(tmp_path / "features.npz"), *CPU])
    with np.load(tmp_path / "features.npz") as file:
        expected = torch.from_numpy(file["avg"])
    trained, untrained = seen
    torch.testing.assert_close(trained.means, expected)
    assert not torch.allclose(untrained.means, expected, atol=0.1)
    assert trained.shown == [0, 30, 59] and len(trained.numbers) == 60
    encoder = hubconf.encoder(str(weights), global_pool="avg")
    pixels = torch.from_numpy(trained.picture(30)[..., 0])[None, None] / 255  # (1, 1, H, W)
    features = encoder.forward_map((pixels - encoder.mean) / encoder.std).detach()
    torch.testing.assert_close(trained.patches[1].permute(2, 0, 1)[None], features)

    alike = F.normalize(expected, dim=1)
    order = (alike @ alike[30]).argsort(descending=True).tolist()
    assert order[0] == 30
    searched = []

    def picture(place: int) -> np.ndarray:
        searched.append(place)
        return trained.picture(place)

    one = Seen(**{**trained.__dict__, "picture": picture, "shown": [30]})
    draw_neighbours([one], 5)
    assert searched == order[:6]

    again = draw(*more, "--save_path", tmp_path, "--beside", "random", "--num_images", 3)
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)


def test_places_and_layers(tmp_path, data, weights, seen):
    """Without the mean of their place, the patches of all images have a mean of zero there; a layer
    is the one of tools/embed.py."""
    more = ("--finetune", weights, "--data_path", data / "val", "--layer", 0, "--last_norm", False)
    shown = ("--num_images", 60, "--num_neighbours", 1)
    draw(*more, *shown, "--save_path", tmp_path, "--patch", 0, 1)
    draw(*more, *shown, "--save_path", tmp_path, "--remove_position")
    whole, less = seen
    assert less.patches.mean(dim=0).abs().max() < 1e-5 < whole.patches.mean(dim=0).abs().max()
    torch.testing.assert_close(less.patches, whole.patches - whole.patches.mean(dim=0))
    output = ("--output", "patch", "--output_file", tmp_path / "p.npz")
    embed.main([*map(str, (*more, *output)), *CPU])
    with np.load(tmp_path / "p.npz") as file:
        patches = torch.from_numpy(file["patch"])
    torch.testing.assert_close(whole.patches.flatten(1, 2), patches)


def test_what_cannot_be_drawn(tmp_path, data, weights, monkeypatch):
    shutil.copytree(data / "val", tmp_path / "images")
    first, *rest = sorted((tmp_path / "images").rglob("*.png"))
    monkeypatch.chdir(tmp_path)  # the pictures go to output/features
    more = ("--finetune", weights, "--data_path", "images")
    with pytest.raises(InputError, match=r"patch 9 0: there are \d rows"):
        draw(*more, "--patch", 9, 0)
    with pytest.raises(InputError, match="layer 7: the model has"):
        draw(*more, "--layer", 7)
    first.write_bytes(b"no image")
    draw(*more)
    for path in rest[1:]:
        path.unlink()
    with pytest.raises(InputError, match="fewer than two images that can be read"):
        draw(*more)
    mine = tmp_path / "mine" / "map.png"
    mine.parent.mkdir()
    Image.new("RGB", (4, 4)).save(mine)
    with pytest.raises(InputError, match="map.png was not made by this tool"):
        draw(*more, "--save_path", mine.parent)
