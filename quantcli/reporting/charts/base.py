"""What plots share: colours that a page can exchange, settings of matplotlib, and SVG with equal bytes for equal data.

Only the modules of this package import matplotlib, inside functions, and leave its own state alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantcli.errors import MissingExtraError
from quantcli.reporting.report import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours by what they show. Each is one of its own, so that a page can put others in their place.
COLOURS = {
    "paper": "#ffffff",
    "ink": "#1f2329",
    "faint": "#dbe0e5",
    "best": "#7d8590",
    "training": "#8fb4e6",
    "held-out": "#0b57a4",
    "original": "#2a7f3f",
    "ptq": "#b8560f",
    "before": "#a3adb8",
    "after": "#1668b8",
    "limit": "#b3261f",
    "series-1": "#1769bb",
    "series-2": "#c2501a",
    "series-3": "#23803e",
    "series-4": "#7a45c9",
    "series-5": "#94690b",
    "series-6": "#b92c6b",
    "series-7": "#12788c",
}
#: The same in the dark.
DARK = {
    "paper": "#14181d",
    "ink": "#e4e8ec",
    "faint": "#2f363d",
    "best": "#8b949e",
    "training": "#3c6ca8",
    "held-out": "#7ab8ff",
    "original": "#56c26e",
    "ptq": "#f0a060",
    "before": "#5d6874",
    "after": "#6bb0f5",
    "limit": "#ff8078",
    "series-1": "#6cb3ff",
    "series-2": "#ff9d66",
    "series-3": "#66cf85",
    "series-4": "#b79cff",
    "series-5": "#e0b840",
    "series-6": "#ff8abf",
    "series-7": "#5acbdc",
}
#: What tells series apart beside their colours.
MARKERS = "osD^vPX"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "quantcli",  # else ids differ from run to run
    "svg.fonttype": "path",
    "text.parse_math": False,  # names of metrics are not formulas
    "font.size": 10.0,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["ink"],
    "axes.facecolor": "none",
    "figure.facecolor": COLOURS["paper"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["faint"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "legend.columnspacing": 1.6,
    "legend.handlelength": 2.4,
    "legend.borderaxespad": 0.2,
}
#: Inches; a page shows plots as wide as it is.
WIDTH = 8.0

_ID = re.compile(r'(\sid="|url\(#|href="#)')


@dataclass(frozen=True)
class Chart:
    """A plot: ``alt`` says in a sentence what it shows, ``table`` has its numbers, ``draw`` makes the picture.

    ``name`` is short and different from those of other plots of a report.
    """

    name: str
    title: str
    alt: str
    table: Table
    draw: Callable[[], Figure]
    note: str | None = None

    def to_svg(self) -> str:
        """The picture as a part of a page, with ids of its own. Raises MissingExtraError without matplotlib."""
        document = svg(self.draw)
        return _ID.sub(rf"\g<1>{self.name}-", document[document.index("<svg") :].rstrip())


def require_matplotlib(purpose: str = "--html with plots") -> None:
    """Raise MissingExtraError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", purpose) from error
    del mpl


def svg(draw: Callable[[], Figure], purpose: str = "--html with plots") -> str:
    """A figure as an SVG document: without time or version in it, and the same for the same figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib(purpose)
    with _settings():
        stream = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw().savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()  # a matplotlibrc of the user's is for the user's plots
        mpl.rcParams.update(STYLE)
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of the page's width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def legend_above(axes: Axes, columns: int = 4) -> None:
    """A legend over the axes: inside them it would lie on what they show."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def shorter(name: str, most: int = 36) -> str:
    """A name for a plot's axis: the middle gives way where it is long."""
    return name if len(name) <= most else f"{name[: most // 3]}...{name[-(most - most // 3 - 3) :]}"
