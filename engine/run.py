"""The run directory: whose it is, what stands in it, and the refusal to mix it with another run."""

import json
from collections.abc import Callable
from typing import Any

from engine.processes.world import World
from engine.recipe import Recipe, differences, flatten, method_fields
from engine.state import checkpoint, layout
from engine.state.artefacts import Artefacts
from engine.state.checkpoint import Commit
from shards.errors import InputError
from shards.storage import files

DIGEST = "index_digest"


def write(recipe: Recipe, index_digest: str) -> None:
    """Note the resolved recipe of this start, and the data's digest, in RUN/recipe.json."""
    fields = flatten(recipe)
    document = {k: files.redact(v) if isinstance(v, str) else v for k, v in fields.items()}
    document |= {DIGEST: index_digest}
    files.write(files.join(recipe.run, layout.RECIPE), json.dumps(document, indent=1).encode())


def check(recipe: Recipe, index_digest: str, report: Callable[[str], None]) -> None:
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
    refuse_other(recipe, index_digest, recipe.run, method, there.get(DIGEST))


def open_artefacts(recipe: Recipe, world: World, strategy: str) -> Artefacts:
    """What torch.compile made at an earlier start of this recipe, in RUN or where it says."""
    folder = recipe.compile_folder or files.join(recipe.run, layout.COMPILE)
    return Artefacts(folder, method_fields(recipe), strategy, recipe.parallel.recompute, world)


# Machines may differ in these; all else is one run.
_MACHINES_OWN = {
    *("run", "data.train", "data.val", "data.prefetch", "data.cache", "data.cache_gb"),
    *("threads", "compile", "compile_folder"),
}


def check_alike(world: World, facts: dict[str, Any]) -> None:
    """Raise InputError, on every process, when they were not all started with the same `facts`."""
    found = world.all_gather_object(facts)
    for rank, there in enumerate(found):
        if listed := differences(there, found[0]):
            raise InputError(
                f"processes were started for different runs ({'; '.join(listed)}; here is rank 0, "
                f"there rank {rank}): start every machine with the same command and data"
            )


def shared_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that all processes of a run must agree on."""
    return {k: v for k, v in flatten(recipe).items() if k not in _MACHINES_OWN}


def refuse_other(
    recipe: Recipe,
    index_digest: str,
    url: str,
    method: dict[str, Any],
    digest_there: str | None,
    mend: str = "give another --run",
) -> None:
    """Raise InputError, listing what differs, unless what is at `url` is of this recipe and data.

    `method`: the method fields there, by dotted name. `mend`: what else the user could do.
    """
    found = differences(method, method_fields(recipe))
    if digest_there != index_digest:
        found.append(f"digest of data.train: there {digest_there}, here {index_digest}")
    if found:
        raise InputError(
            f"{files.redact(url)} is of another recipe or data set ({'; '.join(found)}): "
            f"set these back, or {mend}"
        )


def find_checkpoint(
    recipe: Recipe, index_digest: str, world: World, report: Callable[[str], None]
) -> Commit | None:
    """This run's newest checkpoint, or the one to start from, if it is of this recipe.

    All processes call it together. Raises InputError.
    """
    resume, mend = recipe.checkpoint.resume, "give another --run"
    commit = checkpoint.latest(recipe.run, world, report)
    if commit is None and resume:
        commit = checkpoint.find(resume, world, report)
        mend = "give another --checkpoint.resume"
    if commit is not None:
        there = commit.method, commit.index_digest
        refuse_other(recipe, index_digest, commit.url, *there, mend)
    return commit
