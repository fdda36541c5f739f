"""How figures look and how they are saved: as files for papers, and inline for a page in light or dark.

They are drawn small, 4.8 inches wide, so that their text can still be read where a phone shows them at its own width.
"""

import io
import re
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from layerwise.units import size

WIDTH = 4.8
"""Inches."""

INK = "#1f2328"
"""Text and axes; `currentColor` on the page."""

BLUE, ORANGE, GREEN, PINK, OCHRE, GRAY = PALETTE = ("#0069aa", "#c24e00", "#00775a", "#b0407f", "#8a6300", "#6b6f76")
"""Told apart by hue or lightness with any kind of colour blindness; on a dark page the template has lighter ones."""

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: the page gives it its colour, and a reader can select it
    "svg.hashsalt": "layerwise",  # the same figure is the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $5$
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of a report."""

    name: str
    """Of its files in plots/."""
    title: str
    caption: str
    figure: Figure

    def save(self, kind: Literal["svg", "png"]) -> bytes:
        """The content of a file on white ground; the same for the same figure."""
        content, metadata = io.BytesIO(), {"svg": {"Date": None}, "png": {"Software": None}}[kind]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # class names may be in any script
            self.figure.savefig(content, format=kind, metadata=metadata)
        return content.getvalue()


def styled() -> AbstractContextManager[None]:
    """Figures are drawn and saved inside, whatever the user's own matplotlibrc says."""
    return matplotlib.style.context(["default", STYLE])


def new_figure(height: float) -> Figure:
    """An empty figure of WIDTH by `height` inches."""
    return Figure(figsize=(WIDTH, height))


def inline(svg: bytes, number: int) -> str:
    """The drawing as part of a page: no ground, the page's colours, and ids of its own (`number` tells figures apart)."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"([^>]*?) height="[^"]*"|^<svg', r"<svg\1\2", text, count=1)
    text = re.sub(r'((?:id|href)="#?|url\(#)', rf"\1f{number}-", text)
    themed = {INK: "currentColor", "#ffffff": "none"} | {color: f"var(--c{i})" for i, color in enumerate(PALETTE)}
    colors = re.compile("|".join(themed))
    return re.sub(r'style="[^"]*"', lambda style: colors.sub(lambda color: themed[color[0]], style[0]), text)


BYTES = FuncFormatter(lambda count, _: size(max(round(count), 0)))
"""Ticks of an axis of bytes."""

PERCENT = FuncFormatter(lambda rate, _: f"{100 * rate:.3g} %")
"""Ticks of an axis of rates."""
