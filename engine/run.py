"""The run directory: whose it is, what stands in it, and the refusal to mix it with another run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.log.metrics import MetricsLog, NoLog
from engine.log.terminal import Terminal
from engine.processes.identity import agent_identity
from engine.processes.world import World
from engine.recipe import Recipe, method_fields
from engine.state import checkpoint, layout, lease
from engine.state.artefacts import Artefacts
from engine.state.checkpoint import Commit
from shards.errors import InputError
from shards.fields import differences, flatten
from shards.storage import files

DIGEST = "index_digest"


class Run:
    """One run directory and what this job keeps in it: recipe, checkpoints, artefacts, log.

    It is made by `claim`, or by `open_run` where nobody else can be at work.
    """

    def __init__(
        self,
        recipe: Recipe,
        index_digest: str,
        world: World,
        terminal: Terminal,
        start: Commit | None,
        held: lease.Lease | None = None,
    ) -> None:
        """`held`: the lease, on the first process of a job that claimed the run."""
        self.url, self.terminal = recipe.run, terminal
        self.start = start
        """The checkpoint that this job goes on from; None at the beginning."""
        self._recipe, self._digest, self._world, self._held = recipe, index_digest, world, held

    def write_recipe(self) -> None:
        """Note the resolved recipe of this start, and the data's digest, in RUN/recipe.json."""
        self._world.on_main(lambda: _write_recipe(self._recipe, self._digest))

    def artefacts(self, strategy: str) -> Artefacts:
        """What torch.compile made at an earlier start of this recipe, in RUN or where it says."""
        recipe = self._recipe
        folder = recipe.compile_folder or files.join(recipe.run, layout.COMPILE)
        method, recompute = method_fields(recipe), recipe.parallel.recompute
        return Artefacts(folder, method, strategy, recompute, self._world)

    def check(self) -> None:
        """Raise InputError once the run is known to be another job's."""
        if self._held is not None:
            self._held.check()

    def save(self, step: int, state: dict[str, Any], world: World) -> None:
        """Write `state` as the checkpoint of `step`; commit it, if the run is still this job's.

        All processes of `world` call it together. Raises OSError on all when one could not write.
        """
        report = self.terminal.report
        sums = checkpoint.write(self.url, step, state, world, report)

        def commit() -> None:
            self._look()
            checkpoint.commit(self.url, step, sums, method_fields(self._recipe), self._digest)

        world.on_main(commit)

    def prune(self, step: int) -> None:
        """Remove checkpoints that are too many, after that of `step`, on the first process."""
        config, report = self._recipe.checkpoint, self.terminal.report
        if not self._world.main:
            return
        try:
            checkpoint.prune(self.url, step, config.keep, config.keep_every, report)
        except OSError as error:  # the next save does it
            report(f"old checkpoints stay for now: {error}")

    def compact(self, log: MetricsLog) -> None:
        """Have all lines of `log` in metrics.jsonl, if the run is still this job's."""
        try:
            self._look()
        except OSError as error:
            log.postpone(str(error))
        else:
            log.compact()

    @contextmanager
    def open_log(self, step: int, stop: int) -> Iterator[MetricsLog]:
        """The log from `step` on; what is left of it is written at the end.

        Once the run is another job's, so is its log: then nothing is written.
        """
        if not self._world.main:
            yield NoLog()
            return
        log = MetricsLog(self.url, step, stop, self.terminal)
        try:
            yield log
        finally:
            log.stop()
            try:
                self._look()
                log.finish()
            except OSError as error:
                log.give_up(str(error))
            except InputError:
                pass

    def _look(self) -> None:
        """Raise InputError when the run is another job's by now, OSError when nobody can tell."""
        if self._held is not None:
            self._held.confirm()


@contextmanager
def claim(recipe: Recipe, index_digest: str, world: World, terminal: Terminal) -> Iterator[Run]:
    """Hold the run directory for this job: nobody else trains there meanwhile.

    All processes call it together. With `debug_step` nothing is held, since nothing is written.
    Raises InputError when the directory is another recipe's, or another job holds it.
    """
    agents = world.all_gather_object(agent_identity())
    claimed: list[lease.Lease] = []

    def hold() -> None:
        _check_recipe(recipe, index_digest, terminal.report)
        if not recipe.debug_step:
            claimed.append(lease.acquire(recipe.run, agents, lease.PERIOD, terminal.report))

    try:
        world.on_main(hold)
        held = claimed[0] if claimed else None
        start = find_checkpoint(recipe, index_digest, world, terminal.report)
        yield Run(recipe, index_digest, world, terminal, start, held)
    finally:
        for one in claimed:
            one.release()


def open_run(recipe: Recipe, index_digest: str, world: World, terminal: Terminal) -> Run:
    """`claim` without a lease. Raises InputError when the directory is another recipe's."""
    world.on_main(lambda: _check_recipe(recipe, index_digest, terminal.report))
    start = find_checkpoint(recipe, index_digest, world, terminal.report)
    return Run(recipe, index_digest, world, terminal, start)


def find_checkpoint(
    recipe: Recipe, index_digest: str, world: World, report: Callable[[str], None]
) -> Commit | None:
    """This run's newest checkpoint, or the one to start from, if it is of this recipe.

    All processes call it together. Raises InputError.
    """
    resume, remedy = recipe.checkpoint.resume, "give another --run"
    commit = checkpoint.latest(recipe.run, world, report)
    if commit is None and resume:
        commit = checkpoint.find(resume, world, report)
        remedy = "give another --checkpoint.resume"
    if commit is not None:
        there = commit.method, commit.index_digest
        _refuse_other(recipe, index_digest, commit.url, *there, remedy)
    return commit


def _write_recipe(recipe: Recipe, index_digest: str) -> None:
    fields = flatten(recipe)
    document = {k: files.redact(v) if isinstance(v, str) else v for k, v in fields.items()}
    document |= {DIGEST: index_digest}
    files.write(files.join(recipe.run, layout.RECIPE), json.dumps(document, indent=1).encode())


def _check_recipe(recipe: Recipe, index_digest: str, report: Callable[[str], None]) -> None:
    """Raise InputError when RUN holds a run of another recipe or of other data."""
    url = files.join(recipe.run, layout.RECIPE)
    try:
        there = files.read_json(url)
        if not isinstance(there, dict):
            raise ValueError
    except FileNotFoundError:
        return
    except ValueError:
        report(f"{files.redact(url)} is damaged; it is written anew")
        return
    operations = flatten(recipe).keys() - method_fields(recipe).keys()
    method = {name: there[name] for name in there.keys() - operations - {DIGEST}}
    _refuse_other(recipe, index_digest, recipe.run, method, there.get(DIGEST))


def _refuse_other(
    recipe: Recipe,
    index_digest: str,
    url: str,
    method: dict[str, Any],
    digest_there: str | None,
    remedy: str = "give another --run",
) -> None:
    """Raise InputError, listing what differs, unless what is at `url` is of this recipe and data.

    `method`: the method fields there, by dotted name. `remedy`: what else the user could do.
    """
    found = differences(method, method_fields(recipe))
    if digest_there != index_digest:
        found.append(f"digest of data.train: there {digest_there}, here {index_digest}")
    if found:
        raise InputError(
            f"{files.redact(url)} is of another recipe or data set ({'; '.join(found)}): "
            f"set these back, or {remedy}"
        )
