"""Start all kernels of a step by one call: a CUDA graph.

A host needs longer to start a small kernel than a GPU to run it. A graph is recorded once and holds
the kernels of a whole step with the addresses of their tensors, so its inputs are copied to where
they were at the recording. Nothing in a step may then depend on a value that the host computes.

A run with a process group has none: a recording of its communication has not been tried.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.processes.world import World
from shards.errors import InputError

WARM_UP = 3  # steps in which compilers, libraries and the allocator prepare what they need

Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])


class StepGraph(Generic[Outputs]):
    """Make updates, and while `active` by replaying one that was recorded.

    The first three are ordinary in any case. The recorded update is compared with an ordinary one
    of the same batch, bit for bit, before it counts. The outputs lie where those of the next call
    will, so they are good until then.
    """

    def __init__(self, update: Callable[..., Outputs], changed: Callable[[], list[Tensor]]) -> None:
        """Prepare a graph of `update`.

        Args:
            update: Takes tensors of shapes that stay the same, and then numbers, and changes other
                tensors in place.
            changed: Lists the tensors that it changes.
        """
        self._update, self._changed = update, changed
        self.active = False
        self.memory = 0  # bytes of the GPU that the recording keeps for itself
        self._ordinary = 0  # updates
        self._recorded: tuple[Callable[[], None], list[Tensor], Outputs] | None = None

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Outputs:
        """Make one update with these tensors and numbers.

        Raises InputError when it cannot be recorded, and when the recording makes another update.
        """
        if not self.active or self._ordinary < WARM_UP:
            self._ordinary += 1
            return self._update(*tensors, *numbers)
        if self._recorded is None:
            self._recorded = self._begin(tensors, numbers)
            return self._recorded[2]
        replay, inputs, outputs = self._recorded
        torch._foreach_copy_(inputs[: len(tensors)], list(tensors))
        for place, number in zip(inputs[len(tensors) :], numbers, strict=True):
            place.fill_(number)  # its kernel holds the number, so that no host waits for a copy
        replay()
        return outputs

    def _begin(
        self, tensors: Sequence[Tensor], numbers: Sequence[float]
    ) -> tuple[Callable[[], None], list[Tensor], Outputs]:
        """Make the same update ordinarily, by a recording, and ordinarily again, and compare.

        The recording is made with other inputs, so that one that does not look at them is found.
        The last update shows whether there is memory for both kinds of step.

        Returns:
            What replays the recording, where its inputs are, and its outputs.
        """
        device = tensors[0].device
        given = [*tensors, *(torch.full((), number, device=device) for number in numbers)]
        inputs = [torch.zeros_like(tensor) for tensor in given]
        changed = self._changed()
        before = _copies(changed)

        def update_again(work: Callable[[], Outputs]) -> list[Tensor]:
            torch._foreach_copy_(changed, before)
            return [*_copies(work()), *_copies(changed)]

        def replay_recorded() -> Outputs:
            replay()
            return outputs

        try:
            expected = update_again(lambda: rehearse(lambda: self._update(*given)))
            torch.cuda.empty_cache()  # as the recording does, so that the difference is its own
            held = torch.cuda.memory_reserved()
            replay, outputs = record(lambda: self._update(*inputs))
            self.memory = torch.cuda.memory_reserved() - held
            torch._foreach_copy_(inputs, given)
            found = update_again(replay_recorded)
            repeated = update_again(lambda: self._update(*given))
        except RuntimeError as error:
            # The end of a recording that fails has an error of its own, which hides the first one.
            reason = str(error.__context__ or error).partition("\n")[0]
            raise InputError(f"cuda_graph: {reason}: use --no-cuda-graph") from error
        if not _same(repeated, expected):
            raise InputError(
                "cuda_graph: equal steps of this network differ on this GPU, so a recorded one "
                "cannot be compared with them: use --no-cuda-graph"
            )
        if not _same(found, expected):
            raise InputError(
                "cuda_graph: the recorded step makes another update than an ordinary one: use "
                "--no-cuda-graph"
            )
        return replay, inputs, outputs


def find_obstacle(world: World, optimizer: object) -> str:
    """Say why the steps of a run cannot be a graph, or return "".

    `optimizer` is its config.
    """
    if world.device.type != "cuda":
        return "there is no GPU"
    if world.distributed:
        return "it is for one process with --parallel.strategy auto"
    if isinstance(optimizer, TorchOptimizerConfig):
        return "a step of an optimizer of torch.optim may depend on the host"
    return ""


def rehearse(work: Callable[[], Outputs]) -> Outputs:
    """Do the work in a stream of its own, as a recording does."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        outputs = work()
    current.wait_stream(stream)
    return outputs


def record(work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Record the work without doing it, and return what does it, and where its outputs will be."""
    graph = torch.cuda.CUDAGraph()
    # The loader's threads may go on with what they do on the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work()
    return graph.replay, outputs


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Return whether all bits of all tensors are the same."""
    bits = ([t.reshape(-1).view(torch.uint8) for t in tensors] for tensors in (some, others))
    return all(map(torch.equal, *bits))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]
