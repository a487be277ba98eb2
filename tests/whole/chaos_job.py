"""The job that chaos.py disturbs: its machines, and what can be seen of it from outside."""

from contextlib import closing
from pathlib import Path
from typing import Any

from engine.log import journal
from launch import train
from shards.storage import files
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.jobs import Agent, free_port, small
from tests.helpers.object_store import ObjectStore
from tests.helpers.ranks import Ranks

EVERY = 5  # steps between checkpoints
MEASURED = 10  # steps between evaluations


class Job:
    """Training on S3, behind the proxy, on one machine or two."""

    def __init__(
        self,
        store: ObjectStore,
        proxy: FaultProxy,
        folder: Path,
        machines: int,
        apart: bool = False,
    ) -> None:
        """Prepare the job. With `apart`, its loaders work in processes of their own, two each."""
        self.store, self.proxy, self.folder = store, proxy, folder
        self.apart = apart
        self.machines, self.precision = machines, "fp32" if machines == 1 else "fp64"
        self.bucket = store.bucket()
        self.run = f"{self.bucket}/run"
        self.said: dict[Path, int] = {}  # length of the machines' output when the last one struck
        self.port = free_port()
        self.steps = 0
        self.agents: list[Agent] = []
        self.output = folder / "output"

    def arguments(self, run: str) -> list[str]:
        return small(
            f"{self.bucket}/data",
            run,
            *("--steps", str(self.steps), "--checkpoint.every", str(EVERY)),
            *("--probe.every", str(MEASURED), "--precision", self.precision),
            *(("--threads", "2") if self.apart else ()),
        )

    def start(self, number: int = 0, processes: int = 2) -> Agent:
        """Start a machine's torchrun; the first one is where they meet."""
        agent = Agent(
            [*self.arguments(self.run), *(("--data.own-process", "True") if self.apart else ())],
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

    def news(self) -> str:
        """What the machines have said since the last fault."""
        outputs = {agent.output: agent.text() for agent in self.agents}
        return "\n".join(text[self.said.get(path, 0) :] for path, text in outputs.items())

    def starts(self) -> int:
        return sum(agent.text().count("steps an epoch;") for agent in self.agents)

    def size(self) -> int:
        """Processes of the job, as those of the first machine know it; -1 when it has none."""
        return max(self.agents[0].settings("WORLD_SIZE").values(), default=-1)

    def attempt(self) -> int:
        """How often torchrun has started the first machine's workers again; -1: there are none."""
        return max(self.agents[0].attempts().values(), default=-1)

    def committed(self) -> list[str]:
        names = files.list_names(f"{self.run}/checkpoints")
        return [n for n in names if files.exists(f"{self.run}/checkpoints/{n}/commit.json")]

    def highest(self) -> int:
        return max((step for agent in self.agents for step in agent.steps()), default=0)

    def repeated(self) -> int:
        """Steps that were done more than once so far."""
        steps = [line for agent in self.agents for line in agent.steps()]
        return len(steps) - len(set(steps))

    def undisturbed(self) -> list[dict[str, Any]]:
        """Return the log of the same job without faults, whose loaders work in its processes."""
        run = f"{self.bucket}/undisturbed"
        with closing(Ranks(2)) as ranks:
            assert ranks.run(train.main, self.arguments(run), size=2, seconds=600) == [0, 0]
        return journal.read(run)
