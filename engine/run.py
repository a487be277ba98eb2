"""The run directory: claim it, read and write it, and refuse to mix it with another run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.log.metrics import MetricsLog, NoLog
from engine.log.terminal import Terminal
from engine.processes.identity import agent_identity
from engine.processes.world import World
from engine.recipe import ADDED_LATER, Recipe, method_fields
from engine.state import checkpoint, layout, lease
from engine.state.artefacts import Artefacts
from engine.state.checkpoint import Commit
from shards.errors import InputError
from shards.fields import differences, flatten
from shards.storage import files, local_files, misplaced

DIGEST = "index_digest"


class Run:
    """Read and write one run directory: its recipe, checkpoints, compiled artefacts and log.

    `claim` makes one for a job that trains, and `open_run` makes one without a lease.
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
        """Open the run that a job holds by the lease `held`.

        It is None on all processes except the first, and where nobody holds the run.
        """
        self.url, self.terminal = recipe.run, terminal
        self.start = start
        """The checkpoint that this job continues from; None when the run begins."""
        self._recipe, self._digest, self._world, self._held = recipe, index_digest, world, held

    def write_recipe(self) -> None:
        """Write this start's resolved recipe and the digest of its data to RUN/recipe.json."""
        self._world.on_main(lambda: _write_recipe(self._recipe, self._digest))

    def artefacts(self, strategy: str) -> Artefacts:
        """Open the store of compiled artefacts, in RUN or in the recipe's `compile_folder`."""
        recipe = self._recipe
        folder = recipe.compile_folder or files.join(recipe.run, layout.COMPILE)
        method, recompute = method_fields(recipe), recipe.parallel.recompute
        return Artefacts(folder, method, strategy, recompute, self._world)

    def check(self) -> None:
        """Raise InputError when it is known that another job has taken over the run."""
        if self._held is not None:
            self._held.check()

    def confirm(self, world: World) -> None:
        """Read the storage, and raise InputError on all processes when another job has the run.

        Raises OSError on all processes when nobody can tell.
        """
        world.on_main(self._look)

    def save(self, step: int, state: dict[str, Any], world: World) -> None:
        """Write `state` as the checkpoint of `step`, and commit it if this job still has the run.

        All processes of `world` call it together.

        Raises OSError on all processes when one could not write, or when nobody can tell who has
        the run. Raises InputError when another job has it.
        """
        report = self.terminal.report
        sums = checkpoint.write(self.url, step, state, world, report)

        def commit() -> None:
            self._look()
            checkpoint.commit(self.url, step, sums, method_fields(self._recipe), self._digest)

        world.on_main(commit)

    def prune(self, step: int) -> None:
        """Remove surplus checkpoints once that of `step` is saved; only the first process acts."""
        config, report = self._recipe.checkpoint, self.terminal.report
        if not self._world.main:
            return
        try:
            checkpoint.prune(self.url, step, config.keep, config.keep_every, report)
        except OSError as error:  # the next save tries again
            report(f"old checkpoints stay for now: {error}")

    def compact(self, log: MetricsLog) -> None:
        """Write all lines of `log` to metrics.jsonl, if this job still has the run."""
        try:
            self._look()
        except OSError as error:
            log.postpone(str(error))
        else:
            log.compact()

    @contextmanager
    def open_log(self, step: int, stop: int) -> Iterator[MetricsLog]:
        """Open the log for the steps from `step` to `stop`, and write its last lines at the end.

        Nothing is written at the end when another job has taken over the run, because the log is
        then that job's.
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
        """Raise InputError when another job has the run now, OSError when nobody can tell."""
        if self._held is not None:
            self._held.confirm()


@contextmanager
def claim(recipe: Recipe, index_digest: str, world: World, terminal: Terminal) -> Iterator[Run]:
    """Hold the run directory for this job, so that no other job trains there meanwhile.

    All processes call it together. With `debug_step` nothing is held, because all that is written
    then is RUN/debug_step, which is removed again.

    Raises InputError when the directory has a run of another recipe or of other data, or when
    another job holds it.
    """
    agents = world.all_gather_object(agent_identity())
    claimed: list[lease.Lease] = []

    def hold() -> None:
        layout.refuse_links(recipe.run, layout.NAMES, "give --run where the whole run shall lie")
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
    """Open the run directory without holding it.

    Raises InputError when it has a run of another recipe or of other data.
    """

    def check() -> None:
        layout.refuse_links(recipe.run, layout.NAMES, "give --run where the whole run shall lie")
        _check_recipe(recipe, index_digest, terminal.report)

    world.on_main(check)
    start = find_checkpoint(recipe, index_digest, world, terminal.report)
    return Run(recipe, index_digest, world, terminal, start)


def find_checkpoint(
    recipe: Recipe, index_digest: str, world: World, report: Callable[[str], None]
) -> Commit | None:
    """Find the newest checkpoint of the run or, if it has none, that of `checkpoint.resume`.

    All processes call it together. Raises InputError when the checkpoint is of another recipe or
    of other data.
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
    for name in ("data.train", "data.val"):  # An evaluation may be started in another folder.
        fields[name] = local_files.absolute(fields[name])
    document = {k: files.redact(v) if isinstance(v, str) else v for k, v in fields.items()}
    document |= {DIGEST: index_digest}
    files.write(files.join(recipe.run, layout.RECIPE), json.dumps(document, indent=1).encode())


def _check_recipe(recipe: Recipe, index_digest: str, report: Callable[[str], None]) -> None:
    """Raise InputError when RUN has a run of another recipe or of other data."""
    url = files.join(recipe.run, layout.RECIPE)
    above = misplaced.folder_of(recipe.run)
    if misplaced.last_name(recipe.run) == layout.CHECKPOINTS and layout.read_recipe(above):
        raise InputError(
            f"run {files.redact(recipe.run)}: is inside of a run: give {files.redact(above)}"
        )
    try:
        there = files.read_json(url)
        if not isinstance(there, dict):
            raise ValueError
    except FileNotFoundError:
        return
    except ValueError:
        report(f"{files.redact(url)} is damaged and was not compared with this recipe")
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
    """Raise InputError, listing the differences, unless `url` belongs to this recipe and data.

    Args:
        method: The method fields found at `url`, by dotted name.
        digest_there: The digest of the training data found at `url`.
        remedy: What else the user could do, for the message.
    """
    found = differences(ADDED_LATER | method, method_fields(recipe))
    if digest_there != index_digest:
        found.append(f"digest of data.train: there {digest_there}, here {index_digest}")
    if found:
        raise InputError(
            f"{files.redact(url)} is of another recipe or data set ({'; '.join(found)}): "
            f"set these back, or {remedy}"
        )
