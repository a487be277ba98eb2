"""Choose the curves of a report, and draw them for one run or for several over each other."""

from collections.abc import Sequence

import numpy as np

from engine.log.metrics import BASELINES
from engine.report.curves import Series, draw_chart, draw_legend
from engine.report.facts import RunFacts, as_number
from engine.report.html import Html, join, tag
from engine.report.tables import fold

# The keys of metrics.jsonl by group, each with its title.
GROUPS: dict[str, dict[str, str]] = {
    "Learning": {
        "loss": "Loss",
        "knn_top1": "kNN accuracy",
        "online_top1": "Accuracy of the online head",
        "head_loss": "Loss of the online head",
    },
    "Features": {
        "feature_std": "Spread of the features",
        "feature_rank": "Rank of the features",
        "projection_std": "Spread of the projections",
        "view_std": "Spread of the views' pixels",
        "view_correlation": "How much the features tell images apart",
    },
    "Optimization": {
        "lr": "Learning rate",
        "tau": "Tau",
        "grad_norm": "Gradient norm",
        "update_ratio": "Update ratio",
        "loss_scale": "Loss scale",
        "skipped": "Skipped steps",
    },
    "Speed": {
        "images_per_second": "Images per second",
        "images_per_second_device": "Images per second and device",
        "data_wait": "Time spent waiting for data",
        "mfu": "Model FLOPs utilization",
        "memory_gib": "Memory in GiB",
    },
}
_NOT_DRAWN = {"step", "epoch", "data_digest", "knn_images", *BASELINES}
_MOST_OTHERS = 24  # curves of keys that are in no group


def draw_curves(runs: Sequence[RunFacts], names: Sequence[str]) -> Html:
    """Draw all curves that the runs have. The first run is the report's own."""
    parts: list[Html | None] = [draw_legend(list(names))]
    for title, keys in GROUPS.items():
        charts = _draw(runs, names, keys)
        if charts:
            parts += [tag("h3", title), tag("div", *charts, class_="charts")]
    known = {key for keys in GROUPS.values() for key in keys} | _NOT_DRAWN
    others = sorted({key for run in runs for record in run.records for key in record} - known)
    charts = _draw(runs, names, {key: key for key in others}, least=2)[:_MOST_OTHERS]
    if charts:
        parts.append(fold("Other figures", tag("div", *charts, class_="charts")))
    if len(parts) == 1:
        parts.append(tag("p", "Nothing has been logged yet.", class_="soft"))
    return join(*parts)


def _draw(
    runs: Sequence[RunFacts], names: Sequence[str], keys: dict[str, str], least: int = 1
) -> list[Html]:
    """Draw a chart for each key that has at least so many values in some run."""
    found = []
    for key, title in keys.items():
        series = [
            Series(name, color, *run.numbers(key))
            for color, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        series = [one for one in series if len(one.steps) >= least]
        if key == "images_per_second_device" and all(map(_has_one_device, runs)):
            continue  # it is the same curve as that of images_per_second
        if key == "skipped" and not any(one.values.any() for one in series):
            continue
        levels = read_baselines(runs[0]) if key == "knn_top1" else {}
        if chart := draw_chart(key, title, series, levels):
            found.append(chart)
    return found


def _has_one_device(run: RunFacts) -> bool:
    speeds = (run.numbers(key) for key in ("images_per_second", "images_per_second_device"))
    (steps, whole), (own_steps, own) = speeds
    return np.array_equal(steps, own_steps) and np.array_equal(whole, own, equal_nan=True)


def read_baselines(run: RunFacts) -> dict[str, float]:
    """Return the accuracies of kNN before the first step, by the names that a report gives them."""
    found = {title: as_number(run.last(key)) for key, title in BASELINES.items()}
    return {title: value for title, value in found.items() if value is not None}
