"""Give a branch the accuracies that its parent measured before training: what must be beaten."""

from typing import Any

from engine.log import journal
from engine.log.metrics import BASELINES
from engine.state import layout, origin

# A branch may choose these freely; the accuracies do not depend on them.
_FREE = ("probe.every", "probe.head_lr", "probe.baseline")
_OTHERS = (
    *("data.train", "data.val", "data.max_pixels", "data.exif", "data.corrupt", "views.size"),
)


def inherit(parent: str, fields: dict[str, Any]) -> dict[str, float]:
    """Return the baselines in the log of the run at `parent`, or in which that checkpoint lies.

    It is empty when the recipe with these `fields`, by dotted names, measures otherwise or measures
    no baselines, when the parent has none, and when they cannot be read.
    """
    home = origin.home(parent)
    names = {name for name in fields if name.startswith("probe.")}.union(_OTHERS).difference(_FREE)
    try:
        there = layout.read_recipe(home)
        if not fields["probe.baseline"] or any(there.get(n) != fields[n] for n in names):
            return {}
        records = journal.read(home)
    except OSError:
        return {}
    first = next((record for record in records if record["step"] == 0), {})
    found = {key: first.get(key) for key in (*BASELINES, "knn_chance")}
    return {key: value for key, value in found.items() if isinstance(value, float)}
