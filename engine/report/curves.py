"""Draw curves as SVG that stands in the page. They need no script and no network."""

import math
from dataclasses import dataclass

import numpy as np

from engine.report.html import Html, join, tag
from engine.report.thinning import Points, Values, average, is_long, thin

WIDTH, HEIGHT = 380, 200  # of a chart, in the SVG's own units
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 24  # margins
COLUMNS = WIDTH - LEFT - RIGHT
COLORS = 8  # different colors of the style sheet, s0 to s7
_WIDE = 50  # a curve whose maximum is so many medians high gets a logarithmic axis
_TICKS = 4  # on an axis, about
_SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_KINDS = {"top1": "%", "top5": "%", "data_wait": "%", "mfu": "%"}


@dataclass(frozen=True)
class Series:
    """One curve: of one key in one run."""

    name: str
    color: int
    steps: Values  # [N] rising
    values: Values  # [N] NaN where nothing finite was logged


@dataclass(frozen=True)
class Axis:
    """Turn values into places between `start` and `stop` of the picture."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low)
        return self.start + share * (self.stop - self.start)


def is_fraction(key: str) -> bool:
    """Return whether the values of a key are shown as percentages."""
    return any(key == end or key.endswith(f"_{end}") for end in _KINDS)


def show_number(key: str, value: float) -> str:
    """Return a value of a key as text."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if is_fraction(key) else shorten(value, 4)


def shorten(value: float, digits: int = 3) -> str:
    """Return a number with so many digits, without an exponent as long as that is short."""
    if value == 0:
        return "0"
    if abs(value) < 10**digits:
        return f"{value:.{digits}g}".replace("e-0", "e-")
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    size, letter = next(pair for pair in _SIZES if abs(value) >= pair[0])
    rounded = float(f"{value / size:.{digits}g}")
    return f"{rounded:g}{letter}"


def draw_chart(
    key: str, title: str, series: list[Series], levels: dict[str, float] | None = None
) -> Html | None:
    """Draw the curves of one key. Return None when no value is finite.

    Args:
        levels: Values by name that are drawn as level, dashed lines.
    """
    series = [one for one in series if np.isfinite(one.values).any()]
    if not series:
        return None
    levels = {name: level for name, level in (levels or {}).items() if math.isfinite(level)}
    last_step = max(float(one.steps.max()) for one in series)
    first_step = min(0.0, *(float(one.steps.min()) for one in series))
    across = Axis(first_step, max(last_step, first_step + 1), LEFT, WIDTH - RIGHT)
    up = _vertical(key, np.concatenate([one.values for one in series]), list(levels.values()))
    body = [*_draw_grid(key, across, up)]
    for i, (name, level) in enumerate(levels.items()):
        y = round(up.place(level), 1)
        body.append(tag("line", class_="level", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        text = f"{name} {show_number(key, level)}"
        end = LEFT + 4 if i % 2 == 0 else WIDTH - RIGHT - 2
        anchor = "start" if i % 2 == 0 else "end"
        body.append(tag("text", text, class_="level", x=end, y=y - 3, text_anchor=anchor))
    body += [_draw_curve(key, one, across, up) for one in reversed(series)]
    heads = [_head(key, one, alone=len(series) == 1) for one in series]
    values = tag("span", *heads, class_="values" if len(heads) == 1 else "values several")
    picture = tag(
        "svg",
        *body,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: " + "; ".join(_describe(key, one) for one in series),
    )
    note = [tag("span", "logarithmic", class_="note")] if up.logarithmic else []
    lost = sum(int((~np.isfinite(one.values)).sum()) for one in series)
    if lost:
        note.append(tag("span", f"{lost:,} not finite", class_="note bad"))
    return tag("figure", tag("figcaption", tag("b", title), *note, values), picture, class_="chart")


def _vertical(key: str, values: Values, levels: list[float]) -> Axis:
    """Choose the range of the vertical axis, and whether it is logarithmic."""
    values = values[np.isfinite(values)]
    low, high = float(min([values.min(), *levels])), float(max([values.max(), *levels]))
    places = HEIGHT - BOTTOM, TOP
    if low > 0 and high > _WIDE * float(np.median(values)):
        return Axis(low, high, *places, logarithmic=True)
    if low >= 0 and (is_fraction(key) or low < 0.4 * high):
        low = 0.0
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - room if low else low, high + room, *places)


def _draw_grid(key: str, across: Axis, up: Axis) -> list[Html]:
    found = []
    heights = _ticks(up)
    for value in heights:
        y = round(up.place(value), 1)
        found.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        text = _label(key, value, heights)
        found.append(tag("text", text, x=LEFT - 5, y=y + 3.5, text_anchor="end"))
    for value in _ticks(across):
        x = round(across.place(value), 1)
        anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
        found.append(tag("text", shorten(value), x=x, y=HEIGHT - 8, text_anchor=anchor))
    return found


def _label(key: str, value: float, ticks: list[float]) -> str:
    """Write a tick with as many digits as tell it from its neighbors."""
    factor, end = (100, "%") if is_fraction(key) else (1, "")
    apart = factor * (ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0)
    digits = max(0, -math.floor(math.log10(apart) + 1e-9))
    if abs(value) >= 1e4 or digits > 5 or ticks[-1] > 1e3 * abs(ticks[0]) > 0:
        return shorten(factor * value) + end
    return f"{factor * value:.{digits}f}{end}"


def _ticks(axis: Axis) -> list[float]:
    """Return round numbers inside of an axis."""
    low, high = axis.low, axis.high
    if axis.logarithmic:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        every = max(1, len(powers) // _TICKS)
        if len(powers) >= 2:
            return [10.0**power for power in powers[::every]]
        return [low, high]
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * n for n in (1, 2, 5, 10) if size * n >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [(first + i) * step for i in range(count + 1)]


def _draw_curve(key: str, one: Series, across: Axis, up: Axis) -> Html:
    span = across.low, across.high, COLUMNS
    kind = f"curve s{one.color % COLORS}" + (" first" if one.color == 0 else "")
    whole = _draw_path(thin(one.steps, one.values, *span), kind, across, up)
    if is_long(one.steps, COLUMNS):  # its range is shown behind its mean
        mean = _draw_path(average(one.steps, one.values, *span), kind, across, up)
        whole = join(tag("g", whole, class_="range"), mean)
    return tag("g", tag("title", _describe(key, one)), whole)


def _draw_path(pieces: list[Points], kind: str, across: Axis, up: Axis) -> Html:
    """Draw the pieces of a curve as lines, and those of a single point as dots."""
    lines, dots = [], []
    for piece in pieces:
        places = [f"{across.place(x):.1f} {up.place(y):.1f}" for x, y in piece]
        if len(places) == 1:  # a wide line of no length with round ends is a dot
            dots.append(f"M{places[0]}L{places[0]}")
        else:
            lines.append("M" + "L".join(places))
    drawn = {kind: lines, f"{kind} dot": dots}
    return join(*(tag("path", class_=name, d=Html("".join(d))) for name, d in drawn.items() if d))


def _head(key: str, one: Series, alone: bool) -> Html:
    """Write a curve's newest value, with its run's color when there are several."""
    value = show_number(key, _newest(one))
    if alone and one.color == 0:
        return tag("span", value, class_="value")
    mark = tag("i", class_=f"mark s{one.color % COLORS}")
    return tag("span", mark, value, class_="value", title=one.name)


def _describe(key: str, one: Series) -> str:
    low, high = float(np.nanmin(one.values)), float(np.nanmax(one.values))
    return (
        f"{one.name}: {show_number(key, _newest(one))} at step {int(one.steps[-1]):,}, "
        f"between {show_number(key, low)} and {show_number(key, high)}"
    )


def _newest(one: Series) -> float:
    return float(one.values[-1])


def draw_legend(names: list[str]) -> Html | None:
    """Say which color belongs to which run. A single run needs no legend."""
    if len(names) < 2:
        return None
    marks = [
        tag("span", tag("i", class_=f"mark s{i % COLORS}"), name, class_="run")
        for i, name in enumerate(names)
    ]
    return tag("p", join(*marks), class_="legend")
