"""`tools/demo.py`: the numbers that it shows are those of the other tools, files that anybody may
send, and the page in a browser."""

import base64
import csv
import io
import json
import re
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect
from runs import command, environment, free_port, run
from test_images import animated, cmyk_jpeg, png
from test_mae_vis import SMALL, draw, noise, read
from test_rollout import saved

import hubconf
from data.images import BadImageError, PixelFormat, decode_image
from data.transforms import EvalTransform, PixelNormalizer
from engine.pictures import one_image
from engine.pictures.drawing import heat_over, to_picture
from engine.pictures.one_image import Viewer, open_viewer, painted_mask
from engine.pictures.reconstruction import COLUMNS
from engine.pictures.rollout import read_patches, rollout
from models.masks import KINDS, draw_mask
from tools import demo, embed, predict
from util.errors import InputError
from util.rng import MASK, generator
from util.settings.evaluation import FinetuneConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config
from util.settings.tools import DemoConfig

HEAD = {"size": "debug", "img_size": 32, "patch_size": 8, "num_classes": 5, "class_tokens": 1}
MALICIOUS = "<img src=x>{{name}}${name}`"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An autoencoder of RGB images of 32 x 32 and 4 x 4 patches, with a normalised target."""
    folder = tmp_path_factory.mktemp("weights")
    return saved(folder / "mae.safetensors", PretrainConfig(**SMALL))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    return saved(folder / "head.safetensors", FinetuneConfig(**HEAD))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ten images, one of which has a name that a page must not take for its own text."""
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate([*"abcdefghi", MALICIOUS]):
        noise(folder / f"{name}.png", seed)
    return folder


def viewer_of(weights: Path, *more: object) -> Viewer:
    flags = [str(word) for word in ("--model_path", weights, "--device", "cpu", *more)]
    return open_viewer(load_config(DemoConfig, "demo", flags), torch.device("cpu"))


def index_of(weights: Path, images: Path, path: Path, *more: object) -> Path:
    words = ["--finetune", weights, "--data_path", images, "--output_file", path, "--device", "cpu"]
    embed.main([str(word) for word in [*words, "--num_workers", 0, *more]])
    return path


# The numbers


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructions_are_those_of_run_mae_vis(weights, images, tmp_path, kind):
    file, viewer = images / "a.png", viewer_of(weights)
    more = ["--mask", kind, "--mask_ratio", 0.75, "--seed", 5, "--img_path", file]
    expected = draw(weights, tmp_path / "out", *more)
    mask = draw_mask(kind, (4, 4), 0.75, generator(5, MASK, 0))
    found = viewer.reconstruct(viewer.see(file), mask)[0]
    for column in COLUMNS:
        picture = to_picture(getattr(found, column))
        assert np.array_equal(picture, read(tmp_path / "out" / f"a_{column}.png")), column
    assert expected["psnr"] == {"a": found.psnr.item()}


def test_a_painted_mask_removes_what_was_painted_and_psnr_and_ssim_are_of_the_pictures(
    weights, images
):
    viewer, removed = viewer_of(weights), [14, 3, 3, 8]
    mask = painted_mask(removed, 16)
    assert sorted(mask.ids_shuffle.tolist()) == [*range(16)] and mask.kept == 13
    assert set(mask.ids_shuffle[13:].tolist()) == {3, 8, 14}
    seen = viewer.see(images / "a.png")
    found, ssim = viewer.reconstruct(seen, mask)
    blocks = (found.masked == 0.5).all(dim=0).view(4, 8, 4, 8).all(dim=3).all(dim=1)
    assert blocks.flatten().nonzero().flatten().tolist() == [3, 8, 14]
    gone = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(found.pasted[:, ~gone], found.original[:, ~gone])
    assert torch.equal(found.pasted[:, gone], found.prediction[:, gone])
    error = (found.prediction - found.original)[:, gone].double().square().mean()
    assert found.psnr.item() == pytest.approx(-10 * np.log10(error.item()), abs=1e-4)
    assert ssim == pytest.approx(structural_similarity(found.pasted, found.original), abs=1e-5)
    for wrong in ([], range(16), [16], [-1]):
        with pytest.raises(InputError, match="patches are removed"):
            painted_mask(wrong, 16)


def structural_similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of images (C, H, W) in [0, 1], in Gaussian windows of 11 x 11 pixels, mirrored at the edges.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity,
    2004, equation 13.
    """
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(window, window) / window.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, ((0, 0), (5, 5), (5, 5)), mode="reflect")
        views = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(1, 2))
        return (views * weights).sum(axis=(-2, -1))

    x, y = a.double().numpy(), b.double().numpy()
    of_x, of_y = mean(x), mean(y)
    variances = mean(x * x) - of_x**2 + mean(y * y) - of_y**2
    covariance = mean(x * y) - of_x * of_y
    light = (2 * of_x * of_y + 1e-4) / (of_x**2 + of_y**2 + 1e-4)
    return float((light * (2 * covariance + 9e-4) / (variances + 9e-4)).mean())


@pytest.mark.parametrize("class_tokens", [0, 2])
def test_attention_is_that_of_the_encoder(tmp_path, images, class_tokens):
    cfg = SMALL | {"class_tokens": class_tokens, "decoder_class_token": False}
    weights = saved(tmp_path / "w.safetensors", PretrainConfig(**cfg))
    viewer, model = viewer_of(weights), hubconf.encoder(str(weights))
    seen = viewer.see(images / "b.png")
    image = decode_image((images / "b.png").read_bytes(), PixelFormat(3))
    normalize = PixelNormalizer(viewer.info.mean, viewer.info.std, torch.device("cpu"))
    with torch.no_grad():
        maps = model.attention_maps(normalize(EvalTransform(32, None)(image)[None]))
    for layer, expected in enumerate(maps):
        for patch in (0, 7, 15):
            row = expected[0, :, class_tokens + patch, class_tokens:]
            torch.testing.assert_close(viewer.heads(seen, layer, patch), row)
        of_all = read_patches(expected[0], class_tokens)
        torch.testing.assert_close(viewer.heads(seen, layer, None), of_all)
    torch.testing.assert_close(viewer.rollout(seen), rollout(maps, "mean", 0.0, class_tokens)[0])


@pytest.mark.parametrize(
    ("ending", "more"),
    [
        ("npz", ()),
        ("safetensors", ("--pool", "token", "--layer", 0)),
        ("parquet", ("--last_norm", "false", "--crop_pct", 0.5, "--img_size", 40)),
    ],
)
def test_neighbours_are_the_nearest_features_of_embed(weights, images, tmp_path, ending, more):
    """Those of the image itself are in the index, so that its distance is 0."""
    path = index_of(weights, images, tmp_path / f"index.{ending}", *more)
    plain = path if ending == "npz" else index_of(weights, images, tmp_path / "plain.npz", *more)
    viewer = viewer_of(weights, "--index", path)
    with np.load(plain) as file:
        features, names = file["token" if "token" in more else "avg"], file["names"].tolist()
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = 1 - features @ features[names.index(str(images / "c.png"))]
    found = viewer.neighbours(viewer.see(images / "c.png"), 6)
    assert [name for name, _ in found] == [names[n] for n in distances.argsort()[:6]]
    assert [value for _, value in found] == pytest.approx(sorted(distances)[:6], abs=2e-6)
    assert found[0][0] == str(images / "c.png")
    thumbnail = viewer.thumbnail(found[0][0])
    assert torch.equal(thumbnail, viewer.see(images / "c.png").covering / 255)
    assert viewer.thumbnail("mnist5k[3]") is None


def test_an_index_that_does_not_belong_here_is_refused(weights, classifier, images, tmp_path):
    index = index_of(weights, images, tmp_path / "a.npz")
    patches = index_of(weights, images, tmp_path / "b.npz", "--output", "patch")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "d.npz", avg=np.ones((2, 3)), names=["a", "b"], origin=json.dumps({}))
    for flags, text in (
        (("--model_path", classifier, "--index", index), "other weights"),
        (("--index", index, "--mean", 0, 0, 0), "another mean"),
        (("--index", patches), "one feature of each image"),
        (("--index", tmp_path / "c.npz"), "no complete file"),
        (("--index", tmp_path / "d.npz"), "no complete file"),
        (("--index", tmp_path / "none.safetensors"), "no complete file"),
    ):
        with pytest.raises(InputError, match=text) as error:
            viewer_of(weights, *flags)
        assert error.value.settings == ("index",)


def test_a_classifier_has_classes_and_no_reconstruction(classifier, images, tmp_path):
    viewer = viewer_of(classifier)
    assert viewer.autoencoder is None and any("no decoder" in text for text in viewer.lacks)
    words = ["--finetune", classifier, "--data_path", images / "d.png", "--device", "cpu"]
    words += ["--output_file", tmp_path / "said.csv", "--num_workers", 0, "--topk", 5]
    predict.main([str(word) for word in words])
    with (tmp_path / "said.csv").open(newline="") as file:
        row = [*csv.reader(file)][1]
    found = viewer.classes(viewer.see(images / "d.png"))
    assert [name for name, _ in found] == row[2::2]
    assert [share for _, share in found] == pytest.approx([*map(float, row[3::2])], abs=1e-5)


# Files that anybody may send

TOO_WIDE = png(8000, 5000, 8, 0, zlib.compress(bytes(8001 * 5000)))
BAD = {
    "text": (b"#!/bin/sh\ntouch /tmp/ran\n", "identify"),
    "nothing": (b"", "empty"),
    "cut": (TOO_WIDE[:200], "8000 x 5000"),
    "40 megapixels": (TOO_WIDE, "8000 x 5000 pixels: 32,000,000 are allowed"),
    "bomb": (png(60_000, 60_000, 8, 2, zlib.compress(bytes(1000))), "too many pixels"),
    "bytes": (bytes(one_image.MOST_BYTES + 1), "bytes: 20,971,520 are allowed"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "identify"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_before_they_are_decoded(weights, tmp_path, monkeypatch, kind):
    content, text = BAD[kind]
    (tmp_path / "file").write_bytes(content)
    if kind in ("40 megapixels", "bomb", "bytes"):
        monkeypatch.setattr(one_image, "decode_image", None)
    with pytest.raises(BadImageError, match=text):
        viewer_of(weights).see(tmp_path / "file")


@pytest.mark.parametrize(
    "content", [cmyk_jpeg(), animated("WEBP", lossless=True)], ids=["CMYK", "animated WebP"]
)
def test_unusual_images_are_read_by_the_projects_reader(weights, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    image = decode_image(content, PixelFormat(3))
    assert torch.equal(
        viewer_of(weights).see(tmp_path / "file").covering, EvalTransform(32, 1.0)(image)
    )


# The page


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., str]]:
    """Starts the page with these flags and returns its address. At the end Ctrl-C ends it as it
    ends every tool, and the temporary folder is gone."""
    for name in ("temporary", "elsewhere"):
        (tmp_path / name).mkdir()
    started = []

    def start(*flags: object) -> str:
        port = free_port()
        words = [str(word) for word in (*flags, "--device", "cpu", "--port", port)]
        process = subprocess.Popen(
            command(*words, script="tools/demo.py"),
            env=environment(TMPDIR=str(tmp_path / "temporary")),
            cwd=tmp_path / "elsewhere",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert (
            process.stdout.readline() == f"The page is at http://127.0.0.1:{port}/ until Ctrl-C.\n"
        )
        assert len([*tmp_path.glob(f"temporary/{demo.UPLOADS}*")]) == len(started)
        return f"http://127.0.0.1:{port}/"

    yield start
    for process in started:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert (process.returncode, said.splitlines()[-1:]) == (130, ["interrupted"]), said
    left = [*tmp_path.glob("temporary/*"), *tmp_path.glob("elsewhere/*")]
    assert [path for path in left if not path.name.startswith("torchinductor")] == []  # torch's own


def sources(page: Page, part: str) -> list[str]:
    """The pictures of a part of the page, by its heading."""
    images = page.locator(f"xpath=//h2[.='{part}']/following-sibling::*//img")
    return images.evaluate_all("images => images.map(image => image.src)")


@pytest.mark.long
def test_a_visitor_uploads_paints_and_looks(weights, images, tmp_path, serve, browser, violations):
    asked = []
    browser.on("request", lambda request: asked.append(request.url))
    # gradio asks how far an upload is, and is told 404, which the console notes, if it is done
    done = 'data: {"msg": "done"}\n\n'
    browser.route(
        "**/upload_progress*",
        lambda route: route.fulfill(body=done, content_type="text/event-stream"),
    )
    index = index_of(weights, images, tmp_path / "index.npz")
    address = serve("--model_path", weights, "--index", index)
    browser.goto(address)
    status = browser.get_by_text("PSNR of the removed patches")
    expect(status).to_contain_text("12 of 16 patches removed")
    expect(browser.get_by_text("Classes are off")).to_be_visible()
    assert violations() == []

    def changes(part: str, act: Callable[[], object]) -> None:
        """Waits until the last picture of a part is another one."""
        before = sources(browser, part)[-1]
        act()
        browser.wait_for_function(
            """([part, before]) => [...document.querySelectorAll("h2")].some(title =>
              title.innerText === part
              && [...title.parentElement.querySelectorAll("img")].at(-1).src !== before)""",
            arg=[part, before],
        )

    upload = browser.locator("input[type=file]").first
    changes("Reconstruction", lambda: upload.set_input_files(images / "c.png"))
    nearest = browser.get_by_role("button", name="/c.png")
    expect(nearest).to_contain_text(re.compile(r"^0\.000\d: images\d+/c\.png$"))
    # names of files are shown, and are no part of the page
    expect(browser.get_by_text(f"{MALICIOUS}.png")).to_be_visible()

    share = browser.get_by_label("number input for Share that is removed")
    changes("Reconstruction", lambda: (share.fill("0.5"), share.press("Enter")))
    expect(status).to_contain_text("8 of 16 patches removed")
    before = sources(browser, "Reconstruction")
    browser.get_by_label("grid").check()
    expect(browser.get_by_text("mask grid keeps one patch")).to_be_visible()
    assert sources(browser, "Reconstruction") == before
    changes("Reconstruction", lambda: browser.get_by_label("blockwise").check())
    expect(status).to_contain_text("8 of 16 patches removed")

    # a stroke over the second row brings it back or removes it, as its first patch says
    cell = browser.locator("[data-cell]")
    boxes = [cell.nth(number).bounding_box() for number in (4, 7)]
    places = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes]
    gone = [number for number in range(16) if cell.nth(number).get_attribute("class")]
    row = {4, 5, 6, 7}
    expected = set(gone) - row if 4 in gone else set(gone) | row

    def stroke() -> None:
        browser.mouse.move(*places[0])
        browser.mouse.down()
        browser.mouse.move(*places[1], steps=12)
        browser.mouse.up()

    changes("Reconstruction", stroke)
    expect(status).to_contain_text(f"{len(expected)} of 16 patches removed")
    viewer = viewer_of(weights, "--index", index)
    seen = viewer.see(images / "c.png")
    found, ssim = viewer.reconstruct(seen, painted_mask(expected, 16))
    expect(status).to_contain_text(
        f"patches {found.psnr:.2f} dB, SSIM of the pasted picture {ssim:.3f}"
    )
    assert np.array_equal(
        picture_in(sources(browser, "Reconstruction")[3]), to_picture(found.pasted)
    )

    # by keyboard: patch 6, and then its left neighbour in the grid that the server has sent
    browser.get_by_label("removes or shows one").focus()
    for keys, reached in ((["ArrowRight", "ArrowRight", "ArrowDown"], 6), (["ArrowLeft"], 5)):
        changes("Reconstruction", lambda of=keys: [*map(browser.keyboard.press, [*of, "Space"])])
        expect(browser.locator("[data-cell][data-at]")).to_have_attribute("data-cell", f"{reached}")
        expected ^= {reached}

    changes("Attention", browser.locator("[data-pick='6'] >> xpath=self::span").click)
    expect(browser.get_by_text("from the patch in row 1, column 2")).to_be_visible()
    heat = heat_over(to_picture(seen.cropped), viewer.heads(seen, 1, 6)[-1].view(4, 4).numpy())
    assert np.array_equal(picture_in(sources(browser, "Attention")[-1]), heat)

    other = Path(viewer.neighbours(seen, 2)[1][0])
    changes("Reconstruction", browser.get_by_role("button", name=f"/{other.name}").click)
    pasted = viewer.reconstruct(viewer.see(other), painted_mask(expected, 16))[0].pasted
    assert np.array_equal(picture_in(sources(browser, "Reconstruction")[3]), to_picture(pasted))

    changes("Reconstruction", browser.get_by_title("cat", exact=True).click)
    found = viewer.reconstruct(
        viewer.see(demo.HERE / "photographs/cat.jpg"), painted_mask(expected, 16)
    )
    assert np.array_equal(
        picture_in(sources(browser, "Reconstruction")[3]), to_picture(found[0].pasted)
    )
    before = sources(browser, "Reconstruction")
    (tmp_path / "script.png").write_bytes(b"#!/bin/sh\necho <b>here</b>\n")
    upload.set_input_files(tmp_path / "script.png")
    expect(browser.get_by_text("This image cannot be shown: it cannot identify")).to_be_visible()
    assert sources(browser, "Reconstruction") == before
    browser.goto(f"{address}?__theme=dark")
    expect(status).to_be_visible()
    assert violations() == []
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}


def picture_in(source: str) -> np.ndarray:
    """The pixels of a picture in a page."""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.asarray(image)


@pytest.mark.long
def test_a_classifier_has_a_page_without_reconstructions(classifier, images, serve, browser):
    browser.goto(serve("--model_path", classifier))
    expect(browser.get_by_text("Reconstruction is off: head.safetensors (")).to_be_visible()
    expect(browser.get_by_text("rollout over all layers")).to_be_visible()
    expect(browser.locator(".mae-classes tr")).to_have_count(5)
    expect(browser.get_by_label("number input for Share that is removed")).to_be_hidden()
    viewer = viewer_of(classifier)
    shares = viewer.classes(viewer.see(demo.PHOTOGRAPHS[0]))
    rows = browser.locator(".mae-classes tr").all_inner_texts()
    assert [row.split() for row in rows] == [[name, f"{share:.3g}"] for name, share in shares]


def test_weights_for_four_channels_have_a_page_that_waits_for_a_file(tmp_path):
    more = {"in_chans": 4, "mean": (0.5,) * 4, "std": (0.2,) * 4}
    weights = saved(tmp_path / "w.safetensors", PretrainConfig(**SMALL | more))
    viewer = viewer_of(weights)
    with pytest.raises(BadImageError, match="has 3 channels"):
        viewer.see(demo.PHOTOGRAPHS[0])
    page = demo.build_page(viewer, DemoConfig())
    called = {found.name: found.fn for found in page.fns.values()}
    mask, strip = called["redraw"](None, "random", 0.5, 3)  # before any image is shown
    assert (mask.kept, strip, called["attend"](None, None, 1)) == (8, "", "")
    np.save(tmp_path / "image.npy", np.full((40, 40, 4), 51, np.uint8))
    seen = viewer.see(tmp_path / "image.npy")
    found = viewer.reconstruct(seen, painted_mask([0], 16))[0]
    assert found.original.shape == (4, 32, 32)
    torch.testing.assert_close(found.original, torch.full((4, 32, 32), 0.2))


def test_make_installs_what_the_page_needs_and_starts_it():
    make = ["make", "--no-print-directory", "--dry-run", "--always-make"]  # as tests run in make
    printed = run([*make, "demo", "DEMO=--port 8000"]).stdout
    lines = printed.splitlines()
    assert lines.index(".venv/bin/python -m pip install --quiet -e '.[demo]'") > lines.index(
        ".venv/bin/python -m pip install -r requirements.txt"
    )
    assert lines[-1] == ".venv/bin/python tools/demo.py --port 8000"


def test_channels_that_the_weights_do_not_have_are_one_line(weights):
    with pytest.raises(InputError, match="up to in_chans 3, got 4") as error:
        viewer_of(weights, "--show_channels", 4)
    assert error.value.settings == ("show_channels",)


@pytest.mark.long
def test_a_port_in_use_and_no_gradio_are_one_line(weights):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = run(command("--model_path", str(weights), "--port", port, script="tools/demo.py"))
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: port {port} of share_on 127.0.0.1 cannot be used")
    without = "import sys; sys.modules['gradio'] = None; from tools import demo; "
    without += "from util.errors import run_cli; run_cli(demo.main)"
    found = run([sys.executable, "-c", without])
    assert (found.returncode, found.stderr) == (
        2,
        "error: the demo page needs gradio: pip install -e .[demo]\n",
    )
