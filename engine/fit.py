"""The loop around the step: logging, evaluations, checkpoints, stopping early."""

from contextlib import ExitStack, closing
from typing import Any

from engine.evaluation.probe import Stopped
from engine.log.figures import StepSums, data_digest
from engine.log.metrics import MetricsLog, NoLog, Timer
from engine.method.local_shards import foreach_norms, local, not_finite, whole_norms
from engine.method.precision import PATIENCE
from engine.processes import world as processes
from engine.processes.preemption import Preemption
from engine.processes.world import World
from engine.recipe import method_fields
from engine.state import checkpoint
from engine.state.saver import Saver
from engine.trainer import StepOutput, Trainer
from shards.errors import InputError
from shards.loader import Batch
from shards.storage import files


def fit(trainer: Trainer) -> bool:
    """Train to the last step of the recipe, or of this process (`steps`), or until a signal.

    False when only another machine was told to stop: torchrun then starts this process again, to
    go on without that one. Raises InputError when the data is at fault or training diverges, and
    OSError when the last state could not be saved.
    """
    recipe, world, first = trainer.recipe, trainer.world, trainer.step
    stop = trainer.total_steps if recipe.steps is None else min(recipe.steps, trainer.total_steps)
    measured: dict[str, float] = {}
    stopping = False

    with ExitStack() as stack:
        # What is entered first ends last: a signal that is sent twice harms none of the others.
        preemption = stack.enter_context(Preemption(world, recipe.checkpoint.grace))
        if trainer.lease is not None:
            stack.callback(trainer.lease.release)
        log = stack.enter_context(closing(_open_log(trainer, stop)))
        data = stack.enter_context(closing(trainer.batches()))
        saver = stack.enter_context(Saver(world, recipe.checkpoint.background, trainer.report))
        trainer.console.print(
            f"{trainer.train_index.samples:,} images, {trainer.order.steps_per_epoch:,} steps an "
            f"epoch; steps {first:,} to {stop:,} on {trainer.device}; blocks in memory: up to "
            f"about {data.block_memory / 2**20:,.0f} MiB"
        )
        if (record := _without_evaluation(trainer, log)) and trainer.probe is not None:
            measured = trainer.probe.evaluate()
            log.write(record | measured)

        timer = Timer()
        while trainer.step < stop and not stopping:
            with timer.waiting():
                batch = next(data)
            output = trainer.train_step(batch)
            step = trainer.step = trainer.step + 1
            timer.steps += 1
            log.advance()
            if trainer.guard.in_a_row() >= PATIENCE:
                raise _diverged(trainer, output)
            if step == first + 1:
                preemption.begin()
                processes.set_timeout(recipe.parallel.timeout, trainer.parallel.groups)
            if step == first + 2 and trainer.compile and recipe.compile_artefacts:
                trainer.artefacts.save(trainer.console.print)
            stopping = preemption.agreed()

            measure = trainer.is_measured(step)
            if measure or step == first + 1:
                views = output.images.unflatten(0, (2, -1))[:, : recipe.log.pictures]
                log.pictures(views, step)  # [V, n, 3, S, S]
            if measure or step % recipe.log.every == 0:
                if trainer.lease is not None:
                    trainer.lease.check()
                record = _record(trainer, output, batch) | timer.read(recipe.batch.size)
                if measure and trainer.probe is not None and not stopping:
                    _check_finite(trainer, output)
                    try:
                        measured = trainer.probe.evaluate(preemption.looked_for)
                        record |= measured
                    except Stopped:  # the next start evaluates
                        stopping = True
                log.write(record)
                timer = Timer()
            due = recipe.checkpoint.every > 0 and step % recipe.checkpoint.every == 0
            if due or stopping or step == stop:
                _check_finite(trainer, output)
                _save(trainer, saver, log)
                timer = Timer()

        if not saver.wait():
            raise OSError(f"the state of step {trainer.step} could not be saved, see above")
    if stopping:
        trainer.console.print(f"stopped after step {trainer.step} by {preemption.reason}")
    _farewell(trainer, measured)
    return not (stopping and preemption.only_elsewhere)


def _open_log(trainer: Trainer, stop: int) -> MetricsLog:
    if not trainer.world.main:
        return NoLog()
    confirm = trainer.lease.confirm if trainer.lease is not None else None
    run, console = trainer.recipe.run, trainer.console
    return MetricsLog(run, trainer.step, stop, console, confirm, trainer.report)


def _without_evaluation(trainer: Trainer, log: MetricsLog) -> dict[str, Any] | None:
    """The log's last record, when the evaluation of that step was left because of a signal."""
    record: dict[str, Any] | None = trainer.world.on_main(lambda: log.last)
    if record is None or record["step"] != trainer.step or "knn_top1" in record:
        return None
    return record if trainer.is_measured(trainer.step) else None


def _save(trainer: Trainer, saver: Saver, log: MetricsLog) -> None:
    """Have the state written as this step's checkpoint, and then the oldest ones removed."""
    recipe, step, digest = trainer.recipe, trainer.step, trainer.train_index.digest
    confirm = trainer.lease.confirm if trainer.lease is not None else None

    def write(state: dict[str, Any], world: World) -> None:
        log.flush()  # what stands before a checkpoint is never logged again
        method = method_fields(recipe)
        report = trainer.report
        checkpoint.save(recipe.run, step, state, method, digest, world, confirm, report)
        if not world.main:
            return
        try:
            keep, keep_every = recipe.checkpoint.keep, recipe.checkpoint.keep_every
            checkpoint.prune(recipe.run, step, keep, keep_every, report)
        except OSError as error:  # the next save does it
            report(f"old checkpoints stay for now: {error}")
        log.compact()

    saver.save(step, trainer.state(), write)


def _record(trainer: Trainer, output: StepOutput, batch: Batch) -> dict[str, Any]:
    own = StepSums.of(output.loss, output.head_loss, output.features)
    sums = StepSums(trainer.world.all_reduce(own.values))
    digest = trainer.world.all_reduce(data_digest(batch.ids, batch.crcs)).item()
    record: dict[str, Any] = {
        "step": trainer.step,
        "epoch": trainer.step // trainer.order.steps_per_epoch,
        "loss": sums.loss,
        "lr": output.lr,
        "tau": output.tau,
        "feature_std": sums.feature_std,
        "data_digest": f"{digest % 2**64:016x}",
        "skipped": int(trainer.guard.skipped),
    }
    if trainer.guard.scale is not None:
        record["loss_scale"] = trainer.guard.scale.item()
    if trainer.classes:
        record["head_loss"] = sums.head_loss
    return record


def _check_finite(trainer: Trainer, output: StepOutput) -> None:
    """Before a step is measured or saved: a diverged run must not push out good states."""
    norms = foreach_norms(local(trainer.online.parameters()))
    if not_finite(whole_norms(norms, trainer.parallel.shard_group)):
        raise _diverged(trainer, output)


def _diverged(trainer: Trainer, output: StepOutput) -> InputError:
    scale = "" if trainer.guard.scale is None else f", loss scale {trainer.guard.scale.item():g}"
    loss = trainer.world.all_reduce(output.loss.double().cpu()).item()
    return InputError(
        f"training has diverged: gradients or weights are not finite at step {trainer.step} "
        f"(loss {loss:g}, learning rate {output.lr:g}{scale}); "
        "the last checkpoint is kept: start a new run with a lower --schedule.base-lr"
        + (" or --precision bf16" if trainer.recipe.precision == "fp16" else "")
    )


def _farewell(trainer: Trainer, measured: dict[str, float]) -> None:
    say, run = trainer.console.print, files.redact(trainer.recipe.run)
    say(f"{trainer.step} of {trainer.total_steps} steps done")
    if trainer.baseline and measured:
        figures = trainer.baseline | {"trained encoder": measured["knn_top1"]}
        say("kNN accuracy on data.val:")
        for name, accuracy in figures.items():
            say(f"  {name:<18} {accuracy:6.1%}")
    if trainer.step:
        say(f"checkpoint    {checkpoint.step_url(run, trainer.step)}")
    say(f"curves, views tensorboard --logdir {run}/tensorboard")
    if trainer.step < trainer.total_steps:
        say("the same command without --steps goes on")
