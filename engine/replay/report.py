"""--replay STEP: take the step again, and write what its batch, losses and gradients were."""

import csv
import io
import json
import math
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from engine.data import Data
from engine.log import journal
from engine.log.figures import data_digest
from engine.log.terminal import Terminal
from engine.measuring import describe_step
from engine.processes.world import World
from engine.recipe import Recipe
from engine.replay import sheets
from engine.replay.samples import Row, describe
from engine.replay.watch import Layer, Watch, first
from engine.run import open_run
from engine.state import layout
from engine.trainer import Trainer
from shards.errors import InputError
from shards.loader import Batch
from shards.png import encode_png
from shards.storage import files

WORST = 5  # images whose losses are printed


class Weights(NamedTuple):
    """Where the weights of a replayed step come from."""

    exact: bool  # whether they are those that the step had
    text: str


def replay(recipe: Recipe, step: int, world: World, data: Data, terminal: Terminal) -> None:
    """Take the step `step` again, and write RUN/replay/step_... about it.

    All processes call it together. Nothing else of the run is touched: no lease, checkpoint or
    line of the log. The batch and its views are those of the step with any number of processes.

    Raises InputError when the run has no such step, or is of another recipe or of other data.
    """
    recipe = _plain(recipe)
    total = recipe.schedule.total_steps(data.train.samples, recipe.batch.size)
    if step > total:
        raise InputError(f"replay {step}: the run has only {total} steps: give one of them")
    run = open_run(recipe, data.train.digest, world, terminal, before=step)
    trainer = Trainer(recipe, world, data, run)
    if trainer.step >= step:
        raise InputError(
            f"replay {step}: the run began at step {trainer.step} of another run: give a later "
            "step, or replay it there"
        )
    if run.start is None:
        terminal.say(f"no checkpoint before step {step}: the weights are those of the start")
    weights, batch = approach(trainer, step)
    epoch = (step - 1) // data.order.steps_per_epoch
    skipped = int(trainer.guard.skipped)
    with Watch(trainer, batch) as watch:
        output = trainer.train_step(batch)
    skipped = int(trainer.guard.skipped) - skipped
    record = describe_step(trainer, output, batch)
    record.pop("data_digest")
    record |= sum_norms(watch.layers)
    summary: dict[str, Any] = {"step": step, "weights": weights.text, "exact": weights.exact}
    summary |= {"processes": world.size, "skipped": bool(skipped), "replayed": record}
    summary |= compare(trainer, batch, record, step)
    bad = first(world.all_gather_object(watch.not_finite))
    summary["first_not_finite"] = None if bad is None else bad.text
    rows = world.on_all(
        lambda: describe(data.train, recipe.data.rules, recipe.views, recipe.seed, epoch, batch.ids)
    )
    rows = [
        {"loss": float(loss), "head_loss": float(head)} | row
        for loss, head, row in zip(watch.losses, watch.head_losses, rows, strict=True)
    ]
    folder = write(trainer, watch, rows, summary, step)
    if world.main:
        show(terminal, summary, watch.layers, folder)


def _plain(recipe: Recipe) -> Recipe:
    """Return the recipe with nothing compiled, whose parts hooks could not see, or evaluated."""
    return replace(
        recipe,
        compile=False,
        probe=replace(recipe.probe, every=0, baseline=False),
        data=replace(recipe.data, audit=True),  # runs whose digest has no CRCs are compared too
    )


def approach(trainer: Trainer, step: int) -> tuple[Weights, Batch]:
    """Train to the step before `step`, if it is near, and return the batch of `step`."""
    at, away = trainer.step, step - 1 - trainer.step
    origin = f"the checkpoint of step {at}" if trainer.run.start is not None else "the start"
    near = away <= trainer.recipe.replay_forward
    if away and near:
        trainer.terminal.say(f"training {away} steps from {origin} to step {step - 1}")
    if not near:
        trainer.step = step - 1  # the batch and the rates of the step, with older weights
    with closing(trainer.batches()) as batches:
        while trainer.step < step - 1:
            trainer.train_step(next(batches))
        batch = next(batches)
    text = f"of {origin}"
    if near:
        text += f", trained {away} steps further" if away else ""
        return Weights(True, f"{text}: those that the step had"), batch
    text += (
        f", {away} steps before: losses and gradients are not those of the run "
        f"(give --replay-forward {away} to train these steps first)"
    )
    return Weights(False, text), batch


def compare(trainer: Trainer, batch: Batch, record: Row, step: int) -> dict[str, Any]:
    """Compare data and loss with the log's line of the step. All processes call it together."""
    world = trainer.world
    digests = [
        f"{world.all_reduce(data_digest(batch.ids, crcs)).item() % 2**64:016x}"
        for crcs in (np.zeros_like(batch.crcs), batch.crcs)
    ]
    lines = world.on_main(lambda: journal.read(trainer.run.url))
    logged = next((line for line in lines if line["step"] == step), {})
    there = logged.get("data_digest")
    found: dict[str, Any] = {"data_digest": digests[0], "logged": None, "data": "not logged"}
    if there is None:
        return found
    found["logged"] = {key: logged.get(key) for key in ("data_digest", *record)}
    found["data"] = "equal" if there in digests else "other samples"
    if there == digests[1]:
        found |= {"data_digest": there, "data": "equal, pixels too"}
    here, before = record["loss"], logged.get("loss")
    if isinstance(here, float) and isinstance(before, float):
        found["loss_difference"] = here - before
    return found


def write(
    trainer: Trainer, watch: Watch, rows: list[Row], summary: dict[str, Any], step: int
) -> str:
    """Write sheets, tables and the summary to RUN/replay/step_..., and return its URL.

    All processes call it together, and each draws its own images.
    """
    world, url = trainer.world, trainer.run.url
    folder = files.join(url, layout.REPLAY, f"step_{step:08d}")
    world.on_main(lambda: files.discard(folder, url, trainer.terminal.report))
    parts = world.all_gather_object(rows)
    before = sum(len(part) for part in parts[: world.rank])

    def draw() -> None:
        pictures, each = watch.pictures, sheets.COLUMNS * sheets.ROWS
        for start in range(0, len(rows), each):
            some = rows[start : start + each]
            captions = [f"{row['sample']}  {row['loss']:.3f}" for row in some]
            sheet = sheets.draw_sheet(pictures[:, start : start + each], captions)
            name = f"views_{before + start:06d}.png"
            files.write(files.join(folder, name), encode_png(sheet))

    world.on_all(draw)
    whole = [{"row": number} | row for number, row in enumerate(chain.from_iterable(parts))]
    summary |= {"images": len(whole), "highest_losses": _highest(whole)}
    tables = {"images.csv": whole, "layers.csv": [_columns(layer) for layer in watch.layers]}

    def tell() -> None:
        for name, lines in tables.items():
            files.write(files.join(folder, name), _csv(lines))
        document = json.dumps(_finite(summary), indent=1)
        files.write(files.join(folder, "summary.json"), document.encode())

    world.on_main(tell)
    return folder


def show(terminal: Terminal, summary: dict[str, Any], layers: list[Layer], folder: str) -> None:
    """Print what was found."""
    replayed, logged = summary["replayed"], summary["logged"]
    terminal.say(f"step {summary['step']}: {summary['images']} images")
    terminal.say(f"weights: {summary['weights']}")
    terminal.say(f"data: {summary['data']} (data_digest {summary['data_digest']})")
    here, there = (one and _number(one["loss"]) for one in (replayed, logged))
    terminal.say(f"loss: {here} here, {f'{there} in the log' if logged else 'not logged'}")
    gradient = replayed["grad_norm"]
    there = logged and logged["grad_norm"]
    terminal.say(
        f"gradient norm: {gradient:.6g} here" + (f", {there:.6g} in the log" if there else "")
    )
    for row in summary["highest_losses"]:
        terminal.say(f"  {row['loss']:.4f}  sample {row['sample']}  {row['shard']}: {row['key']}")
    table = Table("layers", "gradient", "weight", "gradient / weight", "update / weight")
    for name, norms in _groups(layers).items():
        gradient, weight, update = norms
        ratios = (f"{norm / weight:.3g}" if weight else "-" for norm in (gradient, update))
        table.add_row(name, f"{gradient:.4g}", f"{weight:.4g}", *ratios)
    terminal.console.print(table)
    if summary["skipped"]:
        terminal.say("the step was skipped, because a gradient was not finite")
    bad = summary["first_not_finite"]
    terminal.say("all tensors are finite" if bad is None else f"first not finite: {bad}")
    terminal.say(f"written to {files.redact(folder)}")


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else str(loss)


def _groups(layers: list[Layer]) -> dict[str, tuple[float, float, float]]:
    """Return the norms of gradient, weight and update of each group of layers, by its name."""
    squares: dict[str, list[float]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        deep = 3 if parts[1] == "network" else 2  # torchvision's networks are one level below
        name = ".".join(parts[:deep]) if parts[0] == "encoder" else parts[0]
        sums = squares.setdefault(name, [0.0, 0.0, 0.0])
        for number, norm in enumerate((layer.gradient, layer.weight, layer.update)):
            sums[number] += norm**2
    return {
        name: (math.sqrt(sums[0]), math.sqrt(sums[1]), math.sqrt(sums[2]))
        for name, sums in squares.items()
    }


def sum_norms(layers: list[Layer]) -> dict[str, float]:
    """Return what the log calls grad_norm and update_ratio, from the norms of the layers."""
    weights = [layer for layer in layers if len(layer.shape) > 1]
    gradient = math.hypot(*(layer.gradient for layer in layers))
    update, weight = (
        math.hypot(*(getattr(layer, name) for layer in weights)) for name in ("update", "weight")
    )
    return {"grad_norm": gradient, "update_ratio": update / weight if weight else math.nan}


def _columns(layer: Layer) -> Row:
    weight = layer.weight or math.nan
    return {
        "layer": layer.name,
        "shape": "x".join(map(str, layer.shape)),
        "gradient_norm": layer.gradient,
        "weight_norm": layer.weight,
        "gradient_over_weight": layer.gradient / weight,
        "update_norm": layer.update,
        "update_over_weight": layer.update / weight,
    }


def _highest(rows: list[Row]) -> list[Row]:
    """Return the images with the highest losses, those that are not finite first."""
    keys = ("row", "sample", "shard", "key", "loss")
    key = lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf  # noqa: E731
    worst = sorted(rows, key=key, reverse=True)[:WORST]
    return [{name: row[name] for name in keys} for row in worst]


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _finite(value: Any) -> Any:
    """Replace the numbers that JSON cannot hold by None."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
