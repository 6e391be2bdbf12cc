"""Small charts as inline SVG: lines over steps and bars over bins. Colours are classes that the page's CSS sets."""

import math
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44  # room for the axes' labels


def line_chart(title: str, series: dict[str, list[tuple[int, float]]], unit: str, zero: bool = False) -> str:
    """Lines of (step, value), one per name, with a legend. `zero`: the value axis starts at 0."""
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return ""
    steps, values = [step for step, _ in points], [value for _, value in points]
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    ticks = nice_ticks(0.0 if zero else min(values), max(values))
    x = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(ticks, y, unit)]
    for step in nice_ticks(x_low, x_high):
        if x_low <= step <= x_high:
            parts.append(_text(x(step), HEIGHT - BOTTOM + 16, f"{step:,.0f}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step", "middle"))
    for number, line in enumerate(series.values()):
        shown = [(x(step), y(value)) for step, value in line if math.isfinite(value)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in shown)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        parts += [f'<circle class="dot s{number}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in shown[:60]]
    return _figure(title, parts, list(series))


def bar_chart(title: str, labels: list[str], series: dict[str, list[float]], unit: str, below: str) -> str:
    """Groups of bars, one per label; each series is a bar in the group. `below` names the labels' axis."""
    ticks = nice_ticks(0.0, max((value for bars in series.values() for value in bars), default=0.0))
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    room = (WIDTH - LEFT - RIGHT) / max(1, len(labels))
    width = room * 0.84 / len(series)
    parts = [_y_axis(ticks, y, unit)]
    every = max(1, math.ceil(len(labels) / 12))
    for i, label in enumerate(labels):
        start = LEFT + room * (i + 0.08)
        for number, bars in enumerate(series.values()):
            top = y(bars[i])
            parts.append(
                f'<rect class="bar s{number}" x="{start + width * number:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{escape(label)}: {bars[i]:,.4g}</title></rect>'
            )
        if i % every == 0:
            parts.append(_text(start + room * 0.42, HEIGHT - BOTTOM + 16, label, "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, below, "middle"))
    return _figure(title, parts, list(series))


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values, evenly apart by 1, 2 or 5 times a power of ten, that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _y_axis(ticks: list[float], y, unit: str) -> str:
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:,g}{unit}", "end"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, parts: list[str], names: list[str]) -> str:
    legend = "".join(f'<span><i class="s{number}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
