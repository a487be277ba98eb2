"""The training loop around the step: logging, evaluations, checkpoints and stopping early."""

from contextlib import closing
from typing import Any

from engine.divergence import check_finite, check_skips
from engine.evaluation.during_training import Stopped
from engine.farewell import say_farewell
from engine.greeting import greet, tell_gap
from engine.log.journal import FAILED
from engine.log.metrics import BASELINES, MetricsLog
from engine.measuring import Meter
from engine.method.norm import smallest_momentum
from engine.processes.preemption import Preemption
from engine.processes.world import World
from engine.state import checkpoint
from engine.state.early_stop import EarlyStop
from engine.state.saver import Saver
from engine.trainer import StepOutput, Trainer
from engine.waiting import take_batch
from shards.storage import files


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
        tell_gap(trainer, log)
        _log_baseline(trainer, log)
        stopping, early = _train(trainer, preemption, log)
    if stopping:
        trainer.terminal.say(f"stopped after step {trainer.step} by {preemption.reason}")
    say_farewell(trainer, preemption, log, first, early)
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
        greet(trainer, data.assignment.block_memory)
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
