"""A training job on hosts of its own, whose links, clocks and processes fail. See chaos.py.

    python -m tests.whole.chaos --hosts 3

Each host is a network namespace with one process of the job. The S3 server has one, too. In the end
every step must be in metrics.jsonl once, with the data_digest of an undisturbed run and, in
float64, its loss up to rounding. What became of each fault is measured.
"""

import contextlib
import os
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import fsspec

from engine.log import journal
from engine.state import lease
from shards.making import synthetic
from tests.helpers import object_store, tiny
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.jobs import Agent, ended, until
from tests.helpers.object_store import ObjectStore
from tests.whole.chaos_job import Job
from tests.whole.chaos_outcomes import LOSS_BOUND, Fault, count_lost
from tests.whole.hosts_network import Network, missing, network

TIMEOUT = 15  # parallel.timeout of the job
ALLOWED = 60  # seconds beyond parallel.timeout that a peer which hangs may cost
SHORT, LONG = 2.0, TIMEOUT + 10.0  # seconds without a link
DAY = 86_400
WRITES = "^(PUT|POST|DELETE) .*/run/"
CLOCK = """
    import os, time
    _time, _ahead = time.time, float(os.environ["TESTED_CLOCK_AHEAD"])
    time.time = lambda: _time() + _ahead
"""


@dataclass
class Lasted(Fault):
    """A fault with its measured times, in seconds."""

    held: float = 0.0
    """How long the fault lasted."""
    waited: float = 0.0
    """From its beginning to the first step after the last one that was done before it."""


class Hosts(Job):
    """What can happen to the hosts of a job."""

    def __init__(
        self, store: ObjectStore, proxy: FaultProxy, folder: Path, net: Network, count: int
    ) -> None:
        super().__init__(store, proxy, folder, count)
        self.net, self.faults = net, list[Lasted]()
        self.meeting = 0  # number of the host where all meet
        self.held = 0.0
        self.steps = 50_000  # more than there will be: the job is told to stop

    def start(self, number: int = 0, processes: int = 1, ahead: int = 0) -> Agent:
        """Start a host's torchrun, with a clock that is `ahead` seconds ahead."""
        host, first = self.net.hosts[number], number == 0
        door = self.store.through(self.proxy.endpoint) if first else self.store
        own = door.environment() | {"GLOO_SOCKET_IFNAME": "eth0"}
        if ahead:
            (self.folder / "sitecustomize.py").write_text(textwrap.dedent(CLOCK))
            paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
            own |= {"PYTHONPATH": os.pathsep.join(paths), "TESTED_CLOCK_AHEAD": str(ahead)}
        agent = Agent(
            [*self.arguments(self.run), "--parallel.timeout", str(TIMEOUT)],
            self.folder / f"output{number}",
            processes=processes,
            nodes=f"1:{self.machines}",
            port=self.port,
            host=number == self.meeting,
            environment=own,
            prefix=host.enter,
            address=host.address,
            meet=self.net.hosts[self.meeting].address,
        )
        self.agents[number:] = [agent, *self.agents[number + 1 :]]
        return agent

    def size(self) -> int:
        return max(self.agents[self.meeting].settings("WORLD_SIZE").values(), default=-1)

    def arguments(self, run: str) -> list[str]:
        return [*super().arguments(run), "--schedule.epochs", "10000"]

    # Faults: each strikes and ends, and returns what became of it ---------------------------

    def cut_shortly(self) -> str:
        """The last host has no link for less than the others wait."""
        return self._without_link(SHORT)

    def cut_for_long(self) -> str:
        """The last host has no link for longer than the others wait."""
        return self._without_link(LONG)

    def _without_link(self, seconds: float) -> str:
        host = self.net.hosts[self.machines - 1]
        with self._watching() as seen, self._holding(host.cut, host.heal):
            self._wait(seconds)
        return self._all_again(seen)

    def slow_link(self) -> str:
        host = self.net.hosts[self.machines - 1]
        how, dropped = "", 0

        def slow() -> None:
            nonlocal how
            how = host.slow()

        def hurry() -> None:
            nonlocal dropped
            dropped = host.hurry()

        with self._watching() as seen, self._holding(slow, hurry):
            before = self.highest()
            until(lambda: self.highest() >= before + 10)
        return f"{self._all_again(seen)}; {how}: {dropped} packets lost"

    def cut_first_off_the_store(self) -> str:
        """The host with the process that logs and commits."""
        return self._without_store(0, self.proxy.endpoint)

    def cut_last_off_the_store(self) -> str:
        return self._without_store(self.machines - 1, self.store.endpoint)

    def _without_store(self, number: int, endpoint: str) -> str:
        host, address = self.net.hosts[number], endpoint.split("/")[2].split(":")[0]
        with (
            self._watching() as seen,
            self._holding(lambda: host.lose(address), lambda: host.find(address)),
        ):
            self._wait(SHORT + 3)
        return self._all_again(seen)

    def set_clock(self) -> str:
        """The last host goes, and comes back with a clock that is a day ahead."""
        leaving = self.agents[-1]
        with self._watching() as seen, self._holding(lambda: None, lambda: None):
            os.kill(leaving.process.pid, signal.SIGTERM)
            leaving.wait(60)
            self.start(self.machines - 1, ahead=DAY)
        return self._all_again(seen)

    def freeze_process(self) -> str:
        """One process stops, while its torchrun and the connections stay: it costs the timeout."""
        with self._watching() as seen, self._holding(lambda: None, lambda: None):
            (pid,) = self.agents[-1].workers()
            before, begun = self.highest(), time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            until(lambda: self.highest() > before, TIMEOUT + ALLOWED)
            took = time.monotonic() - begun
        assert took <= TIMEOUT + ALLOWED
        return self._all_again(seen)

    def _rests(self) -> bool:
        """Return whether nobody writes to the run for half a second."""
        before = self.proxy.requests(WRITES)
        time.sleep(0.5)
        return self.proxy.requests(WRITES) == before

    def freeze_host(self) -> str:
        """The first host stops for longer than the lease; another job goes on; the host wakes."""
        frozen, others = self.agents[0], self.agents[1:]
        # A request that is under way is sent when the host wakes, which nobody could prevent.
        until(self._rests)
        with self._holding(lambda: self._signal(frozen, signal.SIGSTOP), lambda: None):
            for agent in others:
                agent.kill()
            self.meeting, self.port = 1, self.port + 1
            before = self.starts()
            for number in range(1, self.machines):
                self.start(number)
            until(lambda: self.starts() > before and self.agents[1].step())
            reached = self.highest()
            until(lambda: self.highest() > reached + 2)
            said, asked = len(frozen.text()), len(self.proxy.log)
        self._signal(frozen, signal.SIGCONT)
        words = ("was taken over by another job", "is in use by another job", "lost another")
        until(lambda: any(word in frozen.text()[said:] for word in words))
        reached = self.highest()
        until(lambda: self.highest() > reached + 5)
        written = [one for one in self.proxy.log[asked:] if one.matches(WRITES)]
        frozen.kill()
        assert not written, [f"{one.method} {one.path}" for one in written]
        with self._watching() as seen:
            self.start(0)
            found = self._all_again(seen)
        return f"the next job went on, the woken host wrote nothing; then {found}"

    # What the faults are made of ------------------------------------------------------------

    @contextlib.contextmanager
    def _holding(self, strike: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
        """Measure how long the fault lasts."""
        begun = time.monotonic()
        strike()
        try:
            yield
        finally:
            end()
            self.held = time.monotonic() - begun

    @contextlib.contextmanager
    def _watching(self) -> Iterator[list[tuple[int, int]]]:
        """Yield a list for the attempts and numbers of processes; it begins with those of now."""
        seen = [(self.attempt(), self.size())]
        self._seen = seen
        yield seen

    def _look(self) -> None:
        now = (max(self.agents[self.meeting].attempts().values(), default=-1), self.size())
        if now[1] > 0 and now != self._seen[-1]:
            self._seen.append(now)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._look()
            time.sleep(0.1)

    def _all_again(self, seen: list[tuple[int, int]]) -> str:
        """Wait until all hosts train together, and tell with how many it went on before."""
        before = self.highest()

        def together() -> bool:
            self._look()
            for number, agent in enumerate(self.agents):
                if agent.process.poll() is not None:
                    self.revived += 1
                    self.start(number)
            return self.size() == self.machines and self.highest() > before + 2

        self.revived = 0
        until(together, TIMEOUT + ALLOWED + 60)
        sizes = [str(size) for _, size in seen[1:]]
        if not sizes:
            return "waited for"
        again = f", {self.revived} torchrun started by hand" if self.revived else ""
        return f"started again with {', then '.join(sizes)} processes{again}"

    def _signal(self, agent: Agent, which: signal.Signals) -> None:
        for pid in agent.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, which)

    # The whole ------------------------------------------------------------------------------

    def kinds(self) -> dict[str, Callable[[], str]]:
        return {
            f"link cut for {SHORT:g} s": self.cut_shortly,
            f"link cut for {LONG:g} s": self.cut_for_long,
            "slow and lossy link": self.slow_link,
            "store cut off from the first host": self.cut_first_off_the_store,
            "store cut off from another host": self.cut_last_off_the_store,
            "clock a day ahead": self.set_clock,
            "process frozen": self.freeze_process,
            f"host frozen for more than {2 * lease.PERIOD:g} s, and woken": self.freeze_host,
        }

    def go(self, kinds: dict[str, Callable[[], str]]) -> None:
        """The job from start to end, with each kind of fault once."""
        with ExitStack() as stack:
            stack.callback(self._end)
            for number in range(self.machines):
                self.start(number)
            until(lambda: self._alive() and self.size() == self.machines and self.highest() > 5)
            for name, strike in kinds.items():
                self._strike(name, strike)
            for agent in self.agents:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(agent.process.pid, signal.SIGTERM)
            for agent in self.agents:
                agent.wait(60)
        self.steps = max(int(name[5:]) for name in self.committed())

    def _strike(self, name: str, strike: Callable[[], str]) -> None:
        print(f"step {self.highest()}: {name}", file=sys.stderr, flush=True)
        self.said = {agent.output: len(agent.text()) for agent in self.agents}
        step, again, begun = self.highest(), self.repeated(), time.monotonic()
        outcome = strike()
        news = [int(line.split()[1]) for line in self.news().splitlines() if _is_step(line)]
        fault = Lasted(name, min([step + 1, *news]), outcome, self.repeated() - again)
        fault.held, fault.waited = self.held, time.monotonic() - begun
        self.faults.append(fault)
        print(f"  {fault}", file=sys.stderr, flush=True)

    def _alive(self) -> bool:
        assert all(agent.process.poll() is None for agent in self.agents), "a torchrun has ended"
        return True

    def _end(self) -> None:
        with ended(*self.agents):
            if sys.exc_info()[0] is not None:
                for number, agent in enumerate(self.agents):
                    print(f"host {number}:\n{agent.text()[-4000:]}", file=sys.stderr)

    def check(self) -> None:
        """The run is the run that was never disturbed."""
        found, expected = journal.read(self.run), self.undisturbed()
        count_lost(list(self.faults), found, expected)
        assert [record["step"] for record in found] == list(range(1, self.steps + 1))
        assert [r["data_digest"] for r in found] == [r["data_digest"] for r in expected]
        for one, other in zip(found, expected, strict=True):
            assert abs(one["loss"] / other["loss"] - 1) < LOSS_BOUND, (one, other)

    def table(self) -> str:
        lines = [
            "| fault | lasted, s | all went on after, s | outcome | samples lost | repeated |",
            "|-|-|-|-|-|-|",
        ]
        for one in self.faults:
            times = f"{one.held:.0f} | {one.waited:.0f}"
            lines.append(f"| {one.name} | {times} | {one.outcome} | {one.lost} | {one.repeated} |")
        return "\n".join(lines)


def _is_step(line: str) -> bool:
    return line.startswith("step ") and line.split()[1].isdigit()


def run(count: int, choose: Callable[[Hosts], dict[str, Callable[[], str]]] = Hosts.kinds) -> str:
    """One job on `count` hosts and its twin; the table. Raises AssertionError when they differ.

    `choose` takes some of the kinds of faults.
    """
    if reason := missing():
        raise SystemExit(reason)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        net = stack.enter_context(network(count + 1))
        shelf = net.hosts[count]
        store = stack.enter_context(object_store.serve(shelf.address, shelf.enter))
        stack.enter_context(mock.patch.dict(os.environ, store.environment()))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        proxy = stack.enter_context(FaultProxy(store.endpoint, 0, {}, address=net.address))
        hosts = Hosts(store, proxy, folder, net, count)
        synthetic.write(f"{hosts.bucket}/data/train", tiny.SAMPLES, 32, seed=0)
        synthetic.write(f"{hosts.bucket}/data/val", 40, 32, seed=1)
        hosts.go(choose(hosts))
        hosts.check()
        return hosts.table()
