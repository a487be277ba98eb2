"""Take the training steps of a process, and measure those that are logged."""

from contextlib import AbstractContextManager

from engine.log.journal import Record
from engine.log.metrics import Timer
from engine.method.update_norms import UpdateNorms
from engine.trainer import StepOutput, Trainer
from shards.loader import Batch


class Meter:
    """Measure the steps of one process. What costs time is measured at logged steps only."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._norms = UpdateNorms(trainer.optimizer, trainer.online, trainer.parallel.shard_group)
        self._timer = Timer()

    def logs(self, step: int) -> bool:
        """Return whether `step` is logged.

        The first and the last step always are, and those of evaluations.
        """
        recipe, trainer = self._trainer.recipe, self._trainer
        return (
            recipe.log.due(step)
            or step in (1, trainer.last_step)
            or recipe.probe.due(step, trainer.total_steps)
        )

    def waiting(self) -> AbstractContextManager[None]:
        """Count the time of the block as waiting for data."""
        return self._timer.waiting()

    def take_step(self, batch: Batch) -> StepOutput:
        """Train on a batch, and count the step."""
        trainer = self._trainer
        with self._norms.measuring(self.logs(trainer.step + 1)):
            output = trainer.train_step(batch)
        trainer.step += 1
        self._timer.steps += 1
        return output

    def read(self, output: StepOutput, batch: Batch) -> Record:
        """Return the record of the last step. All processes call it together."""
        record = self._trainer.measure(output, batch)
        record |= self._norms.read()
        return record | self._timer.read(self._trainer.recipe.batch.size)

    def restart(self) -> None:
        """Start the clock anew, so that the time of evaluations and checkpoints does not count."""
        self._timer = Timer()
