"""Keep a pool of processes that act as the ranks of many small runs, one after the other."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from engine.processes import world
from tests.helpers.processes import FORKED

SECONDS = 240


class RankFailure(AssertionError):
    """Some ranks failed. The text says which ranks and why."""


class Ranks:
    """A pool of processes that call a function together, as ranks of one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(self.size):
            ours, theirs = FORKED.Pipe()
            process = FORKED.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        size: int,
        seconds: float = SECONDS,
        machine: int | None = None,
    ) -> list[Any]:
        """Call `function(*arguments)` on `size` ranks, and return the result of each rank.

        They have the environment that this process has now.

        Raises RankFailure when a rank fails. If a rank gave no answer, the pool starts anew.

        Args:
            seconds: How long to wait for each rank's answer.
            machine: Number of ranks that are told to be on one machine; by default all of them.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        local = machine or size
        for rank, pipe in enumerate(self._pipes[:size]):
            places = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            places |= {"LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in places.items()} if size > 1 else {}
            pipe.send((function, arguments, os.environ | environment))
        answers = []
        failures = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(seconds):
                failures.append(f"rank {rank}: no answer in {seconds} s")
                break
            fine, answer = pipe.recv()
            if not fine:
                failures.append(f"rank {rank}: {answer}")
                seconds = 10  # The other ranks may be waiting for this one in vain.
            answers.append(answer)
        if failures:
            if len(answers) < size:  # A rank hangs, or others may soon hang.
                self.close()
                self._start()
            raise RankFailure("\n".join(failures))
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, arguments, environment = pipe.recv()
        os.environ.clear()
        os.environ.update(environment)
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        finally:
            world.leave()
        pipe.send(answer)
