"""Say at the end of a training what became of it, and write what shows it."""

from engine.log.journal import FAILED
from engine.log.metrics import MetricsLog
from engine.log.patience import try_for
from engine.processes.preemption import Preemption
from engine.report.report import PATIENCE, write_at_end
from engine.state import checkpoint
from engine.trainer import Trainer
from shards.storage import files
from shards.storage.commands import quote


def say_farewell(
    trainer: Trainer, preemption: Preemption, log: MetricsLog, first: int, early: str
) -> None:
    """Say what became of the training, which began at step `first`, and what can be done now.

    `early` is why it ended before its time, if it did.
    """
    say, run = trainer.terminal.say, files.redact(trainer.run.url)
    say(f"{trainer.step:,} of {trainer.total_steps:,} steps done")
    if early:
        say(f"stopped early: {early}")
    if trainer.probe is not None and trainer.probe.failures:
        failed = trainer.probe.failures
        say(f"{failed} evaluation{'s' * (failed > 1)} failed: see {FAILED} in metrics.jsonl")
    newest = log.find_newest("knn_top1")
    if log.baseline and newest is not None:
        data = trainer.probe.sets.names[1] if trainer.probe else "data.val"
        say(f"kNN accuracy on {data}:")
        for name, accuracy in (log.baseline | {"trained encoder": newest.value}).items():
            say(f"  {name:<18} {accuracy:6.1%}")
        if newest.step != trainer.step:
            say(f"  the trained encoder was measured last at step {newest.step:,}")
    for trouble in log.summarize_health():
        say(f"health        {trouble}")
    start = trainer.run.start
    if trainer.step > first:
        say(f"checkpoint    {checkpoint.step_url(run, trainer.step)}")
    elif start is not None:  # it may be another run's, whose state this one took no step from
        say(f"checkpoint    {files.redact(start.url)}")
    say(f"curves        tensorboard --logdir {quote(run)}")
    _tell_best(trainer)
    if early or trainer.step == trainer.last_step:  # after a signal there may be no time for it
        _show(trainer, preemption, first)
    if early:
        patience = trainer.recipe.early_stop.patience
        say(
            f"the same command goes on with a larger --early-stop.patience than {patience}, or "
            "without an end by --early-stop.key ''"
        )
    elif trainer.step < trainer.total_steps:
        option = "" if trainer.recipe.steps is None else " with a larger --steps, or without it,"
        say(f"the same command{option} goes on")


def _show(trainer: Trainer, preemption: Preemption, first: int) -> None:
    """Write what shows the training, until a signal comes.

    It draws images of the newest evaluation beside their neighbors, for the report. The training is
    saved already, so what fails here is reported in one line and never fatal.
    """
    probe, url, say, told = trainer.probe, trainer.run.url, trainer.terminal.say, preemption.told
    if not trainer.world.main:
        return
    if (
        probe is not None
        and not told.is_set()
        and (fault := try_for(PATIENCE, lambda: probe.draw_examples(url), told))
    ):
        say(f"no sheet of neighbors was drawn: {fault}")
    if not told.is_set():
        news = trainer.step > first or (probe is not None and probe.step > 0)
        write_at_end(url, True, say, news, told)
    if told.is_set():
        command = f"python launch/evaluate.py report {quote(files.redact(url))}"
        say(f"{preemption.reason} came when all was saved: {command} writes the report")


def _tell_best(trainer: Trainer) -> None:
    if not (key := trainer.recipe.checkpoint.keep_best):
        return
    try:
        best = trainer.run.find_best(trainer.step)
    except OSError as error:
        trainer.terminal.say(f"the best checkpoint is not known: {error}")
        return
    if best.step < 0:
        trainer.terminal.say(f"no checkpoint has {key} in the log yet")
    else:
        url = checkpoint.step_url(files.redact(trainer.run.url), best.step)
        trainer.terminal.say(f"best          {url} ({best})")
