"""Train: torchrun launch/train.py RECIPE [--field.name value ...]

The same command starts a run and continues it after a stop or a crash. RECIPE --help lists all
fields, and says which of them may change at every start.
"""

import os
import sys
from typing import Any

try:
    from launch import imports
except ModuleNotFoundError as error:  # This Python is not the one that the project is installed in.
    sys.exit(f"error: {error}: run `. .venv/bin/activate`, or install it: pip install -e .")

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    imports.begin()

from launch import help_page

if __name__ == "__main__":  # the page needs none of the imports below, which take seconds
    help_page.print_when_asked(sys.argv[1:])

from engine.data import open_data
from engine.debug import debug_step
from engine.explain.report import explain
from engine.fit import fit
from engine.log.patience import is_trying
from engine.log.terminal import Terminal, flush_output
from engine.log.tracking import check_trackers
from engine.processes.failures import report_failure
from engine.processes.launcher import rank
from engine.processes.preemption import Preemption
from engine.processes.world import enter
from engine.recipe import Recipe
from engine.replay.check import check_replay
from engine.replay.report import replay
from engine.run import claim
from engine.trainer import Trainer
from launch.command_line import parse_start
from shards.storage.local_files import proposing

# An exit status other than 0 makes torchrun start the processes again, without those that left.
START_AGAIN = 75

RESUMES = "continues from the last checkpoint"


def train(recipe: Recipe, source: dict[str, Any] | None = None) -> bool:
    """Run one job from its start to its end. recipe.json keeps `source`, its recipe file.

    Returns False when torchrun has to start this process again.
    """
    with (
        enter(recipe.threads, recipe.parallel.strategy != "auto") as world,
        Preemption(world, recipe.checkpoint.grace) as preemption,
    ):
        terminal = Terminal(world.main)
        if recipe.explain:
            explain(recipe, world, terminal)
            return True
        if recipe.replay is not None:
            check_replay(recipe, recipe.replay, world, terminal)
        else:
            world.on_main(lambda: check_trackers(recipe.log.visdom, recipe.log.wandb))
        data = open_data(recipe, world, terminal.say)
        if recipe.replay is not None:
            replay(recipe, recipe.replay, world, data, terminal)
            return True
        with claim(recipe, data.train.digest, world, terminal, source) as run:
            try:
                trainer = Trainer(recipe, world, data, run)
                if recipe.debug_step:
                    debug_step(trainer)
                    return True
                return fit(trainer, preemption)
            except KeyboardInterrupt:
                resumes = run.start is not None and not run.branches
                raise KeyboardInterrupt(RESUMES if resumes else "") from None


def main(arguments: list[str]) -> int:
    try:
        start = parse_start(arguments)
        with proposing("give another --run-url", start.recipe.run):
            ended = train(*start)
    except KeyboardInterrupt as interrupt:
        if rank() == 0:
            next_start = str(interrupt) or "begins again"
            print(f"interrupted: the same command {next_start}", file=sys.stderr)
        return 130
    except Exception as error:
        report_failure(error)
        return 1
    return 0 if ended else START_AGAIN


if __name__ == "__main__":
    imports.end()
    status = main(sys.argv[1:])
    flush_output()
    if status or is_trying():
        # Python's normal exit could wait for processes that wait for this one.
        os._exit(status)
