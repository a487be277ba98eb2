"""A stand-in for CUDA graphs on a machine without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.processes import step_graph
from engine.processes.step_graph import StepGraph

Work = Callable[[], tuple[Tensor, ...]]
Recording = tuple[Callable[[], None], tuple[Tensor, ...]]


class Recorder:
    """Records an update without its effects, and repeats it, as a GPU does.

    With `fixed`, what it repeats does not look at the inputs, which is a planted fault.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, fixed: bool = False) -> None:
        """Take the place of the GPU, for the graphs that are made from now on."""
        self.replays = 0
        self._fixed = fixed
        self._changed: Callable[[], list[Tensor]] = list
        make = StepGraph.__init__

        def remember(graph: Any, update: Any, changed: Callable[[], list[Tensor]]) -> None:
            self._changed = changed
            make(graph, update, changed)

        patch.setattr(StepGraph, "__init__", remember)
        patch.setattr(step_graph, "rehearse", lambda work: work())
        patch.setattr(step_graph, "record", self._record)
        patch.setattr("engine.trainer.find_obstacle", lambda *_: "")

    def _record(self, work: Work) -> Recording:
        before = [tensor.clone() for tensor in self._changed()]
        outputs = tuple(output.detach().clone() for output in work())
        after = [tensor.clone() for tensor in self._changed()]
        torch._foreach_copy_(self._changed(), before)

        def replay() -> None:
            self.replays += 1
            if self._fixed:
                torch._foreach_copy_(self._changed(), after)
            else:
                torch._foreach_copy_(list(outputs), [found.detach() for found in work()])

        return replay, outputs
