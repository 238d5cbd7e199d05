"""A page in the browser that shows what a model makes of a photograph: what it paints over the gaps
of a mask, where it attends, which images it finds alike, and which class it sees.

    python tools/demo.py --model_path /path/to/pretrain/model

Without `--model_path` it takes weights that come with this project. `--index` is a file of
tools/embed.py from the same weights, among whose images neighbours are searched. The page is for
browsers of this machine alone unless `--share_on` says otherwise. What is uploaded lies in a
temporary folder, which is removed at the end.
"""

import base64
import html
import io
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from data.images import BadImageError
from engine.pictures.drawing import heat_over, to_picture
from engine.pictures.one_image import MOST_BYTES, Seen, Viewer, open_viewer, painted_mask
from engine.pictures.reconstruction import caption_of
from models.masks import KINDS, Mask, draw_mask
from util.dist import init_processes
from util.errors import InputError, run_cli
from util.rng import MASK, generator
from util.settings.evaluation import STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import DemoConfig

if TYPE_CHECKING:
    import gradio

HERE = Path(__file__).parent
PHOTOGRAPHS = sorted((HERE / "photographs").glob("*.jpg"))
NUM_NEIGHBOURS, NUM_CLASSES = 8, 5  # that are shown at most
UPLOADS = "mae-demo-"  # the temporary folder's name begins so
MOST_VISITORS = 16  # whose images are kept in memory
OLDEST = 3600  # seconds after which what was uploaded is removed


class Choice(NamedTuple):
    """What a visitor looks at: the image, the patch whose attention is shown (None is the class
    token's), and the files of the neighbours."""

    seen: Seen
    patch: int | None
    neighbours: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until it is interrupted."""
    cfg = load_config(DemoConfig, "demo", argv, siblings=STAGE_CONFIGS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        init_processes(cfg.device) as processes,
        tempfile.TemporaryDirectory(prefix=UPLOADS) as uploads,
    ):
        check_gradio(uploads)
        check_port(cfg)
        page = build_page(open_viewer(cfg, processes.device), cfg)
        page.launch(
            server_name=cfg.share_on,
            server_port=cfg.port,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MOST_BYTES,
            state_session_capacity=MOST_VISITORS,
            footer_links=[],
            theme=own_theme(),
            css=(HERE / "demo.css").read_text(encoding="utf-8"),
        )
        try:
            print(f"The page is at http://{cfg.share_on}:{cfg.port}/ until Ctrl-C.", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def check_gradio(uploads: str) -> None:
    """Imports gradio, which asks nobody over the network, and writes to the folder `uploads`.

    Raises: InputError where it is not installed.
    """
    os.environ |= {
        "GRADIO_TEMP_DIR": uploads,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError("the demo page needs gradio: pip install -e .[demo]") from error


def check_port(cfg: DemoConfig) -> None:
    """Raises: InputError if no page can be offered there."""
    try:
        socket.create_server((cfg.share_on, cfg.port)).close()
    except OSError as error:
        raise InputError(
            f"port {cfg.port} of share_on {cfg.share_on} cannot be used "
            f"({error.strerror or error}): give another --port",
            settings=("port", "share_on"),
        ) from error


def own_theme() -> "gradio.themes.Base":
    """Without fonts of other servers, and with enough contrast of small texts."""
    import gradio as gr

    theme = gr.themes.Default(
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    return theme.set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300"
    )


def build_page(viewer: Viewer, cfg: DemoConfig) -> "gradio.Blocks":
    """The page: what a visitor chooses, and beside it what the model makes of that."""
    import gradio as gr

    active = partial(gr.HTML, js_on_load=(HERE / "demo.js").read_text(encoding="utf-8"))
    listen = partial(
        gr.on, show_progress="hidden", trigger_mode="always_last", api_visibility="private"
    )
    draws, finds, names = viewer.autoencoder, viewer.index, viewer.classifier
    depth = len(viewer.encoder.blocks)

    def draw(kind: str, ratio: float, seed: float | None) -> Mask | str:
        """The mask, or why there is none."""
        grid = viewer.encoder.grid_size if draws is None else draws.grid_size
        try:
            return draw_mask(kind, grid, ratio, generator(int(seed or 0), MASK, 0), cfg.mask_block)
        except InputError as error:
            return str(error)

    def choose(path: str | Path, mask: Mask | str | None, layer: float) -> list[object]:
        """All parts of the page for another image."""
        try:
            seen = viewer.see(Path(path))
        except (OSError, BadImageError) as error:
            said = html.escape(f"This image cannot be shown: it {error}")
            raise gr.Error(said, print_exception=False) from error
        mask = mask or draw("random", 0.75, 0)  # there is none if nothing could be shown yet
        near = viewer.neighbours(seen, NUM_NEIGHBOURS) if finds else []
        choice = Choice(seen, None, [name for name, _ in near])
        return [
            choice,
            mask,
            show_reconstruction(viewer, cfg, seen, mask) if draws else "",
            show_attention(viewer, cfg, choice, int(layer)),
            show_neighbours(viewer, cfg, near),
            render("classes", classes=viewer.classes(seen)[:NUM_CLASSES]) if names else "",
        ]

    def begin(kind: str, ratio: float, seed: float | None, layer: float) -> list[object]:
        return choose(PHOTOGRAPHS[0], draw(kind, ratio, seed), layer)

    def choose_photograph(mask: Mask, layer: float, event: gr.EventData) -> list[object]:
        return choose(PHOTOGRAPHS[int(event.number)], mask, layer)

    def choose_neighbour(
        choice: Choice, mask: Mask, layer: float, event: gr.EventData
    ) -> list[object]:
        return choose(choice.neighbours[int(event.number)], mask, layer)

    def redraw(
        choice: Choice, kind: str, ratio: float, seed: float | None
    ) -> tuple[Mask | str, str]:
        mask = draw(kind, ratio, seed)
        return mask, show_reconstruction(viewer, cfg, choice.seen, mask)

    def paint(choice: Choice, event: gr.EventData) -> tuple[Mask | str, str]:
        assert draws is not None, "there is nothing to paint on without it"
        mask: Mask | str
        try:
            mask = painted_mask([int(patch) for patch in event.removed], draws.num_patches)
        except InputError as error:
            mask = str(error)
        return mask, show_reconstruction(viewer, cfg, choice.seen, mask)

    def attend(choice: Choice, layer: float) -> str:
        return show_attention(viewer, cfg, choice, int(layer))

    def choose_patch(choice: Choice, layer: float, event: gr.EventData) -> tuple[Choice, str]:
        choice = choice._replace(patch=int(event.number))
        return choice, attend(choice, layer)

    with suppress(gr.Error):  # of weights for other images than photographs
        begin("random", 0.75, 0, depth - 1)  # so that the first visitor does not wait for imports
    title = "What a masked autoencoder sees"
    opened = [(path.stem, Image.open(path)) for path in PHOTOGRAPHS]
    items = [(name, name, np.asarray(image.resize((96, 96)))) for name, image in opened]
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(OLDEST, OLDEST)) as page:
        choice, mask = gr.State(), gr.State()
        gr.HTML(
            render(
                "title",
                title=title,
                name=Path(cfg.model_path).name,
                viewer=viewer,
                spec=viewer.encoder.spec,
            )
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photographs = active(render("buttons", title="Photographs", items=items, hint=""))
                upload = gr.File(label="An image of your own", height=140)
                with gr.Accordion("Camera", open=False):
                    camera = gr.Image(
                        sources=["webcam"], type="filepath", image_mode=None, label="Camera"
                    )
                with gr.Group(visible=draws is not None):
                    kind = gr.Radio([*KINDS], value="random", label="Mask")
                    ratio = gr.Slider(0.05, 0.95, 0.75, step=0.01, label="Share that is removed")
                    seed = gr.Number(0, label="Seed of the mask", precision=0, minimum=0)
                layer = gr.Slider(
                    0, depth - 1, depth - 1, step=1, label="Layer of the heads", visible=depth > 1
                )
            with gr.Column(scale=3, min_width=300):
                strip, heads = active(visible=draws is not None), active()
                classes = gr.HTML(visible=names is not None)
                near = active(visible=finds is not None)
        controls, parts = [kind, ratio, seed], [choice, mask, strip, heads, near, classes]
        listen(page.load, begin, [*controls, layer], parts)
        listen(photographs.select, choose_photograph, [mask, layer], parts)
        listen(upload.upload, choose, [upload, mask, layer], parts)
        listen(upload.upload, None, None, upload, js="() => null")  # is ready for another one
        listen(camera.input, choose, [camera, mask, layer], parts)
        listen(near.select, choose_neighbour, [choice, mask, layer], parts)
        redraws = [kind.input, ratio.input, seed.input]
        listen(redraws, redraw, [choice, *controls], [mask, strip])
        listen(strip.input, paint, choice, [mask, strip])
        listen(heads.select, choose_patch, [choice, layer], [choice, heads])
        listen(layer.input, attend, [choice, layer], heads)
    return page


def show_reconstruction(viewer: Viewer, cfg: DemoConfig, seen: Seen, mask: Mask | str) -> str:
    """The image, the mask to paint on, the prediction, and both together; where there is no mask,
    why."""
    assert viewer.autoencoder is not None, "the page has no such part without one"
    removed, painted, said = [], {}, str(mask)
    if not isinstance(mask, str):
        removed = mask.ids_shuffle[mask.kept :].tolist()
        found, ssim = viewer.reconstruct(seen, mask)
        for name in ("prediction", "pasted"):
            painted[name] = to_picture(getattr(found, name), cfg.show_channels)
        said = (
            f"PSNR of the removed patches {found.psnr:.2f} dB, SSIM of the pasted picture "
            f"{ssim:.3f}, {len(removed)} of {len(mask.ids_shuffle)} patches removed."
        )
    return render(
        "reconstruction",
        original=to_picture(seen.covering.float() / 255, cfg.show_channels),
        grid=viewer.autoencoder.grid_size,
        removed=removed,
        painted=painted,
        said=said,
        caption=caption_of(viewer.autoencoder),
    )


def show_attention(viewer: Viewer, cfg: DemoConfig, choice: Choice, layer: int) -> str:
    """The image to choose a patch on, the rollout, and what each head of a layer attends to."""
    grid = viewer.encoder.grid_size
    image = to_picture(choice.seen.cropped.float() / 255, cfg.show_channels)
    heads = viewer.heads(choice.seen, layer, choice.patch)  # (heads, N)
    rows = [viewer.rollout(choice.seen), heads.mean(dim=0), *heads]
    rollout, mean, *others = (heat_over(image, row.view(grid).numpy()) for row in rows)
    return render(
        "attention",
        grid=grid,
        image=image,
        patch=choice.patch,
        layer=layer,
        class_tokens=viewer.encoder.class_tokens,
        rollout=rollout,
        mean=mean,
        heads=others,
    )


def show_neighbours(viewer: Viewer, cfg: DemoConfig, near: list[tuple[str, float]]) -> str:
    """Buttons of the nearest images of the index; those whose files are not there cannot be
    chosen."""
    items = []
    for name, distance in near:
        image = viewer.thumbnail(name)
        picture = None if image is None else to_picture(image, cfg.show_channels)
        items.append((name, f"{distance:.4f}: {'/'.join(Path(name).parts[-2:])}", picture))
    hint = "Cosine distance of the features, and the image's name. Click one to look at it."
    return render("buttons", title="Nearest images", items=items, hint=hint)


def render(part: str, **values: object) -> str:
    """A part of the page, by its name in the template, with all texts escaped."""
    return template().render(part=part, **values)


@cache
def template() -> jinja2.Template:
    """The parts of the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["png"] = data_uri
    return environment.get_template("demo.html.jinja")


def data_uri(picture: np.ndarray) -> str:
    """A picture, uint8 `(H, W, 3)`, within a page."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


if __name__ == "__main__":
    run_cli(main)
