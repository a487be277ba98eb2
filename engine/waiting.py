"""Wait for the images of a step, and leave that when a signal comes."""

import time

from engine.measuring import Meter
from engine.processes.preemption import Preemption
from engine.trainer import Trainer
from shards.loader import Batch
from shards.loader_process import Loader

LOOK = 0.2  # seconds between two looks whether a signal came
PATIENCE = 60.0  # seconds of waiting that are worth a line


def take_batch(
    trainer: Trainer, meter: Meter, data: Loader, preemption: Preemption
) -> Batch | None:
    """Return the next batch, or None when a signal came before it.

    With several processes a signal does not end the wait, because the others are in the step by
    then, where they wait for this one. A wait that takes long is told once.

    Raises what the loader raises.
    """
    begun, told = time.monotonic(), False
    with meter.waiting():
        while not data.wait(LOOK):
            if preemption.told_alone:
                return None
            if not told and time.monotonic() - begun > PATIENCE:
                told = True
                trainer.terminal.report(
                    f"waits for the images of step {trainer.step + 1:,} for {PATIENCE:g} s: "
                    f"{data.describe_wait()}"
                )
        return next(data)
