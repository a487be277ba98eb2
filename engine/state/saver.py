"""Save checkpoints while training continues: copy the state, and write the copy in a thread."""

import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.utils._pytree import tree_leaves

from engine.processes.world import World
from shards.errors import InputError
from shards.storage.space import format_size, name_whole

ATTEMPTS = 3
BACKOFF = 2.0  # seconds before the second attempt, twice that before the third

State = dict[str, Any]


class Saver:
    """Write one checkpoint at a time, on a process group of its own.

    All processes call its methods together. A save is tried up to ATTEMPTS times. Every cause of a
    failure is reported once, and how often it came again. When all attempts fail, training
    continues without this checkpoint. Only `finish` raises, when the last one failed.
    """

    def __init__(
        self,
        world: World,
        background: bool,
        report: Callable[[str], None],
        resumes: bool = False,
    ) -> None:
        """Create the thread.

        Args:
            world: The processes.
            background: `save` returns before everything is written.
            report: Is called with a line about a failure, by the first process.
            resumes: The run has a checkpoint of an earlier job, from which it can continue.
        """
        self._world, self._background, self._report = world.duplicate(), background, report
        self._saved = "the last checkpoint that was saved" if resumes else ""  # "": there is none
        self._cause, self._lost = "", 0  # of the last failure; saves that failed in a row
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[bool] | None = None
        self._committed = True
        self.step = 0
        """The step that `save` was called for last, or 0."""
        self._device = world.device
        self._copy: State | None = None

    def save(self, step: int, state: State, write: Callable[[State, World], object]) -> None:
        """Copy the tensors of `state` as they are now, and have the thread call `write`.

        First wait for the previous save if it still runs, so that there is never more than one
        copy in memory.

        Args:
            write: Gets the copy, and a world with a group of its own for what the processes do
                together. It raises OSError on all processes when it fails.
        """
        self.wait()
        self.step = step
        self._running = self._thread.submit(self._write, step, self._stage(state), write)
        if not self._background:
            self.wait()

    def wait(self) -> bool:
        """Wait for the last save. Return whether it was committed, or True when there was none."""
        running, self._running = self._running, None
        if running is not None:
            self._committed = running.result()
        return self._committed

    def finish(self) -> None:
        """Wait for the last save. Raises OSError when it was not committed."""
        if not self.wait():
            goes_on = f"continues from {self._saved}" if self._saved else "begins anew"
            why = "" if self._saved else ", because no checkpoint was saved"
            raise OSError(
                f"the state of step {self.step} could not be saved, see above: mend that, and the "
                f"same command {goes_on}{why}"
            )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """End the thread.

        After an InputError the last save is finished first. It works in threads, so the processes
        can still finish it together, even where only one of them has raised the error.
        """
        try:
            if failure is not None and issubclass(failure, InputError):
                self.wait()
        finally:
            self._thread.shutdown(wait=False)

    def _stage(self, state: State) -> State:
        """Copy the state to the CPU, into the same memory each time.

        The memory is pinned when the state comes from a GPU.
        """
        # torch's BlockingAsyncStager pins memory even without a GPU, and its DefaultStager fails on
        # a view in torch 2.11. Both are made of the two functions that are called here.
        cuda = self._device.type == "cuda"
        if self._copy is None:
            self._copy = _create_cpu_state_dict(state, pin_memory=cuda)
        staged = _copy_state_dict(state, self._copy, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize()
        return staged

    def _write(self, step: int, state: State, write: Callable[[State, World], object]) -> bool:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                write(state, self._world)
            except OSError as error:  # all processes get this error, so all try again
                self._tell(step, attempt, str(error), _count_bytes(state))
            else:
                self._tell_end(step, attempt)
                self._saved = f"the checkpoint of step {step}"
                return True
            if attempt < ATTEMPTS:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
        self._lost += 1
        if self._lost & (self._lost - 1) == 0:  # a power of two
            since = "" if self._lost == 1 else f", nor the {self._lost - 1} before it, as above"
            self._say(f"the checkpoint of step {step} was not saved{since}; training goes on")
        return False

    def _tell(self, step: int, attempt: int, error: str, size: int) -> None:
        """Report a failure, if it has another cause than the one before."""
        cause = re.sub("[0-9.,]+", "", error)
        if cause != self._cause:
            self._cause = cause
            what = f"step {step} ({format_size(size)} of tensors)"
            text = f"the checkpoint of {what} failed ({attempt} of {ATTEMPTS}): "
            self._say(text + name_whole(error, "the whole checkpoint", size))

    def _tell_end(self, step: int, attempt: int) -> None:
        """Report that a save succeeded, if something before failed."""
        if attempt > 1 or self._lost:
            lost = f", and the {self._lost} before it were not" if self._lost else ""
            self._say(f"the checkpoint of step {step} was saved at attempt {attempt}{lost}")
        self._cause, self._lost = "", 0

    def _say(self, text: str) -> None:
        if self._world.main:
            self._report(text)


def _count_bytes(state: State) -> int:
    """Return the size of a whole state, of which other processes may hold parts."""
    tensors = (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
