"""The run directory: claim it, read it and write it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.continuation import Found, check_recipe, find_checkpoint
from engine.log.metrics import MetricsLog, NoLog
from engine.log.terminal import Terminal
from engine.processes.identity import agent_identity
from engine.processes.world import World
from engine.recipe import Recipe, method_fields
from engine.state import baselines, checkpoint, layout, lease, origin
from engine.state.artefacts import Artefacts
from engine.state.best import Best, find_best
from engine.state.origin import Origin
from engine.state.same_folder import check_same_folder
from shards.errors import InputError
from shards.fields import flatten
from shards.storage import files, local_files


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
        found: Found | None,
        held: lease.Lease | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        """Open the run that a job holds by the lease `held`.

        It is None on all processes except the first, and where nobody holds the run. `source` is
        what recipe.json says of the recipe file.
        """
        self.url, self.terminal = recipe.run, terminal
        found = found or Found(None, False, None)
        self.start, self.branches, self.recorded = found
        self.origin = Origin() if found.commit is None else found.commit.origin
        """How the run began. The trainer completes it before anything is written."""
        self.source = source or {}
        self._recipe, self._digest, self._world, self._held = recipe, index_digest, world, held
        self._facts: dict[str, Any] | None = None  # in recipe.json, once this start has written it

    def write_recipe(self, total_steps: int | None = None) -> None:
        """Write this start's resolved recipe and the digest of its data to RUN/recipe.json.

        `total_steps` is the number of steps of the whole run, for those who read it.
        """
        facts = {origin.DIGEST: self._digest} | self.origin.fields() | self.source
        if total_steps is not None:
            facts[layout.TOTAL] = total_steps
        self._world.on_main(lambda: _write_recipe(self._recipe, facts))
        self._facts = facts

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
            self._restore_recipe()
            method = method_fields(self._recipe)
            checkpoint.commit(self.url, step, sums, method, self._digest, self.origin)

        world.on_main(commit)

    def _restore_recipe(self) -> None:
        """Write recipe.json again when somebody has moved the run away, or removed it.

        Otherwise no command could read what this job goes on to write.
        """
        url = files.join(self.url, layout.RECIPE)
        if self._facts is not None and not files.exists(url):
            _write_recipe(self._recipe, self._facts)
            self.terminal.say(
                f"{files.redact(url)} was gone, so the run was moved or removed while this job "
                "trains: it goes on here, and what was saved before is not here any more"
            )

    def prune(self, step: int, keep_every: int | str) -> None:
        """Remove surplus checkpoints once that of `step` is saved; only the first process acts."""
        config, report = self._recipe.checkpoint, self.terminal.report
        if not self._world.main:
            return
        try:
            checkpoint.prune(self.url, step, config.keep, keep_every, report, config.keep_best)
        except OSError as error:  # the next save tries again
            report(f"old checkpoints stay for now: {error}")

    def find_best(self, until: int) -> Best:
        """Find the best checkpoint up to the step `until`, by the recipe's `checkpoint.keep_best`.

        All processes call it together. Raises OSError when the log cannot be read.
        """
        key = self._recipe.checkpoint.keep_best
        if not key:
            return Best(key)
        return self._world.on_main(
            lambda: find_best(self.url, key, checkpoint.committed_steps(self.url, until))
        )

    def compact(self, log: MetricsLog) -> None:
        """Write all lines of `log` to metrics.jsonl, if this job still has the run."""
        try:
            self._look()
        except OSError as error:
            log.postpone(str(error))
        else:
            log.compact()

    @contextmanager
    def open_log(
        self, step: int, stop: int, total_steps: int = 0, momentum: float = 1.0
    ) -> Iterator[MetricsLog]:
        """Open the log for the steps from `step` to `stop`, and write its last lines at the end.

        The whole run has `total_steps`, by default `stop`. `momentum` is the smallest one of the
        encoder's norms.

        Nothing is written at the end when another job has taken over the run, because the log is
        then that job's.
        """
        if not self._world.main:
            yield NoLog()
            return
        log = MetricsLog(self.url, step, stop, self.terminal, total_steps, momentum)
        log.describe(_without_secrets(self._recipe), method_fields(self._recipe), self._recipe.log)
        if self.branches and self.start and log.last is None:
            if found := baselines.inherit(self.start.url, _without_secrets(self._recipe)):
                log.write({"step": 0, "epoch": 0} | found)
            log.write({"step": step, origin.BRANCH: _describe(self.origin)})
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
def claim(
    recipe: Recipe,
    index_digest: str,
    world: World,
    terminal: Terminal,
    source: dict[str, Any] | None = None,
) -> Iterator[Run]:
    """Hold the run directory for this job, so that no other job trains there meanwhile.

    Its recipe.json keeps `source`, which describes the recipe file.

    All processes call it together. With `debug_step` nothing is held, because all that is written
    then is RUN/debug_step, which is removed again.

    Raises InputError when the directory has a run of another recipe or of other data, or when
    another job holds it.
    """
    agents = world.all_gather_object(agent_identity())
    claimed: list[lease.Lease] = []
    refused, made = True, layout.find_missing(recipe.run, layout.DEBUG_STEP)

    def hold() -> None:
        check_run(recipe, index_digest, terminal)
        if not recipe.debug_step:
            claimed.append(lease.acquire(recipe.run, agents, lease.PERIOD, terminal.report))

    try:
        world.on_main(hold)
        held = claimed[0] if claimed else None
        check_same_folder(recipe.run, held, world)
        found = find_checkpoint(recipe, index_digest, world, terminal.report)
        yield Run(recipe, index_digest, world, terminal, found, held, source)
        refused = False
    finally:
        for one in claimed:
            one.release(refused)
        if recipe.debug_step and world.main:
            layout.remove_debug_step(recipe.run, made, terminal.report)


def open_run(
    recipe: Recipe,
    index_digest: str,
    world: World,
    terminal: Terminal,
    before: float = math.inf,
) -> Run:
    """Open the run directory without holding it. Checkpoints of steps from `before` on don't count.

    Raises InputError when it has a run of another recipe or of other data.
    """
    world.on_main(lambda: check_run(recipe, index_digest, terminal))
    found = find_checkpoint(recipe, index_digest, world, terminal.report, before)
    return Run(recipe, index_digest, world, terminal, found)


def check_run(recipe: Recipe, index_digest: str | None, terminal: Terminal) -> None:
    """Raise InputError when parts of RUN lie elsewhere, or are of another kind, recipe or data.

    The data is not compared when its digest is not known.
    """
    layout.refuse_links(recipe.run, layout.NAMES, "give --run-url where the whole run shall lie")
    layout.check_kinds(recipe.run)
    check_recipe(recipe, index_digest, terminal.report)


def _without_secrets(recipe: Recipe) -> dict[str, Any]:
    fields = flatten(recipe)
    for name in ("run", "data.train", "data.val", "probe.train", "probe.val"):
        fields[name] = local_files.absolute(fields[name])  # an evaluation may start elsewhere
    return layout.without_secrets(fields)


def _describe(known: Origin) -> str:
    point = known.branched_from
    return "" if point is None else f"step {point.step} of {point.url}"


def _write_recipe(recipe: Recipe, facts: dict[str, Any]) -> None:
    document = _without_secrets(recipe) | facts
    files.write(files.join(recipe.run, layout.RECIPE), json.dumps(document, indent=1).encode())
