"""Write the sections of a report that are no curves."""

import math
from collections.abc import Sequence

import numpy as np

from engine.log.health import ADVICE, HEALTHY
from engine.log.journal import FAILED, STOPPED_EARLY
from engine.report.charts import read_baselines
from engine.report.curves import is_fraction, show_number
from engine.report.facts import EvaluationFacts, RunFacts, as_number
from engine.report.html import Child, Html, breakable, join, tag
from engine.report.pictures import embed
from engine.report.recipes import changed_fields, defaults, differing_fields, show
from engine.report.tables import fold, make_table
from engine.report.thinning import Values
from engine.state.origin import BRANCH, SOURCE
from shards.storage import files
from shards.storage.commands import spell_program

_TILES = {
    "loss": "loss",
    "knn_top1": "kNN",
    "online_top1": "online head",
    "feature_std": "spread of the features",
    "feature_rank": "rank of the features",
}
_STATES = {  # what the words of `evaluate.py runs` mean
    "done": "the run has reached its end",
    "stopped early": "a figure of the log ended the run",
    "stopped": "ended without finishing; the same command goes on",
    "dead": "the job ended without a word; the same command goes on",
    "trains": "a job trained the run when this page was made",
}
_LONGEST_REASON = 300


def write_tiles(run: RunFacts) -> Html:
    """Show the newest figures at a glance."""
    total = run.total_steps
    step = run.records[-1]["step"] if run.records else 0
    share = f" ({step / total:.0%})" if total else ""
    title = f"of {total:,} steps{share}" if total else "steps logged"
    if run.records and (reason := run.records[-1].get(STOPPED_EARLY)):
        title += f", stopped early: {str(reason)[:_LONGEST_REASON]}"
    tiles = [_tile(f"{step:,}", title)]
    if run.state:
        tiles.append(_tile(run.state, _STATES.get(run.state, "when this page was made")))
    if run.saved is not None:
        tiles.append(_tile(f"{run.saved:,}", "step of the newest checkpoint"))
    for key, title in _TILES.items():
        value = as_number(run.last(key))
        if value is not None:
            levels = read_baselines(run) if key == "knn_top1" else {}
            more = [f", {name} {show_number(key, level)}" for name, level in levels.items()]
            title += _tell_images(run) if key == "knn_top1" else ""
            tiles.append(_tile(show_number(key, value), title + _best(run, key) + "".join(more)))
    _, speeds = run.numbers("images_per_second")
    if np.isfinite(speeds).any():
        median = float(np.nanmedian(speeds))
        tiles.append(_tile(show_number("images_per_second", median), "images per second, median"))
    if hours := _hours(run):
        tiles.append(_tile(hours, "spent in the logged steps"))
    if run.images is not None:
        tiles.append(_tile(f"{run.images:,}", "training images"))
    if run.processes is not None:
        tiles.append(_tile(f"{run.processes:,}", "process" + "es" * (run.processes > 1)))
    if run.torch is not None:
        tiles.append(_tile(run.torch, "version of torch"))
    return tag("div", *tiles, class_="tiles")


def _tile(value: str, title: str) -> Html:
    return tag("div", tag("b", value), tag("span", title), class_="tile")


def _best(run: RunFacts, key: str) -> str:
    """Name the best value of an accuracy where it is not the newest one."""
    steps, values = run.numbers(key)
    if not is_fraction(key) or not np.isfinite(values).any():
        return ""
    best = int(np.nanargmax(values))
    if values[best] == values[-1]:
        return ""
    return f", best {show_number(key, float(values[best]))} at step {int(steps[best]):,}"


def _tell_images(run: RunFacts) -> str:
    """Tell on how many images the newest kNN was measured, and how sure it is of so few.

    An accuracy p on n images is a binomial share, whose standard error is sqrt(p (1 - p) / n).
    """
    record = next((one for one in reversed(run.records) if one.get("knn_top1") is not None), {})
    share, images = (as_number(record.get(key)) for key in ("knn_top1", "knn_images"))
    if share is None or not images or not 0 <= share <= 1 or not 1 <= images < math.inf:
        return ""
    twice = 2 * math.sqrt(share * (1 - share) / images)
    return f" \u00b1 {twice:.1%} (two standard errors on {images:,.0f} images)"


def _hours(run: RunFacts) -> str:
    """Estimate the time of the training from the speed of the logged steps."""
    batch = as_number(run.recipe.get("batch.size"))
    steps, speeds = run.numbers("images_per_second")
    if not batch or not len(steps):
        return ""
    good = np.isfinite(speeds) & (speeds > 0)
    gaps = np.diff(steps, prepend=min(_first_step(run, steps), float(steps[0])))
    seconds = float((gaps[good] * batch / speeds[good]).sum())
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _first_step(run: RunFacts, steps: Values) -> float:
    """Return the step that the run began at, which is not 0 where it goes on from another run."""
    for record in run.records:
        if BRANCH in record:
            return float(record["step"])
    point = run.recipe.get(BRANCH)
    if isinstance(point, dict) and (here := as_number(point.get("step_here"))) is not None:
        return here
    if run.recipe.get("checkpoint.resume") and len(steps) > 1:
        # Nobody has noted the step of the other run, so the first gap is taken for a usual one.
        return max(0.0, float(steps[0] - np.median(np.diff(steps))))
    return 0.0


def write_health(run: RunFacts) -> Html:
    """Say what the training reported about itself, and what of the run could not be read."""
    troubles = _tell(run, "health")
    found: list[Child] = [*run.faults, *troubles]
    if troubles and run.last("health") == HEALTHY:
        found.append("The newest steps are healthy again.")
    found += [f"An evaluation failed: {line}" for line in _tell(run, FAILED)]
    skipped = as_number(run.last("skipped"))
    if skipped:
        found.append(f"{skipped:,.0f} steps were skipped because a gradient was not finite.")
    _, losses = run.numbers("loss")
    if lost := int((~np.isfinite(losses)).sum()):
        found.append(f"The loss of {lost:,} logged steps was not finite.")
    judged = sum("health" in record for record in run.records)
    if not found and not judged:
        return tag("p", "No logged step has been judged.", class_="card soft")
    if not found:
        steps = f"{judged:,} judged steps were" if judged > 1 else "only judged step was"
        return tag("p", f"Nothing was reported: the {steps} healthy.", class_="card good")
    return tag("div", tag("ul", *(tag("li", line) for line in found[:100])), class_="card warn")


def _tell(run: RunFacts, key: str) -> list[str]:
    """List the different texts of a key, the newest first, with the steps they were logged at."""
    found: dict[str, list[int]] = {}
    for record in run.records:
        text = record.get(key)
        if isinstance(text, str) and text not in ("", HEALTHY):
            found.setdefault(text, []).append(record["step"])
    lines = []
    for text, steps in sorted(found.items(), key=lambda item: -item[1][-1]):
        place = f"step {steps[0]:,}"
        if len(steps) > 1:
            place = f"{len(steps):,} logged steps from {steps[0]:,} to {steps[-1]:,}"
        lines.append(f"{text[:500]} ({place}){_advise(text) if key == 'health' else ''}")
    return lines


def _advise(status: str) -> str:
    """Return what a status of the training means and what may help, as the training said it."""
    if status not in ADVICE:
        return ""
    meaning, causes, change = ADVICE[status]
    return f": {meaning}. Likely {causes}. Try {change}."


def write_views(run: RunFacts) -> Html:
    """Show the newest picture of both views."""
    if run.views is None:
        return tag("p", "The run has logged no picture of its views.", class_="soft")
    step, content = run.views
    try:
        picture = embed(content, "both views of some images")
    except ValueError as error:
        return _missing("The picture of the views", error)
    text = (
        f"Both views of the first images of the batch of step {step:,}, one row each, as the "
        "network saw them."
    )
    return join(tag("p", text, class_="soft"), tag("div", picture, class_="picture"))


def write_neighbours(run: RunFacts) -> Html:
    """Show the newest sheet of neighbors, or say how to draw one."""
    if run.sheet is None:
        command = tag("code", _spell("neighbours", run))
        text = "No sheet of neighbors was drawn yet. This command draws one: "
        return tag("p", text, command, class_="soft")
    place, content = run.sheet
    try:
        picture = embed(content, "images beside their nearest neighbors")
    except ValueError as error:
        return _missing(f"The sheet of neighbors {place}", error)
    text = (
        "Each row shows an image that was measured (of data.val, or of probe.val where the recipe "
        "gives it), and then its nearest images of the set that is searched (data.train or "
        "probe.train). The border is green for the same label, red for another one and gray where "
        f"there is none. It is {place} of the run."
    )
    return join(tag("p", text, class_="soft"), tag("div", picture, class_="picture"))


def _spell(protocol: str, run: RunFacts) -> str:
    """Return the command of an evaluation, which is right wherever the page is opened."""
    return spell_program("evaluate.py", protocol, run.url, anywhere=True)


def _missing(what: str, error: Exception) -> Html:
    return tag("p", f"{what} cannot be shown: {files.redact(str(error))}.", class_="card warn")


def write_evaluations(run: RunFacts) -> Html:
    """List the results of launch/evaluate.py, the newest step first."""
    if not run.evaluations:
        command = tag("code", _spell("linear", run))
        text = "No evaluation was made yet. This command makes the paper's: "
        return tag("p", text, command, class_="soft")
    rows = [
        [
            one.protocol or one.place,
            "" if one.step is None else f"{one.step:,}",
            one.network,
            join(*(tag("div", breakable(k), f" {v:.2%}") for k, v in _first_metrics(one))),
            _measured_on(one),
            _show_settings(one.settings),
        ]
        for one in run.evaluations
    ]
    head = ["protocol", "step", "network", "figures", "measured on", "settings"]
    return make_table(head, rows, numbers=[1], long=[3, 4, 5])


def _measured_on(one: EvaluationFacts) -> str:
    """Return the URL of the images that an evaluation measured; "" where it does not say."""
    val = one.data.get("val")
    return files.redact(str(val.get("url", ""))) if isinstance(val, dict) else ""


def _first_metrics(one: EvaluationFacts) -> list[tuple[str, float]]:
    return list(one.metrics.items())[:8]


def _show_settings(settings: dict[str, object]) -> str:
    return ", ".join(f"{key} {show(value)}" for key, value in list(settings.items())[:30])


def write_comparison(runs: Sequence[RunFacts], names: Sequence[str]) -> Html | None:
    """Compare the report's own run with the others: their figures and their recipes."""
    if len(runs) < 2:
        return None
    keys = ["loss", "knn_top1", "online_top1", "feature_std", "feature_rank", "images_per_second"]
    rows: list[list[Child]] = [[breakable("step"), *(_last_step(run) for run in runs)]]
    for key in keys:
        values = [as_number(run.last(key)) for run in runs]
        if any(value is not None for value in values):
            rows.append(
                [breakable(key), *("" if v is None else show_number(key, v) for v in values)]
            )
    results = sorted({name for run in runs for one in run.evaluations for name in one.metrics})
    for name in results[:40]:
        rows.append([breakable(name), *(_newest_result(run, name) for run in runs)])
    head = ["", *names]
    differing = differing_fields([run.fields for run in runs])
    fields = [[breakable(name), *values] for name, values in differing.items()]
    return join(
        tag("h3", "Newest figures"),
        make_table(head, rows),
        tag("h3", "Fields of the recipe that differ"),
        make_table(head, fields) if fields else tag("p", "The recipes are equal.", class_="soft"),
    )


def _last_step(run: RunFacts) -> str:
    return f"{run.records[-1]['step']:,}" if run.records else ""


def _newest_result(run: RunFacts, name: str) -> str:
    found = [one for one in run.evaluations if name in one.metrics]
    if not found:
        return ""
    newest = max(found, key=lambda one: one.step or 0)
    return f"{newest.metrics[name]:.2%} (step {newest.step or 0:,})"


def write_parent(run: RunFacts) -> Html | None:
    """Say which checkpoint or which weights the run began from, and what changed then."""
    resumed, weights = run.recipe.get("checkpoint.resume"), run.recipe.get("model.start")
    given = run.recipe.get(BRANCH)
    if isinstance(given, dict):
        return _write_branch(given)
    if resumed:
        text = "The run began from the full state of "
        return tag("p", text, tag("code", show(resumed)), ". The method is the same there.")
    if weights:
        return tag("p", "The run began with the weights of ", tag("code", show(weights)), ".")
    return None


def _write_branch(point: dict[str, object]) -> Html:
    """Describe the place where a run left its parent, as recipe.json does."""
    step, here, order = (point.get(key) for key in ("step", "step_here", "order"))
    text = f", step {show(step)}" if step is not None else ""
    if here is not None:
        text += f", as step {show(here)} of this run"
    where = tag("p", "The run branched from ", tag("code", show(point.get("url"))), f"{text}.")
    images = tag("p", f"There {order}.", class_="soft") if isinstance(order, str) else None
    changed = point.get("changed")
    if not isinstance(changed, dict) or not changed:
        return join(where, images, tag("p", "No field of the method changed.", class_="soft"))
    rows = [[breakable(str(name)), *_pair(change)] for name, change in sorted(changed.items())]
    return join(where, images, make_table(["field of the method", "there", "here"], rows))


def _pair(change: object) -> list[str]:
    """Return the values of a changed field there and here."""
    if isinstance(change, dict):
        return [show(change[key]) if key in change else "" for key in ("there", "here")]
    return [show(change), ""]


def _write_source(run: RunFacts) -> Html | None:
    """Name the recipe file of the last start, and list what the command line changed of it."""
    source = run.recipe.get(SOURCE)
    file, said = (source.get(k) if isinstance(source, dict) else None for k in ("file", "said"))
    if not isinstance(file, str) or not isinstance(said, dict):
        return None
    name = tag("b", file.rpartition("/")[2])
    text = join("The last start took the recipe ", name, ", which is ", tag("code", show(file)))
    rows = [
        [breakable(str(field)), show(run.fields[field]), show(value)]
        for field, value in sorted(said.items())
        if field in run.fields and field != "run"
    ]
    if not rows:
        return tag("p", text, ". The command line changed nothing of it.")
    return join(
        tag("p", text, ". The command line changed these fields of it:"),
        make_table(["field", "value", "in the recipe file"], rows),
    )


def write_recipe(run: RunFacts) -> Html:
    """List the fields that differ from the recipe file or the defaults, and fold all of them."""
    fields = run.fields
    if not fields:
        return tag("p", "The run has no recipe that can be read.", class_="soft")
    there = defaults(fields)
    changed = [[breakable(name), value, base] for name, base, value in changed_fields(fields)]
    everything = [[breakable(name), show(value)] for name, value in sorted(fields.items())]
    lacking = sorted(there.keys() - fields.keys())
    text = "The run is of an earlier release, which did not have these fields: "
    note = tag("p", text, tag("code", ", ".join(lacking)), class_="soft") if lacking else None
    return join(
        _write_source(run),
        tag("h3", "Fields that differ from the defaults"),
        make_table(["field", "value", "default"], changed),
        fold(f"All {len(everything)} fields", make_table(["field", "value"], everything), note),
    )
