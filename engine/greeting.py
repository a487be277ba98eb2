"""Say at the start of a training what it will do, and what is doubtful about it."""

import math

from engine.log.health import find_settled
from engine.log.metrics import MetricsLog
from engine.method.durations import parse
from engine.method.norm import smallest_momentum
from engine.method.precision import parameter_dtype, slow_on
from engine.processes import compiling
from engine.processes.world import find_unused_gpu
from engine.state.early_stop import find_doubt
from engine.trainer import Trainer


def greet(trainer: Trainer, block_memory: int) -> None:
    """Say what will be trained on what, and what is doubtful about it, on the first process.

    `block_memory` is how many bytes the blocks of images may take.
    """
    data, precision = trainer.data, trainer.recipe.precision
    for warning in (
        find_unused_gpu(trainer.device),
        slow_on(trainer.device, precision),
        trainer.recipe.average.warn(parameter_dtype(precision)),
    ):
        if warning:
            trainer.terminal.say(warning)
    last = max(trainer.step, trainer.last_step)  # --steps may name a step that is done
    trainer.terminal.say(
        f"{data.train.samples:,} images, {data.order.steps_per_epoch:,} steps an epoch; "
        f"steps {trainer.step:,} to {last:,} on {trainer.device}, {trainer.threads} "
        f"thread{'s' * (trainer.threads > 1)} a process; blocks in memory: "
        f"up to about {block_memory / 2**20:,.0f} MiB"
    )
    exact = data.train.samples / trainer.recipe.batch.size
    if exact % 1 and trainer.run.recorded is None:  # at the first start only
        epochs = f"{trainer.recipe.schedule.epochs:,.6g}"
        trainer.terminal.say(
            f"{trainer.total_steps:,} steps are {epochs} epoch{'s' * (epochs != '1')} of "
            f"{exact:,.2f} steps; the rest of each pass's last batch is left out"
        )
    for note in trainer.probe.sets.notes if trainer.probe else ():
        trainer.terminal.say(note)
    recipe, lengths = trainer.recipe, (trainer.warmup_steps, trainer.total_steps)
    if doubt := find_doubt(recipe.early_stop, *lengths, recipe.log.every, recipe.probe.every):
        trainer.terminal.say(doubt)
    momentum = smallest_momentum(trainer.online.encoder)
    if trainer.probe is not None and trainer.step < (needed := find_settled(momentum)):
        trainer.terminal.say(
            f"the norms of {recipe.model.encoder.describe()} have a momentum of {momentum:g}: kNN "
            f"and other evaluations say nothing in the first {needed:,} steps or so, until the "
            "running statistics that they use are those of training"
        )
    if trainer.compile and trainer.step < trainer.last_step:
        trainer.terminal.say(compiling.announce(trainer.device))


def tell_gap(trainer: Trainer, log: MetricsLog) -> None:
    """Say when the log of a run that goes on has lost lines, on the first process."""
    run, every = trainer.run, math.ceil(parse(trainer.recipe.log.every)[0])
    if not trainer.world.main or run.branches or trainer.recipe.checkpoint.resume:
        return
    point = run.origin.branched_from
    log.tell_gap(0 if point is None else point.step_here, every)
