"""Stop early: a signal sets a flag, and all processes agree on the step to stop after.

The end of the torchrun that started a process counts as a signal.
"""

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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STOP = "stop"  # the key in the processes' store
POLL = 0.5  # seconds between looks at the other processes' flags during evaluations


class Preemption:
    """Watch for signals that tell the run to stop before its end.

    Signals are caught from the first call of `agreed` on, which is after the first step. Before
    that they end the process at once, as usual, because there is nothing to save and the process
    may be in a call that no handler could leave.
    """

    def __init__(self, world: World, grace: float) -> None:
        """Allow the process `grace` seconds after a signal; then it exits.

        The status is 1, and 0 when nothing was left to save.
        """
        self._world, self._grace = world, grace
        self.told = threading.Event()  # set when a signal told this process to stop
        self._over = threading.Event()
        self._begun = False
        self._elsewhere = False
        self._waiting: Callable[[], Tensor] | None = None
        self._looked = 0.0
        self.reason = "another process"
        self._saved = ""  # what is saved, once nothing is left to save
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._launcher = os.getppid() if by_torchrun else None  # an orphan gets another parent
        self._hearing = threading.Lock()
        self._stack = ExitStack()
        self._watch: threading.Thread | None = None  # ends the process after the grace

    def _begin(self) -> None:
        """Catch the signals from now on, so that one only sets the flag."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        # Python runs a handler only between two of its own instructions, and a collective that
        # waits for a dead process never gets there. So a thread reads the signal's number instead.
        listener = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        listener.start()
        self._stack.callback(listener.join)
        self._stack.callback(os.close, write)  # the thread then reads end of file and returns
        self._stack.callback(self._over.set)
        old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, old)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run must survive its terminal
            self._stack.callback(signal.signal, number, signal.signal(number, _nothing))

    def agreed(self) -> bool:
        """Return whether to stop after the step just done, the same on all processes.

        Call it once a step. With several processes it reads the sum of the flags of the previous
        step, which has arrived by now, so nobody waits.
        """
        if not self._begun:
            self._begun = True
            self._begin()
        self._look_for_launcher()
        if not self._world.distributed:
            return self.told.is_set()
        arrived, self._waiting = self._waiting, self._sum()
        return arrived is not None and bool(arrived())

    def note_saved(self, saved: str) -> None:
        """Note that nothing is left to save. What is left to do may then be left out.

        A signal then ends the process with status 0 after the grace, if it has not ended before.

        Args:
            saved: Says what is saved, for the message.
        """
        self._saved = saved

    def looked_for(self) -> bool:
        """Return whether this process or another one was told to stop, without a collective.

        Evaluations use it, because their loops differ in length between processes. The flags of
        other processes are read at most every half second.
        """
        self._look_for_launcher()
        if self._world.distributed and time.monotonic() - self._looked > POLL:
            self._looked = time.monotonic()
            self._elsewhere = self._elsewhere or shared_store().check([STOP])
        return self.told.is_set() or self._elsewhere

    @property
    def told_alone(self) -> bool:
        """Return whether this process was told to stop, and there is no other to agree with."""
        return self.told.is_set() and self._world.size == 1

    @property
    def only_elsewhere(self) -> bool:
        """Return whether a stop, once agreed on, is another machine's and not this process's.

        torchrun can then continue the run here. A run on one machine always ends as a whole. While
        nobody was told to stop, the value means nothing.
        """
        return not self.told.is_set() and self._world.size > self._world.local_size

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Restore the signal handlers."""
        if self._waiting is not None and failure is None:
            self._waiting()
        self._stack.close()
        if self._watch is not None:
            self._watch.join()

    def _sum(self) -> Callable[[], Tensor]:
        return self._world.all_reduce_later(torch.tensor(int(self.told.is_set())))

    def _listen(self, read: int) -> None:
        while told := os.read(read, 1):
            if told[0] not in SIGNALS:  # all handled signals arrive here
                continue
            if self._hear(signal.Signals(told[0]).name) and self._world.distributed:
                # The store may have ended with its host. The next step sends the flag anyway.
                with contextlib.suppress(RuntimeError, ValueError):
                    shared_store().set(STOP, "1")
        os.close(read)

    def _look_for_launcher(self) -> None:
        """Stop as after a signal when torchrun was killed, which leaves its processes behind."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._hear("the end of its torchrun")

    def _hear(self, reason: str) -> bool:
        """Set the flag and begin the grace. Return False when that was done already."""
        with self._hearing:
            if self.told.is_set():
                return False
            self.reason = reason
            self.told.set()
            self._watch = threading.Thread(target=self._end, name="grace", daemon=True)
            self._watch.start()
        return True

    def _end(self) -> None:
        if self._over.wait(self._grace):
            return
        saved, within = self._saved, f"within {self._grace:g} s (checkpoint.grace of a training)"
        text = (
            f"error: {self.reason}: the state was not saved {within}: "
            "the same command continues from the last saved one\n"
        )
        if saved:
            text = f"{self.reason}: {saved}; what was left to do did not end {within}\n"
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(0 if saved else 1)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Replace the default handler, so that only the thread acts."""
