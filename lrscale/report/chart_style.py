"""How charts look: one colour, marker and dash an arm everywhere, in light and in dark.

In the page charts take their colours from CSS variables, so they follow the reader's light or
dark setting. matplotlib knows no variables: it draws with stand-in colours, and `themed` puts
the variables in their place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FONT = ("Inter", "Helvetica Neue", "Arial", "DejaVu Sans", "sans-serif")

# Okabe and Ito's colours, told apart with every common colour blindness; dark: the same hues, lighter.
COLOURS = {
    "ink": ("#1c2733", "#e8ecf1"),
    "muted": ("#5b6877", "#a3afbd"),
    "grid": ("#dfe4ea", "#323d4a"),
    "surface": ("#ffffff", "#161d26"),
    "latent": ("#0072b2", "#56b4e9"),
    "discrete": ("#d55e00", "#f58a42"),
    "zero_latent": ("#009e73", "#2fc79a"),
    "shuffled_latent": ("#b85a92", "#e39ac6"),
    "latent_free": ("#4a9fd4", "#8fd0f5"),
    "discrete_free": ("#e8934f", "#f9b98a"),
    "other_arm": ("#6b7280", "#a8b0bb"),
    "phase-1": ("#2f4a68", "#9dbbdc"),
    "phase-2": ("#e0a526", "#e6b84f"),
    "phase-3": ("#5f86b0", "#5f86b0"),
    "phase-4": ("#8f6fb0", "#b296d0"),
    "phase-5": ("#9fbdda", "#3f618a"),
    "phase-6": ("#c3cad2", "#56616e"),
}
"""Name: (light, dark)."""

ARM_MARKERS = {"latent": "o", "discrete": "s", "zero_latent": "^", "shuffled_latent": "D"}
ARM_MARKERS |= {"latent_free": "P", "discrete_free": "X"}
RUN_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

_STAND_INS = {name: f"#0a1b{number:02x}" for number, name in enumerate(COLOURS, start=16)}


@dataclass(frozen=True, slots=True)
class Ink:
    """The colours a chart is drawn with: real ones for a PNG, stand-ins for the page."""

    colours: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.colours.get(name, self.colours["other_arm"])


PNG_INK = Ink({name: light for name, (light, _) in COLOURS.items()})
PAGE_INK = Ink(_STAND_INS)


def css_variables(*, dark: bool) -> str:
    """The colours as CSS custom properties, for a rule of the page's style sheet."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


def run_dash(number: int) -> str | tuple[int, tuple[float, ...]]:
    return RUN_DASHES[number % len(RUN_DASHES)]


def rc_params(ink: Ink) -> dict[str, object]:
    """matplotlib settings of every chart."""
    return {
        "font.family": list(FONT) if ink is PAGE_INK else ["DejaVu Sans"],
        "font.size": 9,
        "svg.fonttype": "none",
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.titlecolor": ink["ink"],
        "axes.labelcolor": ink["muted"],
        "axes.edgecolor": ink["grid"],
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": ink["grid"],
        "grid.linewidth": 0.7,
        "xtick.color": ink["muted"],
        "ytick.color": ink["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": ink["ink"],
        "figure.facecolor": "none" if ink is PAGE_INK else ink["surface"],
        "savefig.facecolor": "none" if ink is PAGE_INK else ink["surface"],
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
    }


def themed(svg: str, *, name: str, label: str) -> str:
    """matplotlib's SVG file as an inline element: CSS variables for colours, its own ids, no metadata.

    `name` is a plain word, unique on the page; `label` is already escaped.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    svg = re.sub(r'^<svg\b([^>]*?)\swidth="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'^<svg\b([^>]*?)\sheight="[^"]*"', r"<svg\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
