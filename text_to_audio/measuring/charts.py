"""Small charts as inline SVG: lines over steps and bars over bins. Colours are classes that the page's CSS sets."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from common.templates import templates_beside

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44  # room for the axes' labels
DOTS = 60  # a line's points are marked up to so many

_TEMPLATES = templates_beside(__file__)
_TEMPLATES.filters["px"] = "{:.1f}".format


@dataclass(frozen=True)
class Label:
    """A text of an axis at (x, y) in the chart's units; anchor: `start`, `middle` or `end`."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Bar:
    """A bar with its upper left corner at (x, y); `series` numbers its colour, `title` is shown on hovering."""

    series: int
    x: float
    y: float
    width: float
    height: float
    title: str


def line_chart(title: str, series: dict[str, list[tuple[int, float]]], unit: str, zero: bool = False) -> Markup:
    """Lines of (step, value), one per name, with a legend; empty without points. `zero`: the value axis starts at 0."""
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return Markup()
    steps, values = [step for step, _ in points], [value for _, value in points]
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    ticks = nice_ticks(0.0 if zero else min(values), max(values))
    x = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    labels = [_below(x(step), f"{step:,.0f}") for step in nice_ticks(x_low, x_high) if x_low <= step <= x_high]
    lines = [[(x(step), y(value)) for step, value in line if math.isfinite(value)] for line in series.values()]
    return _chart(title, list(series), ticks, y, unit, labels, "step", lines=lines)


def bar_chart(title: str, labels: list[str], series: dict[str, list[float]], unit: str, below: str) -> Markup:
    """Groups of bars, one per label; each series is a bar in the group. `below` names the labels' axis."""
    ticks = nice_ticks(0.0, max((value for values in series.values() for value in values), default=0.0))
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    room = (WIDTH - LEFT - RIGHT) / max(1, len(labels))
    width = room * 0.84 / len(series)
    starts = [LEFT + room * (i + 0.08) for i in range(len(labels))]
    every = max(1, math.ceil(len(labels) / 12))
    bars = [
        Bar(number, starts[i] + width * number, y(values[i]), width, HEIGHT - BOTTOM - y(values[i]),
            f"{label}: {values[i]:,.4g}")
        for i, label in enumerate(labels)
        for number, values in enumerate(series.values())
    ]  # fmt: skip
    named = [_below(starts[i] + room * 0.42, labels[i]) for i in range(0, len(labels), every)]
    return _chart(title, list(series), ticks, y, unit, named, below, bars=bars)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values, evenly apart by 1, 2 or 5 times a power of ten, that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _below(x: float, text: str) -> Label:
    return Label(x, HEIGHT - BOTTOM + 16, text)


def _chart(
    title: str, names: list[str], ticks: list[float], y: Callable[[float], float], unit: str, labels: list[Label],
    below: str, lines: list[list[tuple[float, float]]] | None = None, bars: list[Bar] | None = None,
) -> Markup:  # fmt: skip
    """The figure: a grid with the ticks' labels, the labels of the axis below and its name, lines or bars."""
    labels = [
        *(Label(LEFT - 6, y(tick) + 4, f"{tick:,g}{unit}", "end") for tick in ticks),
        *labels,
        Label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, below),
    ]
    return Markup(  # the template has escaped what it was given
        _TEMPLATES.get_template("chart.html").render(
            title=title, names=names, width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT, dots=DOTS,
            grid=[y(tick) for tick in ticks], labels=labels, lines=lines or [], bars=bars or [],
        )
    )  # fmt: skip
