"""Save checkpoints while training continues: copy the state, and write the copy in a thread."""

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
from shards.storage.space import format_size

ATTEMPTS = 3
BACKOFF = 2.0  # seconds before the second attempt, twice that before the third

State = dict[str, Any]


class Saver:
    """Write one checkpoint at a time, on a process group of its own.

    All processes call its methods together. A save is tried up to ATTEMPTS times. Every failure is
    reported. When all attempts fail, training continues without this checkpoint. Only `finish`
    raises, when the last one failed.
    """

    def __init__(self, world: World, background: bool, report: Callable[[str], None]) -> None:
        """Create the thread. With `background`, `save` returns before everything is written."""
        self._world, self._background, self._report = world.duplicate(), background, report
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
            raise OSError(
                f"the state of step {self.step} could not be saved, see above: mend that, and the "
                "same command continues from the last checkpoint that was saved"
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
                return True
            except OSError as error:  # all processes get this error, so all try again
                what = f"step {step} ({format_size(_count_bytes(state))} of tensors)"
                text = f"the checkpoint of {what} failed ({attempt} of {ATTEMPTS}): {error}"
            if self._world.main:
                self._report(text)
            if attempt < ATTEMPTS:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
        return False


def _count_bytes(state: State) -> int:
    """Return the size of a whole state, of which other processes may hold parts."""
    tensors = (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
