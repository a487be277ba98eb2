"""Run the sides of a benchmark that are another project's in a process of their own.

There they have the settings of PyTorch and of the C library that their users have. Ours would
hold in the same process for both: freed memory is kept, and cuDNN is told to be deterministic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import multiprocessing

from launch.benchmarks.measuring import Cost

Work = dict[str, Callable[[], Cost]]
Builder = Callable[..., Work]


@contextmanager
def apart(build: Builder, *arguments: Any, threads: int) -> Iterator[Work]:
    """Start a process that builds some sides, and yield them; it ends with the block.

    Each side is measured there when it is called here. Meanwhile this process waits.

    Args:
        build: Makes the sides of the arguments.
        threads: Threads of torch on the CPU there.

    Raises what `build` raises there, and RuntimeError when the process ends before its time.
    """
    context = multiprocessing.get_context("spawn")  # torch's, which shares tensors
    own, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, build, arguments, threads))
    process.start()
    theirs.close()  # so that its end is noticed here
    try:
        names = _receive(own)
        yield {name: partial(_ask, own, name) for name in names}
    finally:
        own.close()  # which tells it to end
        process.join()


def _ask(pipe: Connection, name: str) -> Cost:
    pipe.send(name)
    cost: Cost = _receive(pipe)
    return cost


def _receive(pipe: Connection) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError("the process of another project's sides ended: see above") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(pipe: Connection, build: Builder, arguments: tuple[Any, ...], threads: int) -> None:
    """Build the sides, send their names, and measure those that are asked for."""
    torch.set_num_threads(threads)
    try:
        sides = build(*arguments)
    except ImportError as error:
        pipe.send(error)
        return
    pipe.send(list(sides))
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(sides[name]())
