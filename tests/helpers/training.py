"""Train in this process, with the parts that launch/train.py uses."""

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
    """Return a trainer in a run that nobody has claimed."""
    world = join(recipe.threads, recipe.parallel.strategy != "auto")
    terminal = Terminal(world.main)
    data = open_data(recipe, world, terminal.say)
    return Trainer(recipe, world, data, open_run(recipe, data.train.digest, world, terminal))


@contextmanager
def training(recipe: Recipe) -> Iterator[Trainer]:
    """Yield a trainer in a run that is claimed during the block."""
    world = join(recipe.threads, recipe.parallel.strategy != "auto")
    terminal = Terminal(world.main)
    data = open_data(recipe, world, terminal.say)
    with claim(recipe, data.train.digest, world, terminal) as run:
        yield Trainer(recipe, world, data, run)


def finish(trainer: Trainer) -> bool:
    """Train to the end, and return what `fit` returns."""
    with Preemption(trainer.world, trainer.recipe.checkpoint.grace) as preemption:
        return fit(trainer, preemption)


def train(recipe: Recipe) -> bool:
    """Train to the end in a run that is claimed meanwhile, and return what `fit` returns."""
    with training(recipe) as trainer:
        return finish(trainer)
