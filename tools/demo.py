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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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
TEMPLATE = jinja2.Template(
    (HERE / "demo.html.jinja").read_text(encoding="utf-8"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)
NUM_NEIGHBOURS, NUM_CLASSES = 8, 5  # that are shown at most
UPLOADS = "mae-demo-"  # the temporary folder's name begins so
MOST_VISITORS = 16  # whose images are kept in memory
OLDEST = 3600  # seconds after which what was uploaded is removed, and between two such removals


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until it is interrupted."""
    cfg = load_config(DemoConfig, "demo", argv, siblings=STAGE_CONFIGS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        init_processes(cfg.device) as processes,
        tempfile.TemporaryDirectory(prefix=UPLOADS) as uploads,
    ):
        os.environ |= {
            "GRADIO_TEMP_DIR": uploads,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        try:
            import gradio as gr
        except ImportError as error:
            raise InputError("the demo page needs gradio: pip install -e .[demo]") from error
        check_port(cfg)
        page = build_page(open_viewer(cfg, processes.device), cfg)
        # without fonts of other servers, and with enough contrast of small texts
        theme = gr.themes.Default(
            font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
        ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
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
            theme=theme,
            css=(HERE / "demo.css").read_text(encoding="utf-8"),
        )
        try:
            print(f"The page is at http://{cfg.share_on}:{cfg.port}/ until Ctrl-C.", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)


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


def build_page(viewer: Viewer, cfg: DemoConfig) -> "gradio.Blocks":
    """The page: what a visitor chooses, and beside it what the model makes of that."""
    import gradio as gr

    active = partial(gr.HTML, js_on_load=(HERE / "demo.js").read_text(encoding="utf-8"))
    listen = partial(
        gr.on, show_progress="hidden", trigger_mode="always_last", api_visibility="private"
    )
    draws, depth = viewer.autoencoder is not None, len(viewer.encoder.blocks)
    rows, columns = (viewer.autoencoder or viewer.encoder).grid_size

    @contextmanager
    def explained(subject: str = "") -> Iterator[None]:
        """Tells the visitor what is wrong with an image or a mask; the page stays as it is."""
        try:
            yield
        except (OSError, BadImageError, InputError) as error:
            raise gr.Error(html.escape(f"{subject}{error}"), print_exception=False) from error

    def draw(kind: str, ratio: float, seed: float | None) -> Mask | None:
        stream = generator(int(seed or 0), MASK, 0)
        return draw_mask(kind, (rows, columns), ratio, stream, cfg.mask_block) if draws else None

    def choose(path: str | Path, mask: Mask | None, layer: float) -> list[object]:
        """All that another image changes."""
        with explained("This image cannot be shown: it "):
            seen = viewer.see(Path(path))
        near = viewer.neighbours(seen, NUM_NEIGHBOURS)
        return [
            seen,
            None,
            [name for name, _ in near],
            show_reconstruction(viewer, cfg, seen, mask),
            attend(seen, None, layer),
            show_neighbours(viewer, cfg, near),
            render("classes", classes=viewer.classes(seen)[:NUM_CLASSES]),
        ]

    def choose_button(
        paths: list[str | Path], mask: Mask | None, layer: float, event: gr.EventData
    ) -> list[object]:
        return choose(paths[int(event.number)], mask, layer)

    def redraw(
        seen: Seen | None, kind: str, ratio: float, seed: float | None
    ) -> tuple[Mask | None, str]:
        with explained():
            mask = draw(kind, ratio, seed)
        return mask, show_reconstruction(viewer, cfg, seen, mask)

    def paint(seen: Seen | None, event: gr.EventData) -> tuple[Mask, str]:
        with explained():
            mask = painted_mask([int(patch) for patch in event.removed], rows * columns)
        return mask, show_reconstruction(viewer, cfg, seen, mask)

    def attend(seen: Seen | None, patch: int | None, layer: float) -> str:
        return show_attention(viewer, cfg, seen, patch, int(layer)) if seen else ""

    def choose_patch(seen: Seen | None, layer: float, event: gr.EventData) -> tuple[int, str]:
        return (patch := int(event.number)), attend(seen, patch, layer)

    first = draw("random", 0.75, 0)
    with suppress(gr.Error):  # of weights for other images than photographs
        choose(PHOTOGRAPHS[0], first, depth - 1)  # the first visitor does not wait for imports
    items = [
        (path.stem, path.stem, np.asarray(Image.open(path).resize((96, 96))))
        for path in PHOTOGRAPHS
    ]
    with gr.Blocks(
        title="What a masked autoencoder sees",
        analytics_enabled=False,
        delete_cache=(OLDEST, OLDEST),
    ) as page:
        # what a visitor looks at: the image, the patch whose attention is shown (None is the class
        # token's), the files of the neighbours, and the mask
        seen, patch, nearest, mask = gr.State(), gr.State(), gr.State([]), gr.State(first)
        gr.HTML(render("title", name=Path(cfg.model_path).name, viewer=viewer))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photographs = active(render("buttons", title="Photographs", items=items, hint=""))
                upload = gr.File(label="An image of your own", height=140)
                with gr.Accordion("Camera", open=False):
                    camera = gr.Image(
                        sources=["webcam"], type="filepath", image_mode=None, label="Camera"
                    )
                with gr.Group(visible=draws):
                    kind = gr.Radio([*KINDS], value="random", label="Mask")
                    ratio = gr.Slider(0.05, 0.95, 0.75, step=0.01, label="Share that is removed")
                    seed = gr.Number(
                        0, label="Seed of the mask", precision=0, minimum=0, maximum=2**31 - 1
                    )
                layer = gr.Slider(
                    0, depth - 1, depth - 1, step=1, label="Layer of the heads", visible=depth > 1
                )
            with gr.Column(scale=3, min_width=300):
                strip, heads = active(visible=draws), active()
                classes = gr.HTML(visible=viewer.classifier is not None)
                near = active(visible=viewer.features is not None)
        shown, parts = [mask, layer], [seen, patch, nearest, strip, heads, near, classes]
        listen(page.load, lambda *of: choose(PHOTOGRAPHS[0], *of), shown, parts)
        listen(photographs.select, choose_button, [gr.State(PHOTOGRAPHS), *shown], parts)
        listen(upload.upload, choose, [upload, *shown], parts)
        listen(upload.upload, None, None, upload, js="() => null")  # is ready for another one
        listen(camera.input, choose, [camera, *shown], parts)
        listen(near.select, choose_button, [nearest, *shown], parts)
        controls = [kind, ratio, seed]
        listen([kind.input, ratio.input, seed.input], redraw, [seen, *controls], [mask, strip])
        listen(strip.input, paint, seen, [mask, strip])
        listen(heads.select, choose_patch, [seen, layer], [patch, heads])
        listen(layer.input, attend, [seen, patch, layer], heads)
    return page


def show_reconstruction(
    viewer: Viewer, cfg: DemoConfig, seen: Seen | None, mask: Mask | None
) -> str:
    """The image, the mask to paint on, the prediction, and both together."""
    if viewer.autoencoder is None or seen is None or mask is None:
        return ""
    found, ssim = viewer.reconstruct(seen, mask)
    pictures = [found.original, found.prediction, found.pasted]
    return render(
        "reconstruction",
        pictures=[to_picture(picture, cfg.show_channels) for picture in pictures],
        grid=viewer.autoencoder.grid_size,
        removed=mask.ids_shuffle[mask.kept :].tolist(),
        psnr=found.psnr.item(),
        ssim=ssim,
        caption=caption_of(viewer.autoencoder),
    )


def show_attention(
    viewer: Viewer, cfg: DemoConfig, seen: Seen, patch: int | None, layer: int
) -> str:
    """The image to choose a patch on, the rollout, and what each head of a layer attends to."""
    grid = viewer.encoder.grid_size
    image = to_picture(seen.cropped.float() / 255, cfg.show_channels)
    heads = viewer.heads(seen, layer, patch)  # (heads, N)
    maps = (viewer.rollout(seen), heads.mean(dim=0), *heads)
    return render(
        "attention",
        grid=grid,
        image=image,
        patch=patch,
        layer=layer,
        class_tokens=viewer.encoder.class_tokens,
        maps=[heat_over(image, values.view(grid).numpy()) for values in maps],
    )


def show_neighbours(viewer: Viewer, cfg: DemoConfig, near: list[tuple[str, float]]) -> str:
    """Buttons of the nearest images of the index; those whose files are not there cannot be
    chosen."""
    images = [viewer.thumbnail(name) for name, _ in near]
    items = [
        (
            name,
            f"{distance:.4f}: {'/'.join(Path(name).parts[-2:])}",
            None if image is None else to_picture(image, cfg.show_channels),
        )
        for (name, distance), image in zip(near, images, strict=True)
    ]
    return render(
        "buttons",
        title="Nearest images",
        items=items,
        hint="Cosine distance of the features, and the image's name. Click one to look at it.",
    )


def render(part: str, **values: object) -> str:
    """A part of the page, by its name in the template, with all texts escaped."""
    return TEMPLATE.render(part=part, as_url=as_url, **values)


def as_url(picture: np.ndarray) -> str:
    """A picture, uint8 `(H, W, 3)`, within a page."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


if __name__ == "__main__":
    run_cli(main)
