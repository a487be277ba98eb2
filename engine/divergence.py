"""End a training that has diverged, before its checkpoints displace good ones."""

from collections.abc import Callable

from engine.method.local_shards import foreach_norms, local, not_finite, whole_norms
from engine.method.precision import MOST_SKIPS
from engine.state import checkpoint
from engine.trainer import StepOutput, Trainer
from shards.errors import InputError


def _saved_nothing() -> None:
    """Wait for no save, where none can be under way."""


def check_skips(
    trainer: Trainer, output: StepOutput, wait_for_save: Callable[[], object] = _saved_nothing
) -> None:
    """Raise InputError when too many steps in a row were skipped; see `check_finite`."""
    if trainer.guard.count_skips() >= MOST_SKIPS:
        raise _diverged(trainer, output, wait_for_save)


def check_finite(
    trainer: Trainer,
    output: StepOutput | None,
    wait_for_save: Callable[[], object] = _saved_nothing,
) -> None:
    """Raise InputError when a weight is not finite.

    It is called before an evaluation and before a save. All processes call it together.
    `output` is that of the last step, if it is still there, and
    `wait_for_save` waits for a save that is under way, so that the message can name it.
    """
    norms = foreach_norms(local(trainer.online.parameters()))
    if not_finite(whole_norms(norms, trainer.parallel.shard_group)):
        raise _diverged(trainer, output, wait_for_save)


def _diverged(
    trainer: Trainer, output: StepOutput | None, wait_for_save: Callable[[], object]
) -> InputError:
    wait_for_save()
    guard, url = trainer.guard, trainer.run.url
    scale = "" if guard.scale is None else f", loss scale {guard.scale.item():g}"
    figures = ""
    if output is not None:
        loss = trainer.world.all_reduce(output.loss.double().cpu()).item()
        figures = f" (loss {loss:g}, learning rate {output.lr:g}{scale})"
    good = trainer.step - max(guard.in_a_row, 1)  # the last step that was not skipped
    newest = trainer.world.on_main(lambda: checkpoint.tell_newest(url, good))
    other = " or --precision bf16" if trainer.recipe.precision == "fp16" else ""
    return InputError(
        f"training has diverged: gradients or weights are not finite at step {trainer.step}"
        f"{figures}; {newest}: start a new run with a lower --schedule.base-lr{other}"
    )
