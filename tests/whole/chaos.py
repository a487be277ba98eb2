"""A training job on S3 that everything goes wrong for, beside the same job undisturbed.

    python -m tests.whole.chaos --faults 60 --seed 1            one machine of two processes
    python -m tests.whole.chaos --faults 20 --machines 2        two machines, one comes and goes

Behind a proxy that harms requests now and then, faults strike at steps that the seed decides. In
the end metrics.jsonl must have every step once, as the undisturbed run has it: with one machine bit
for bit but for the timings, with two the same data_digest and, in float64, losses up to rounding.
"""

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec

from engine.log import journal
from shards.making import synthetic
from shards.storage import files
from tests.helpers import object_store, tiny
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.jobs import Agent, ended, free_port, small, until

TIMINGS = ("images_per_second", "data_wait")
HARM = {"delay": 0.02, "slow_down": 0.01, "drop": 0.01, "truncate": 0.01, "wrong": 0.01}
STEPS_BETWEEN = (4, 16)  # faults
EVERY = 5  # steps between checkpoints
MEASURED = 10  # steps between evaluations
LOSS_BOUND = 1e-6  # relative, in float64: what the rounding of another number of processes grew to


@dataclass
class Row:
    """What one kind of fault did."""

    times: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    repeated: int = 0  # steps done again


class Chaos:
    """The job, and what can happen to it."""

    def __init__(
        self,
        store: object_store.ObjectStore,
        proxy: FaultProxy,
        folder: Path,
        machines: int,
        seed: int,
    ) -> None:
        self.random = random.Random(seed)
        self.store, self.proxy, self.folder = store, proxy, folder
        self.machines, self.precision = machines, "fp32" if machines == 1 else "fp64"
        self.bucket = store.bucket()
        self.run = f"{self.bucket}/run"
        self.rows: dict[str, Row] = {}
        self.port = free_port()
        self.steps = 0
        self.agents: list[Agent] = []
        self.output = folder / "output"

    # The job --------------------------------------------------------------------------------

    def arguments(self, run: str) -> list[str]:
        return small(
            f"{self.bucket}/data",
            run,
            *("--steps", str(self.steps), "--checkpoint.every", str(EVERY)),
            *("--probe.every", str(MEASURED), "--precision", self.precision),
        )

    def start(self, number: int = 0, processes: int = 2) -> Agent:
        """Start a machine's torchrun; the first one is where they meet."""
        agent = Agent(
            self.arguments(self.run),
            self.folder / f"output{number}",
            processes=processes,
            nodes=f"1:{self.machines}",
            port=self.port,
            host=number == 0,
            environment=self.store.through(self.proxy.endpoint).environment(),
        )
        self.agents[number:] = [agent, *self.agents[number + 1 :]]
        return agent

    def step(self) -> int:
        return max(agent.step() for agent in self.agents)

    def restarted(self, since: int) -> Callable[[], bool]:
        """Whether training goes on after it has stopped: a new line tells of a step."""
        return lambda: sum(len(agent.text()) for agent in self.agents) > since

    # Faults ---------------------------------------------------------------------------------

    def kill_in_startup(self) -> str:
        """The second kill strikes while the processes of the next attempt start."""
        self._kill_one()
        old = set(self.agents[0].workers())
        until(lambda: len(set(self.agents[0].workers()) - old) == 2)
        time.sleep(self.random.uniform(0.2, 6))
        return self._kill_one()

    def kill_in_step(self) -> str:
        time.sleep(self.random.uniform(0, 0.2))
        return self._kill_one()

    def kill_all(self) -> str:
        for pid in self.agents[0].workers():
            os.kill(pid, signal.SIGKILL)
        return "restarted by torchrun"

    def kill_in_save(self) -> str:
        self._request("PUT .*/checkpoints/|POST .*/checkpoints/")
        return self._kill_one()

    def kill_in_evaluation(self) -> str:
        self._request("GET .*/data/val/.*tar")
        time.sleep(self.random.uniform(0, 0.05))
        return self._kill_one()

    def stop_by_signal(self) -> str:
        """The scheduler takes the machine away, and gives it back."""
        (agent,) = self.agents
        os.kill(agent.process.pid, self.random.choice([signal.SIGTERM, signal.SIGUSR1]))
        agent.wait(60)
        assert "stopped after step" in agent.text(), agent.text()[-2000:]
        assert not agent.left()
        self.start()
        return "saved at once, started again"

    def stop_in_evaluation(self) -> str:
        self._request("GET .*/data/val/.*tar")
        return self.stop_by_signal()

    def lose_the_machine(self) -> str:
        """Agent and workers are gone without a word; somebody starts the same command."""
        self.agents[0].kill()
        self.start()
        return "started again"

    def damage_newest(self) -> str:
        """The newest checkpoint is no longer what it was, and everybody dies."""
        names = files.list_names(f"{self.run}/checkpoints")
        committed = [n for n in names if files.exists(f"{self.run}/checkpoints/{n}/commit.json")]
        for pid in self.agents[0].workers():
            os.kill(pid, signal.SIGKILL)
        folder = f"{self.run}/checkpoints/{committed[-1]}"
        name = self.random.choice(files.list_names(folder))
        content = files.read(f"{folder}/{name}")
        how = self.random.choice(["flip", "cut", "delete"])
        if how == "delete":
            files.remove(f"{folder}/{name}")
        elif how == "cut":
            files.write(f"{folder}/{name}", content[: len(content) // 2])
        else:
            place = self.random.randrange(len(content))
            flipped = bytes([content[place] ^ 1 << self.random.randrange(8)])
            files.write(f"{folder}/{name}", content[:place] + flipped + content[place + 1 :])
        return "skipped, the one before it taken"

    def outage(self) -> str:
        """For some seconds the store answers nobody."""
        self.proxy.set({"slow_down": 1.0})
        time.sleep(self.random.uniform(1, 4))
        self.proxy.set(HARM)
        return "waited for, or restarted"

    def second_job(self) -> str:
        """Somebody starts the same command once more, elsewhere."""
        other = Agent(
            self.arguments(self.run),
            self.folder / f"other{self.rows['second job'].times}",
            processes=1,
            environment=self.store.environment(),
        )
        with ended(other):
            until(lambda: "is in use by another job" in other.text(), 90)
        return "refused in one line"

    def lose_and_rejoin(self) -> str:
        """A second machine is lost; the first goes on without it; it comes back."""
        lost = self.agents[1]
        lost.kill()
        self._go_on_without()
        return "went on with 2 processes, then with 3 or 4"

    def take_one_away(self) -> str:
        """The second machine is told to stop: the first goes on without it; it comes back."""
        leaving = self.agents[1]
        os.kill(leaving.process.pid, signal.SIGTERM)
        leaving.wait(60)
        self._go_on_without()
        return "saved at once, went on with 2 processes, then with 3 or 4"

    def _go_on_without(self) -> None:
        """The first machine goes on alone; then the second one comes back, and all start again."""
        for comes_back in (False, True):
            before = self._starts()
            if comes_back:
                self.start(1, processes=self.random.choice([1, 2]))
            until(lambda before=before: self._starts() > before)  # type: ignore[misc]

    def _starts(self) -> int:
        return sum(agent.text().count("steps an epoch;") for agent in self.agents)

    def _kill_one(self) -> str:
        pids = [pid for agent in self.agents for pid in agent.workers()]
        if pids:
            os.kill(self.random.choice(pids), signal.SIGKILL)
        return "restarted by torchrun"

    def _request(self, pattern: str) -> None:
        before = self.proxy.requests(pattern)
        until(lambda: self.proxy.requests(pattern) > before, every=0.002)

    # The whole ------------------------------------------------------------------------------

    def kinds(self) -> dict[str, Callable[[], str]]:
        if self.machines == 2:
            return {
                "machine lost, and back": self.lose_and_rejoin,
                "machine told to stop, and back": self.take_one_away,
                "SIGKILL in a step": self.kill_in_step,
                "SIGKILL in a save": self.kill_in_save,
            }
        return {
            "SIGKILL in a step": self.kill_in_step,
            "SIGKILL in a save": self.kill_in_save,
            "SIGKILL in start-up": self.kill_in_startup,
            "SIGKILL in evaluation": self.kill_in_evaluation,
            "SIGKILL of all workers": self.kill_all,
            "checkpoint damaged": self.damage_newest,
            "told to stop": self.stop_by_signal,
            "told to stop in evaluation": self.stop_in_evaluation,
            "machine lost": self.lose_the_machine,
            "outage of the store": self.outage,
            "second job": self.second_job,
        }

    def go(self, faults: int) -> None:
        """The job from start to end, with that many faults."""
        kinds = self.kinds()
        cycle = itertools.cycle(kinds)
        plan = [next(cycle) for _ in range(faults)]
        self.random.shuffle(plan)
        at = list(itertools.accumulate(self.random.randint(*STEPS_BETWEEN) for _ in plan))
        self.rows = {name: Row() for name in kinds}
        self.steps = at[-1] + 4 * MEASURED + 10 * plan.count("told to stop in evaluation")
        with ExitStack() as stack:
            stack.callback(self._end)
            for number in range(self.machines):
                self.start(number)
            for name, step in zip(plan, at, strict=True):
                until(lambda step=step: self._at(step))  # type: ignore[misc]
                row, again = self.rows[name], self._repeated()
                print(f"step {self.step()}: {name}", file=sys.stderr, flush=True)
                row.outcomes[kinds[name]()] += 1
                row.times += 1
                before = self.step()
                until(lambda before=before: self._at(before + 1))  # type: ignore[misc]
                row.repeated += self._repeated() - again
            for agent in self.agents:
                assert agent.wait() == 0, agent.text()[-3000:]
                assert not agent.left()

    def _end(self) -> None:
        """Nothing of the job stays behind; what it said does, when it went wrong."""
        with ended(*self.agents):
            if sys.exc_info()[0] is not None:
                for number, agent in enumerate(self.agents):
                    print(f"machine {number}:\n{agent.text()[-4000:]}", file=sys.stderr)

    def _at(self, step: int) -> bool:
        assert self.agents[0].process.poll() is None, self.agents[0].text()[-3000:]
        return self.step() >= step

    def _repeated(self) -> int:
        """Steps that were done more than once so far."""
        steps = [line for agent in self.agents for line in agent.steps()]
        return len(steps) - len(set(steps))

    def undisturbed(self) -> list[dict[str, Any]]:
        run = f"{self.bucket}/undisturbed"
        agent = Agent(
            self.arguments(run),
            self.folder / "undisturbed",
            processes=2,
            environment=self.store.environment(),
        )
        with ended(agent):
            assert agent.wait(600) == 0, agent.text()[-3000:]
        return journal.read(run)

    def check(self) -> None:
        """The run is the run that was never disturbed."""
        found, expected = journal.read(self.run), self.undisturbed()
        lines = files.read(f"{self.run}/{journal.JSONL}").decode().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, self.steps + 1))
        assert [r["data_digest"] for r in found] == [r["data_digest"] for r in expected]
        for one, other in zip(found, expected, strict=True):
            if self.machines == 1:
                for name in TIMINGS:
                    del one[name], other[name]
                assert one == other
            else:
                assert abs(one["loss"] / other["loss"] - 1) < LOSS_BOUND, (one, other)

    def table(self) -> str:
        lines = ["| fault | times | outcome | samples lost | steps repeated |", "|-|-|-|-|-|"]
        for name, row in self.rows.items():
            outcome = "; ".join(row.outcomes)
            lines.append(f"| {name} | {row.times} | {outcome} | 0 | {row.repeated} |")
        for kind, times in self.proxy.counts().items():
            lines.append(f"| request: {kind} | {times} | tried again | 0 | |")
        return "\n".join(lines)


def run(store: object_store.ObjectStore, faults: int, machines: int, seed: int) -> str:
    """One job and its twin; the table. Raises AssertionError when they are not the same run."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(mock.patch.dict(os.environ, store.environment()))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        proxy = stack.enter_context(FaultProxy(store.endpoint, seed, HARM))
        chaos = Chaos(store, proxy, folder, machines, seed)
        synthetic.write(f"{chaos.bucket}/data/train", tiny.SAMPLES, 32, seed=0)
        synthetic.write(f"{chaos.bucket}/data/val", 40, 32, seed=1)
        chaos.go(faults)
        chaos.check()
        return chaos.table()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--machines", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    with object_store.serve() as store:
        print(run(store, args.faults, args.machines, args.seed))


if __name__ == "__main__":
    main(sys.argv[1:])
