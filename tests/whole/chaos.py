"""A training job on S3 that everything goes wrong for, beside the same job undisturbed.

    python -m tests.whole.chaos --faults 60 --seed 1            one machine of two processes
    python -m tests.whole.chaos --faults 60 --own-process       loaders in processes of their own
    python -m tests.whole.chaos --faults 20 --machines 2        two machines, one comes and goes
    python -m tests.whole.chaos --hosts 3                       hosts of their own, see hosts.py

Behind a proxy that harms requests now and then, faults strike at steps that the seed decides. In
the end metrics.jsonl must have every step once, as the undisturbed run has it: with one machine bit
for bit but for the timings, with two the same data_digest and, in float64, losses up to rounding.
What became of each fault is looked for in the job's output, processes and checkpoints; when nobody
can tell of one, that is a failure.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import fsspec

from engine.log import journal
from engine.log.metrics import TIMINGS
from shards.making import synthetic
from shards.storage import files
from tests.helpers import object_store, tiny
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.jobs import SECONDS, Agent, ended, until
from tests.helpers.object_store import ObjectStore
from tests.whole import hosts
from tests.whole.chaos_job import MEASURED, Job
from tests.whole.chaos_outcomes import LOSS_BOUND, UNKNOWN, Fault, count_lost, table

HARM = {"delay": 0.02, "slow_down": 0.01, "drop": 0.01, "truncate": 0.01, "wrong": 0.01}
STEPS_BETWEEN = (4, 16)  # faults
LASTING = {  # steps that the job may take meanwhile
    "SIGKILL in evaluation": 10,
    "told to stop in evaluation": 10,
    "outage of the store": 10,
    "second job": 30,
    "machine lost, and back": 30,
    "machine told to stop, and back": 30,
}

Worker = tuple[Agent, int, int]  # its machine, its process number, which attempt it belongs to
Outcome = Callable[[], str]  # what became of a fault; empty as long as nobody can tell


class Chaos(Job):
    """What can happen to a job."""

    def __init__(
        self,
        store: ObjectStore,
        proxy: FaultProxy,
        folder: Path,
        *,
        machines: int,
        seed: int,
        apart: bool,
    ) -> None:
        super().__init__(store, proxy, folder, machines, apart)
        self.random = random.Random(seed)
        self.faults: list[Fault] = []

    # Faults: each strikes, and returns how to tell what became of it -------------------------

    def kill_in_startup(self) -> Outcome:
        """The second kill strikes while the processes of the next attempt start."""
        self._kill_one()
        old = set(self.agents[0].workers())
        until(lambda: len(set(self.agents[0].workers()) - old) == 2)
        time.sleep(self.random.uniform(0.2, 6))
        return self._kill_one()

    def kill_in_step(self) -> Outcome:
        time.sleep(self.random.uniform(0, 0.2))
        return self._kill_one()

    def kill_all(self) -> Outcome:
        return self._kill(lambda workers: workers)

    def kill_loader(self) -> Outcome:
        """A process that loads images for a worker is gone, as when memory is short."""
        (agent,) = self.agents
        until(agent.loaders)
        attempt = self.attempt()
        os.kill(self.random.choice(agent.loaders()), signal.SIGKILL)

        def outcome() -> str:
            told = "the process that loads the images ended by signal 9" in self.news()
            return "told, restarted by torchrun" if told and self.attempt() > attempt else ""

        return outcome

    def kill_in_save(self) -> Outcome:
        self._request("PUT .*/checkpoints/|POST .*/checkpoints/")
        return self._kill_one()

    def kill_in_evaluation(self) -> Outcome:
        self._request("GET .*/data/val/.*tar")
        time.sleep(self.random.uniform(0, 0.05))
        return self._kill_one()

    def stop_by_signal(self) -> Outcome:
        """The scheduler takes the machine away, and gives it back."""
        (agent,) = self.agents
        os.kill(agent.process.pid, self.random.choice([signal.SIGTERM, signal.SIGUSR1]))
        agent.wait(60)
        saved = self._saved_at_once()
        assert not agent.left()
        self.start()
        resumed = f"resumed at step {saved} "
        return lambda: "saved at once, started again" if resumed in self.news() else ""

    def stop_in_evaluation(self) -> Outcome:
        self._request("GET .*/data/val/.*tar")
        return self.stop_by_signal()

    def lose_the_machine(self) -> Outcome:
        """Agent and workers are gone without a word; somebody starts the same command."""
        self.agents[0].kill()
        before = self.starts()
        agent = self.start()
        started = "started again"
        return lambda: started if self.starts() > before and agent.workers() else ""

    def damage_newest(self) -> Outcome:
        """The newest checkpoint is no longer what it was, and everybody dies."""

        def candidates() -> list[str]:
            # What was damaged before may still lie there, at a later step than this attempt's.
            return [name for name in self.committed() if int(name[5:]) <= self.step()]

        until(lambda: len(candidates()) > 1, every=0.2)
        self._kill(lambda workers: workers)
        newest = candidates()[-1]
        folder = f"{self.run}/checkpoints/{newest}"
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

        def outcome() -> str:
            pattern = f"skipped: .*{newest}.*\n(?s:.*)resumed at step (\\d+)"
            resumed = re.search(pattern, self.news())
            older = resumed and int(resumed[1]) < int(newest[5:])
            return "skipped, the one before it taken" if older else ""

        return outcome

    def outage(self) -> Outcome:
        """For some seconds the store answers nobody."""
        until(self.agents[0].attempts)
        attempt, refused = self.attempt(), self.proxy.counts()["slow_down"]
        self.proxy.set({"slow_down": 1.0})
        time.sleep(self.random.uniform(1, 4))
        until(lambda: self.proxy.counts()["slow_down"] > refused)
        self.proxy.set(HARM)
        saved = self.committed()

        def outcome() -> str:
            if self.attempt() > attempt:
                return "restarted by torchrun"
            return "waited for" if set(self.committed()) - set(saved) else ""

        return outcome

    def second_job(self) -> Outcome:
        """Somebody starts the same command once more, elsewhere."""
        other = Agent(
            self.arguments(self.run),
            self.folder / f"other{len(self.faults)}",
            processes=1,
            restarts=0,
            environment=self.store.environment(),
        )
        with ended(other):
            code = other.wait(90)
        errors = re.findall("^error: .*", other.text(), re.MULTILINE)
        refused = code != 0 and len(errors) == 1 and "is in use by another job" in errors[0]
        return lambda: "refused in one line" if refused and not other.steps() else ""

    def lose_and_rejoin(self) -> Outcome:
        """A second machine is lost; the first goes on without it; it comes back."""
        self.agents[1].kill()
        found = self._go_on_without()
        return lambda: found

    def take_one_away(self) -> Outcome:
        """The second machine is told to stop: the first goes on without it; it comes back."""
        leaving = self.agents[1]
        os.kill(leaving.process.pid, signal.SIGTERM)
        leaving.wait(60)
        self._saved_at_once()
        found = f"saved at once, {self._go_on_without()}"
        return lambda: found

    def _go_on_without(self) -> str:
        """The first machine goes on alone; then the second one comes back, and all start again."""
        joining = self.random.choice([1, 2])
        for size in (2, 2 + joining):
            before = self.starts()
            if size > 2:
                self.start(1, processes=joining)
            until(lambda b=before, s=size: self.starts() > b and self.size() == s)  # type: ignore[misc]
        return f"went on with 2 processes, then with {2 + joining}"

    def _saved_at_once(self) -> int:
        """The step that the job says it has stopped after, which is saved."""
        until(lambda: "stopped after step" in self.news(), 10)
        (step,) = set(re.findall(r"stopped after step (\d+) by", self.news()))
        assert f"step_{int(step):08d}" in self.committed(), (step, self.committed())
        return int(step)

    def _kill_one(self) -> Outcome:
        return self._kill(lambda workers: self.random.sample(workers, 1))

    def _kill(self, choose: Callable[[list[Worker]], list[Worker]]) -> Outcome:
        """Kill some of the workers that live, once there are any."""
        killed: list[Worker] = []

        def kill() -> bool:
            living = [(agent, *one) for agent in self.agents for one in agent.attempts().items()]
            for worker in choose(living) if living else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker[1], signal.SIGKILL)
                    killed.append(worker)
            return bool(killed)

        until(kill, every=0.002)
        until(lambda: not any(pid in agent.attempts() for agent, pid, _ in killed))

        def outcome() -> str:
            again = all(max(a.attempts().values(), default=0) > n for a, _, n in killed)
            return "restarted by torchrun" if again else ""

        return outcome

    def _request(self, pattern: str) -> None:
        before = self.proxy.requests(pattern)
        until(lambda: self.proxy.requests(pattern) > before, every=0.002)

    # The whole ------------------------------------------------------------------------------

    def kinds(self) -> dict[str, Callable[[], Outcome]]:
        if self.machines == 2:
            return {
                "machine lost, and back": self.lose_and_rejoin,
                "machine told to stop, and back": self.take_one_away,
                "SIGKILL in a step": self.kill_in_step,
                "SIGKILL in a save": self.kill_in_save,
            }
        return {
            **({"SIGKILL of a loader": self.kill_loader} if self.apart else {}),
            "SIGKILL in start-up": self.kill_in_startup,  # after one in a step
            "SIGKILL in a save": self.kill_in_save,
            "SIGKILL in evaluation": self.kill_in_evaluation,
            "SIGKILL in a step": self.kill_in_step,
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
        self.steps = at[-1] + 2 * MEASURED + sum(LASTING.get(name, 0) for name in plan)
        with ExitStack() as stack:
            stack.callback(self._end)
            for number in range(self.machines):
                self.start(number)
            for name, step in zip(plan, at, strict=True):
                until(lambda step=step: self._at(step))  # type: ignore[misc]
                self._strike(name, kinds[name])
            for agent in self.agents:
                assert agent.wait() == 0, agent.text()[-3000:]
                assert not agent.left()

    def _strike(self, name: str, strike: Callable[[], Outcome]) -> None:
        """One fault, until what became of it is known and the job is further than it was."""
        print(f"step {self.step()}: {name}", file=sys.stderr, flush=True)
        self.said = {agent.output: len(agent.text()) for agent in self.agents}
        step, again = self.step(), self.repeated()
        outcome, end = strike(), time.monotonic() + SECONDS
        while not (found := outcome()) and time.monotonic() < end:
            time.sleep(0.05)
        before = self.highest()
        until(lambda: self._at(0) and self.highest() > before)
        news = [int(n) for n in re.findall(r"^step (\d+) ", self.news(), re.MULTILINE)]
        fault = Fault(name, min([step + 1, *news]), found or UNKNOWN, self.repeated() - again)
        self.faults.append(fault)

    def _end(self) -> None:
        """Nothing of the job stays behind; what it said does, when it went wrong."""
        with ended(*self.agents):
            if sys.exc_info()[0] is not None:
                for number, agent in enumerate(self.agents):
                    print(f"machine {number}:\n{agent.text()[-4000:]}", file=sys.stderr)

    def _at(self, step: int) -> bool:
        assert self.agents[0].process.poll() is None, self.agents[0].text()[-3000:]
        return self.step() >= step

    def check(self) -> None:
        """The run is the run that was never disturbed."""
        found, expected = journal.read(self.run), self.undisturbed()
        count_lost(self.faults, found, expected)
        assert not [f for f in self.faults if f.lost or f.outcome == UNKNOWN], self.table()
        lines = files.read(f"{self.run}/{journal.JSONL}").decode().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, self.steps + 1))
        assert [r["data_digest"] for r in found] == [r["data_digest"] for r in expected]
        for one, other in zip(found, expected, strict=True):
            if self.machines == 1:
                for name in TIMINGS:
                    one.pop(name, None), other.pop(name, None)
                assert one == other
            else:
                assert abs(one["loss"] / other["loss"] - 1) < LOSS_BOUND, (one, other)

    def table(self) -> str:
        return table(self.kinds(), self.faults, self.proxy.counts())


def run(
    store: object_store.ObjectStore, faults: int, machines: int, seed: int, apart: bool = False
) -> str:
    """One job and its twin; the table. Raises AssertionError when they are not the same run."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(mock.patch.dict(os.environ, store.environment()))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        proxy = stack.enter_context(FaultProxy(store.endpoint, seed, HARM))
        chaos = Chaos(store, proxy, folder, machines=machines, seed=seed, apart=apart)
        synthetic.write(f"{chaos.bucket}/data/train", tiny.SAMPLES, 32, seed=0)
        synthetic.write(f"{chaos.bucket}/data/val", 40, 32, seed=1)
        chaos.go(faults)
        chaos.check()
        return chaos.table()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--machines", type=int, choices=(1, 2), default=1)
    parser.add_argument("--hosts", type=int, choices=range(2, 9), default=0, metavar="2..8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--own-process", action="store_true", help="loaders work in processes of their own"
    )
    args = parser.parse_args(arguments)
    if args.hosts:
        print(hosts.run(args.hosts))
        return
    with object_store.serve() as store:
        print(run(store, args.faults, args.machines, args.seed, args.own_process))


if __name__ == "__main__":
    main(sys.argv[1:])
