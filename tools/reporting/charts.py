"""Curves, in one picture or as small charts inside a page, whose text and axes have the page's
colour, light or dark."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO, StringIO

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.pictures.drawing import MARK

INK = "#010203"  # stands for the page's colour of text
PLAIN = {"text.parse_math": False}  # a name may hold a $
STYLE = PLAIN | {
    "svg.fonttype": "none",  # texts stay texts
    "font.size": 9,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
MOST_POINTS = 500  # of a curve: more are not seen
COLUMNS = 2  # of the picture
Points = Sequence[tuple[float, float]]
Curve = tuple[str, Points, int, int]  # words of the legend, points, numbers of colour and dashes


def add_curves(
    panel: Axes,
    title: str,
    curves: Sequence[Curve],
    xlabel: str = "epoch",
    log_x: bool = False,
    floor: bool = False,
) -> None:
    """Draws curves on axes; the x axis has whole numbers, or a logarithmic scale; with `floor` the
    y axis begins at 0."""
    for words, points, color, dashes in curves:
        few = [*points[:: -(-len(points) // MOST_POINTS)], *points[-1:]]
        panel.plot(
            *zip(*few, strict=True),
            label=words,
            color=f"C{color}",
            linestyle=("-", "--", ":", "-.")[dashes % 4],
            marker="." if len(points) < 30 else None,
        )
    if log_x:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
    else:
        panel.locator_params(axis="x", integer=True)
    if floor:
        panel.set_ylim(bottom=0)
    panel.set(title=title, xlabel=xlabel)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8)


def picture(panels: Mapping[str, Sequence[Curve]]) -> bytes:
    """A PNG, with the mark of this project's tools, of curves over epochs in a panel for each
    title."""
    rows = -(-len(panels) // COLUMNS)
    content = BytesIO()
    with rc_context(PLAIN):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 3.4 * rows))
        figure.set_layout_engine("constrained", h_pad=0.1)
        for place, (title, curves) in enumerate(panels.items(), start=1):
            add_curves(figure.add_subplot(rows, COLUMNS, place), title, curves)
        figure.savefig(content, format="png", dpi=110, metadata={"Software": MARK})
    return content.getvalue()


def lines(title: str, curves: Mapping[str, Points], xlabel: str, **more: bool) -> Markup:
    """Curves by their names in the legend, those that have points; `more` as `add_curves` has
    it."""
    drawn = [(words, points, n, n) for n, (words, points) in enumerate(curves.items()) if points]
    return as_svg(title, lambda panel: add_curves(panel, title, drawn, xlabel, **more))


def reliability(accuracy: np.ndarray, shares: np.ndarray) -> Markup:
    """Accuracy over confidence in bins of equal width, and the share of the images in each, all in
    percent. The line is where accuracy and confidence are equal."""
    width = 100 / len(shares)
    edges = width * np.arange(len(shares))

    def draw(panel: Axes) -> None:
        panel.bar(edges, accuracy, width, align="edge", edgecolor=INK, lw=0.5, label="accuracy, %")
        panel.stairs(shares, [*edges, 100], color="C1", lw=1.5, label="share of all images, %")
        panel.plot([0, 100], [0, 100], "--", color=INK, lw=1, label="as right as confident")
        panel.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence, %")
        panel.legend(fontsize=8)

    return as_svg("Accuracy over confidence", draw)


def as_svg(label: str, draw: Callable[[Axes], None]) -> Markup:
    """What `draw` puts on axes, as an SVG element of the page's width that screen readers call
    `label`."""
    with rc_context(STYLE | {"svg.hashsalt": label}):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        draw(figure.add_subplot())
        content = StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # what only a file of its own needs, and names of elements that every chart has
    for needless in (
        r"<metadata>.*?</metadata>",
        r' xmlns(:xlink)?="[^"]*"',
        r'(?<=pt") height="[^"]*"',
        r' width="[\d.]*pt"',
        r' id="[A-Za-z]+[\w.]*_\d+"',
    ):
        text = re.sub(needless, "", text, flags=re.DOTALL)
    named = text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(named)  # noqa: S704 (matplotlib escapes its texts)
