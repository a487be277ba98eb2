"""The training loop around the step: logging, evaluations, checkpoints and stopping early."""

import math
from contextlib import closing
from typing import Any

from engine.divergence import check_finite, check_skips
from engine.evaluation.during_training import Stopped
from engine.log.health import find_settled
from engine.log.journal import FAILED
from engine.log.metrics import BASELINES, MetricsLog
from engine.log.patience import try_for
from engine.measuring import Meter
from engine.method.durations import parse
from engine.method.norm import smallest_momentum
from engine.method.precision import parameter_dtype, slow_on
from engine.processes import compiling
from engine.processes.preemption import Preemption
from engine.processes.world import World, find_unused_gpu
from engine.report.report import PATIENCE, write_at_end
from engine.state import checkpoint
from engine.state.early_stop import EarlyStop, find_doubt
from engine.state.saver import Saver
from engine.trainer import StepOutput, Trainer
from engine.waiting import take_batch
from shards.storage import files
from shards.storage.commands import quote


def fit(trainer: Trainer, preemption: Preemption) -> bool:
    """Train until `trainer.last_step` or until a signal stops the run.

    Raises InputError when the data is at fault, when training diverges, or when another job has
    taken over the run. Raises OSError when the last state could not be saved.

    Returns:
        True when this process has nothing more to do: training is at its end, or this machine was
        told to stop. False when only another machine was told to. torchrun then starts this process
        again, to continue without that machine.
    """
    run, first, stop = trainer.run, trainer.step, trainer.last_step
    if trainer.probe is not None:
        trainer.probe.check_val()
    if first < stop or run.recorded is None:  # RUN has the recipe of the last start with steps
        run.write_recipe(trainer.total_steps)
    momentum = smallest_momentum(trainer.online.encoder)
    with run.open_log(first, stop, trainer.total_steps, momentum) as log:
        _tell_gap(trainer, log)
        _log_baseline(trainer, log)
        stopping, early = _train(trainer, preemption, log)
    if stopping:
        trainer.terminal.say(f"stopped after step {trainer.step} by {preemption.reason}")
    _farewell(trainer, preemption, log, first, early)
    return not (stopping and preemption.only_elsewhere)


def _train(trainer: Trainer, preemption: Preemption, log: MetricsLog) -> tuple[bool, str]:
    """Take the steps, and wait until all is saved.

    Returns:
        Whether a signal stopped the run, and why a figure of the log ended it early, if one did.
    """
    recipe, first, stop = trainer.recipe, trainer.step, trainer.last_step
    with (
        closing(trainer.batches()) as data,
        _open_saver(trainer) as saver,
        Meter(trainer) as meter,
    ):
        _greet(trainer, data.block_memory)
        best = trainer.run.find_best(first)
        best.note(first, _catch_up(trainer, log))
        lengths = trainer.warmup_steps, trainer.total_steps
        early = EarlyStop(recipe.early_stop, trainer.world, log, *lengths, meter.is_regular)
        stop = early.limit(first, stop)
        meter.restart()
        stopping = False
        while trainer.step < stop and not stopping:
            batch = take_batch(trainer, meter, data, preemption)
            if batch is None:  # a signal came first
                stopping = True
                break
            output = meter.take_step(batch)
            step = trainer.step
            log.advance()
            check_skips(trainer, output, saver.wait)
            trainer.finish_start(step - first)
            stopping = preemption.agreed()

            evaluation_due = recipe.probe.due(step, trainer.total_steps)
            if evaluation_due or step == first + 1:
                log.pictures(meter.pictures(output), step)
            if meter.logs(step):
                trainer.run.check()
                record = meter.read(output, batch)
                if evaluation_due and not stopping:
                    check_finite(trainer, output, saver.wait)
                    found = _evaluate(trainer, preemption)
                    record, stopping = record | found, not found
                    best.note(step, {} if trainer.skipped() else found)
                log.write(record)
                early.note(record)
                stop = early.limit(step, stop)
                meter.restart()
            due = recipe.checkpoint.due(step) or step == best.step
            if stopping or step == stop or (due and not trainer.skipped()):
                _save(trainer, saver, log, output)
                meter.restart()
            del batch, output  # else the next step could not use the memory of this one's images

        _finish(trainer, preemption, saver, log, first)
    return stopping, early.reason


def _greet(trainer: Trainer, block_memory: int) -> None:
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


def _tell_gap(trainer: Trainer, log: MetricsLog) -> None:
    """Say when the log of a run that goes on has lost lines, on the first process."""
    run, every = trainer.run, math.ceil(parse(trainer.recipe.log.every)[0])
    if not trainer.world.main or run.branches or trainer.recipe.checkpoint.resume:
        return
    point = run.origin.branched_from
    log.tell_gap(0 if point is None else point.step_here, every)


def _log_baseline(trainer: Trainer, log: MetricsLog) -> None:
    """Measure what an encoder has to beat, at the start of the run, as the record of step 0."""
    if trainer.step or trainer.world.on_main(lambda: log.baseline):
        return
    if trainer.probe is None or not trainer.recipe.probe.baseline:
        return
    start = "knn_untrained" if trainer.run.origin.weights is None else "knn_start"
    if found := trainer.probe.measure_baseline(start):
        for key in ("knn_pixels", start):
            trainer.terminal.say(f"kNN of {BASELINES[key]}: {found[key]:.1%}")
        log.write({"step": 0, "epoch": 0} | found)


def _catch_up(trainer: Trainer, log: MetricsLog) -> dict[str, Any]:
    """Evaluate at the step that training continues from, if that was prevented or failed before."""
    record: dict[str, Any] | None = trainer.world.on_main(lambda: log.last)
    if record is None or record["step"] != trainer.step or "feature_rank" in record:
        return {}
    if trainer.step == 0 or trainer.probe is None:
        return {}
    if not trainer.recipe.probe.due(trainer.step, trainer.total_steps):
        return {}
    measured = trainer.probe.attempt(trainer.step)
    log.write(record | dict.fromkeys(record.keys() & {FAILED}) | measured)
    return measured


def _evaluate(trainer: Trainer, preemption: Preemption) -> dict[str, Any]:
    """Evaluate; return nothing when a signal interrupts, as the next start evaluates then."""
    assert trainer.probe is not None  # a recipe with evaluations has one
    try:
        return trainer.probe.attempt(trainer.step, preemption.looked_for)
    except Stopped:
        return {}


def _open_saver(trainer: Trainer) -> Saver:
    world, report, run = trainer.world, trainer.terminal.report, trainer.run
    resumes = run.start is not None and not run.branches
    return Saver(world, trainer.recipe.checkpoint.background, report, resumes)


def _save(trainer: Trainer, saver: Saver, log: MetricsLog, output: StepOutput | None) -> None:
    """Have the saver write this step's checkpoint and then remove surplus ones.

    None is removed for a step that was skipped, because the run may be diverging. `output` is that
    of the step, if it is still there.

    Raises InputError when a weight is not finite.
    """
    check_finite(trainer, output, saver.wait)
    run, step, skipped = trainer.run, trainer.step, trainer.skipped()

    def write(state: dict[str, Any], world: World) -> None:
        run.confirm(world)  # a job that was frozen must not touch what the next one writes
        log.flush()  # a resumed run does not log the steps before its checkpoint again
        try:
            run.save(step, state, world)
        except OSError:
            if files.is_local(run.url):  # what was written would keep a full disk full
                url = checkpoint.step_url(run.url, step)
                world.on_main(lambda: files.discard(url, run.url, trainer.terminal.report))
            raise
        if not skipped:
            run.prune(step, trainer.recipe.checkpoint.keep_every)  # in steps
        run.compact(log)

    saver.save(step, trainer.state(), write)


def _finish(
    trainer: Trainer, preemption: Preemption, saver: Saver, log: MetricsLog, first: int
) -> None:
    """Save the last step if it is not saved yet, and wait until it is.

    It is not when a signal came while training waited for images.
    """
    if trainer.step > max(first, saver.step):
        _save(trainer, saver, log, None)
    saver.finish()
    preemption.note_saved(f"the state of step {trainer.step} is saved")


def _farewell(
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
