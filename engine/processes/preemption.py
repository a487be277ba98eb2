"""Stopping early: a signal sets a flag, all processes agree on the step, save, and end with 0."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import torch
from torch import Tensor

from engine.processes.world import World, shared_store

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP = "stop"  # the key in the processes' store
POLL = 0.5  # seconds between looks at the other processes' flags during evaluations


class Preemption:
    """Whether this run is to stop before its end.

    Signals count from the first call of `agreed` on, when the first step is done. Until then they
    have their usual effect, the end at once: there is nothing to save, and the process may stand in
    a call that no handler could leave.
    """

    def __init__(self, world: World, grace: float) -> None:
        """`grace`: seconds from the signal in which the process has to be over; then it exits."""
        self._world, self._grace = world, grace
        self.told = threading.Event()  # this process was, by a signal
        self._over = threading.Event()
        self._begun = False
        self._elsewhere = False
        self._waiting: Callable[[], Tensor] | None = None
        self._looked = 0.0
        self.reason = "another process"
        self._stack = ExitStack()
        self._watch: threading.Thread | None = None  # over the grace

    def _begin(self) -> None:
        """From now on a signal only sets the flag."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        # Python runs handlers between two of its own instructions, which a collective that waits
        # for a dead process does not reach; a thread that reads the signal's number does.
        listener = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        listener.start()
        self._stack.callback(listener.join)
        self._stack.callback(os.close, write)  # the thread reads the end
        self._stack.callback(self._over.set)
        old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, old)
        for number in SIGNALS:
            self._stack.callback(signal.signal, number, signal.signal(number, _nothing))

    def agreed(self) -> bool:
        """Whether to stop after the step just done; the same on all processes. Once a step.

        The flags of the step before are read, whose sum has long arrived: nobody waits.
        """
        if not self._begun:
            self._begun = True
            self._begin()
        if not self._world.distributed:
            return self.told.is_set()
        arrived, self._waiting = self._waiting, self._sum()
        return arrived is not None and bool(arrived())

    def looked_for(self) -> bool:
        """Whether this process or, half a second ago, another one was told to stop.

        No collective: for the loops of evaluations, which differ in length.
        """
        if self._world.distributed and time.monotonic() - self._looked > POLL:
            self._looked = time.monotonic()
            self._elsewhere = self._elsewhere or shared_store().check([STOP])
        return self.told.is_set() or self._elsewhere

    @property
    def only_elsewhere(self) -> bool:
        """Whether another machine was told to stop and this one was not, so that torchrun can go
        on here: on one machine all processes end together."""
        return not self.told.is_set() and self._world.size > self._world.local_size

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Give the signals back."""
        if self._waiting is not None and failure is None:
            self._waiting()
        self._stack.close()
        if self._watch is not None:
            self._watch.join()

    def _sum(self) -> Callable[[], Tensor]:
        return self._world.all_reduce_later(torch.tensor(int(self.told.is_set())))

    def _listen(self, read: int) -> None:
        while told := os.read(read, 1):
            if told[0] not in SIGNALS or self.told.is_set():  # others may have handlers too
                continue
            self.reason = signal.Signals(told[0]).name
            self.told.set()
            self._watch = threading.Thread(target=self._end, name="grace", daemon=True)
            self._watch.start()
            if self._world.distributed:
                # The store goes away with its host; the flag travels with the next step too.
                with contextlib.suppress(RuntimeError, ValueError):
                    shared_store().set(STOP, "1")
        os.close(read)

    def _end(self) -> None:
        if self._over.wait(self._grace):
            return
        text = f"error: {self.reason}: not saved within checkpoint.grace ({self._grace:g} s)\n"
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(1)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """In place of the default, so that only the thread acts."""
