"""A training in this process, as launch/train.py puts it together."""

from collections.abc import Iterator
from contextlib import contextmanager

from engine.data import open_data
from engine.fit import fit
from engine.log.terminal import Terminal
from engine.processes.preemption import Preemption
from engine.processes.world import join
from engine.recipe import Recipe
from engine.run import claim, open_run
from engine.trainer import Trainer


def open_trainer(recipe: Recipe) -> Trainer:
    """A trainer in a run that nobody claimed."""
    world = join(recipe.threads, recipe.parallel.strategy != "auto")
    terminal = Terminal(world.main)
    data = open_data(recipe, world, terminal.say)
    return Trainer(recipe, world, data, open_run(recipe, data.train.digest, world, terminal))


@contextmanager
def training(recipe: Recipe) -> Iterator[Trainer]:
    """A trainer in a run that is claimed meanwhile."""
    world = join(recipe.threads, recipe.parallel.strategy != "auto")
    terminal = Terminal(world.main)
    data = open_data(recipe, world, terminal.say)
    with claim(recipe, data.train.digest, world, terminal) as run:
        yield Trainer(recipe, world, data, run)


def finish(trainer: Trainer) -> bool:
    """Train to the end."""
    with Preemption(trainer.world, trainer.recipe.checkpoint.grace) as preemption:
        return fit(trainer, preemption)


def train(recipe: Recipe) -> bool:
    """Train to the end, in a run that is claimed meanwhile."""
    with training(recipe) as trainer:
        return finish(trainer)
