"""--debug-step: take one batch through every part of a run and print a table of what was seen."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from rich.table import Table

from engine.measuring import peak_memory
from engine.processes import compiling
from engine.state import checkpoint, layout
from engine.trainer import StepOutput, Trainer
from shards.loader_process import Loader
from shards.storage import files

_T = TypeVar("_T")


def debug_step(trainer: Trainer) -> None:
    """Load one batch, train on it, evaluate, save and restore; print shapes, times and memory.

    It leaves no checkpoint and no metrics in the run's directory.
    """
    _announce(trainer)
    table = Table("part", "seconds", "what")

    def part(name: str, call: Callable[[], _T], describe: Callable[[_T], str]) -> _T:
        start = time.perf_counter()
        result = call()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        table.add_row(name, f"{time.perf_counter() - start:.2f}", describe(result))
        return result

    def loss_of(output: StepOutput) -> float:
        return trainer.world.all_reduce(output.loss.double().cpu()).item()

    url = files.join(trainer.recipe.run, layout.DEBUG_STEP)
    data = trainer.batches()
    try:
        batch = part("load", lambda: next(data), lambda b: f"views {_shape(b.views)} uint8")
        output = part(
            "first step",
            lambda: trainer.train_step(batch),
            lambda o: f"images {_shape(o.images)}, features {_shape(o.features)}",
        )
        part(
            "second step",
            lambda: trainer.train_step(batch),
            lambda o: f"loss {loss_of(output):.4f} -> {loss_of(o):.4f}",
        )
        if (probe := trainer.probe) is not None:
            part(
                "evaluate",
                lambda: probe.extract(probe.val, limit=trainer.recipe.batch.size),
                lambda f: f"features of {probe.sets.names[1]} {_shape(f.features)}",
            )
        commit = part(
            "save",
            lambda: checkpoint.save(url, trainer.step, trainer.state(), {}, "", trainer.world),
            lambda c: f"{_bytes(c)} in {len(c.files)} files",
        )
        part(
            "restore",
            lambda: trainer.load(checkpoint.verify(commit.url, trainer.world)),
            lambda _: commit.url,
        )
        trainer.world.all_gather_object(None)  # all have restored, so the checkpoint may go
    finally:
        data.close()
        if trainer.world.main:
            files.discard(url, url, trainer.terminal.report)
    for note in trainer.probe.sets.notes if trainer.probe else ():
        trainer.terminal.say(note)
    table.caption = _sum_up(trainer, data)
    trainer.terminal.console.print(table)


def _sum_up(trainer: Trainer, data: Loader) -> str:
    parameters = sum(p.numel() for p in trainer.online.parameters())
    blocks = data.assignment.block_memory
    return (
        f"{trainer.device}, {trainer.recipe.precision}, {parameters / 1e6:.1f} M parameters, "
        f"{trainer.total_steps} steps of {trainer.recipe.batch.size} images in the whole run\n"
        f"memory: {_memory(trainer.device)}, blocks at most {blocks / 2**20:,.0f} MiB; "
        f"undecodable samples: {data.undecodable}"
    )


def _announce(trainer: Trainer) -> None:
    """Say why the first step takes so long, before it does."""
    if trainer.compile:
        trainer.terminal.say(compiling.announce(trainer.device))


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape)


def _bytes(commit: checkpoint.Commit) -> str:
    return f"{sum(length for length, _ in commit.files.values()) / 2**20:,.1f} MiB"


def _memory(device: torch.device) -> str:
    host = f"host {peak_memory(torch.device('cpu')):,.1f} GiB"
    return host if device.type == "cpu" else f"{host}, device {peak_memory(device):,.1f} GiB"
