"""Save and load checkpoints at a URL.

RUN/checkpoints/step_00000100/ holds the files of torch's distributed checkpoint of step 100. A
checkpoint exists when its commit.json exists. That file is written last, in one PUT, and holds the
length and CRC32 of every other file. These are verified before anything is unpickled. A damaged
checkpoint is reported, and the one before it is used.

All processes of a run call the functions that take a `world` together, each with its own `world`.
The other functions are called by one process.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

from annotated_types import Interval
from torch import Size
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from engine.method.durations import Duration, Lasting, is_due, simplify
from engine.processes.world import World
from engine.state import dcp_metadata
from engine.state.best import find_best
from engine.state.dcp_files import Reader, Sums, Writer, verify_file
from engine.state.layout import CHECKPOINTS, MOST_STEPS, STEP
from engine.state.layout import COMMIT as COMMIT
from engine.state.nearby import tell_missing
from engine.state.origin import Origin
from shards.digest import digest
from shards.documents import Natural, Sum32, build, shown
from shards.errors import InputError
from shards.fields import Operation
from shards.storage import files, names
from shards.threads import run_in_threads

FORMAT = 3
LOOKS = 16  # commits that are looked for at once; a run may keep thousands of checkpoints


@dataclass(frozen=True)
class CheckpointConfig:
    """Configure when the run is saved, and what it starts from."""

    every: Operation[Annotated[Duration, Lasting()]] = 1000
    """Time from one checkpoint to the next: steps, such as 1000, or epochs, such as '1 epoch'. The
    last step of a process is saved too. 0 saves only that one. A step whose update was skipped
    because a gradient was not finite is left out."""
    keep: Operation[Annotated[int, Interval(ge=1)]] = 3
    """Number of newest checkpoints that stay."""
    keep_every: Operation[Annotated[Duration, Lasting()]] = 0
    """Checkpoints that are due by this time too stay for good: steps, such as 10000, or epochs,
    such as '10 epochs'. Choose a multiple of checkpoint.every. 0 keeps no others."""
    keep_best: Operation[str] = ""
    """Name of a figure in the log, such as knn_top1 or linear_top1. The checkpoint where it is
    largest stays too, and an evaluation that finds a new best is saved at once. By default none is
    kept for that."""
    background: Operation[bool] = True
    """Go on training while a checkpoint is written. Training waits only while the state is copied,
    and before that until the checkpoint before this one is written."""
    grace: Operation[Annotated[float, Interval(ge=0, le=1e6)]] = 25
    """Seconds that a process has after a signal that stops it to end its step and save; then it
    exits at once. Choose less than the time after which the
    scheduler kills the process."""
    resume: Operation[str] = ""
    """URL of another run, or of one of its checkpoints, whose full state a new run starts from.
    Recipe and data must be the same."""
    branch: Operation[str] = ""
    """URL of another run, or of one of its checkpoints, from whose full state a new run goes on
    with changed method fields or other data. The changes are listed and kept in the new run's
    recipe. The shapes of the networks must stay the same."""

    def __post_init__(self) -> None:
        simplify(self, "every")
        simplify(self, "keep_every")

    def due(self, step: int) -> bool:
        """Return whether `every` asks for a checkpoint of `step`."""
        return is_due(self.every, step)


@dataclass(frozen=True)
class Commit:
    """Hold what commit.json says: the checkpoint's files, and the run that it belongs to.

    Where there is a sound commit.json, the whole checkpoint was written.
    """

    url: str
    step: int
    method: dict[str, Any]  # the recipe's method fields by dotted names
    index_digest: str
    files: Sums
    digest: str = ""
    origin: Origin = field(default_factory=Origin)


@dataclass(frozen=True)
class _Document:
    """The content of commit.json."""

    format: int
    digest: str
    step: Annotated[int, Interval(ge=0, lt=MOST_STEPS)]
    method: dict[str, Any]
    index_digest: str
    files: dict[str, tuple[Natural, Sum32]]
    origin: Origin = field(default_factory=Origin)


def step_url(run: str, step: int) -> str:
    return files.join(run, CHECKPOINTS, f"step_{step:08d}")


def save(
    run: str,
    step: int,
    state: dict[str, Any],
    method: dict[str, Any],
    index_digest: str,
    world: World,
    report: Callable[[str], None] = print,
) -> Commit:
    """Write `state`, nested dicts of tensors, as the checkpoint of `step`, and commit it.

    Raises OSError on all processes when one of them could not write.
    """
    sums = write(run, step, state, world, report)
    return world.on_main(lambda: commit(run, step, sums, method, index_digest))


def write(
    run: str, step: int, state: dict[str, Any], world: World, report: Callable[[str], None]
) -> Sums:
    """Write the files of the checkpoint of `step`, without its commit.

    Every process writes the part of `state` that it holds. Each gets the lengths and CRCs of the
    files of all processes. Raises OSError on all processes when one of them could not write.
    """
    url = step_url(run, step)
    # A process that was killed may have left files there. Those that cannot be removed do no harm:
    # they are overwritten, or the commit does not name them.
    world.on_main(lambda: files.discard(url, run, report))
    writer = Writer(url)
    with _one_process_is_fine(), _plain_errors(url, "written"):
        dcp_save(
            state,
            storage_writer=writer,
            process_group=world.group,
            no_dist=not world.distributed,
        )
    parts = world.all_gather_object(writer.sums)
    return {name: entry for part in parts for name, entry in part.items()}


def commit(
    run: str,
    step: int,
    sums: Sums,
    method: dict[str, Any],
    index_digest: str,
    origin: Origin | None = None,
) -> Commit:
    """Make the checkpoint of `step` exist: write its commit.json in one PUT, on one process."""
    origin = origin or Origin()
    url = step_url(run, step)
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    document = {"format": FORMAT, "step": step, "method": method, "index_digest": index_digest}
    document |= {"packages": packages, "files": sums, "origin": asdict(origin)}
    document["digest"] = found = _digest(document)
    files.write(files.join(url, COMMIT), json.dumps(document, indent=1).encode())
    return Commit(url, step, method, index_digest, sums, found, origin)


def load(commit: Commit, state: dict[str, Any], world: World) -> None:
    """Fill the tensors of `state` from a checkpoint that `latest` or `find` has verified.

    Raises InputError for damaged content, and OSError when the tensors cannot be read.
    """
    reader = Reader(commit.url, commit.files)
    with _one_process_is_fine(), _plain_errors(commit.url, "read"):
        dcp_load(
            state,
            storage_reader=reader,
            process_group=world.group,
            no_dist=not world.distributed,
        )


def shapes(commit: Commit, world: World) -> dict[str, Size]:
    """Return the shapes of the tensors in a checkpoint, by their dotted names in the state."""

    def read() -> dict[str, Size]:
        found = Reader(commit.url, commit.files).metadata().state_dict_metadata
        return {name: one.size for name, one in found.items() if hasattr(one, "size")}

    return world.on_main(read)


def latest(
    run: str, world: World, report: Callable[[str], None], before: float = math.inf
) -> Commit | None:
    """Find the newest sound checkpoint of a run, of a step less than `before`, or return None.

    Damaged checkpoints are reported and skipped.
    """
    for step in reversed(world.on_main(lambda: steps(run))):
        if step >= before:
            continue
        try:
            return verify(step_url(run, step), world)
        except InputError as error:
            if world.main:
                report(f"skipped: {error}")
    return None


def find(
    url: str, world: World, report: Callable[[str], None], name: str = "checkpoint.resume"
) -> Commit:
    """Find the checkpoint at `url`, or the newest checkpoint of the run at `url`.

    `name` is the field or argument that gave the URL, for the message. Raises InputError when there
    is no checkpoint, or when the one at `url` is damaged.
    """
    try:
        if world.on_main(lambda: files.exists(files.join(url, COMMIT))):
            return verify(url, world)
        found = latest(url, world, report)
    except PermissionError as error:
        example = files.redact(step_url(url, 100))
        raise InputError(
            f"{name} {error}; without that, give the URL of one checkpoint, such as {example}"
        ) from None
    if found is None:
        missing = tell_missing(url, takes_files=not name.startswith("checkpoint."))
        raise InputError(f"{name} {files.redact(url)}: {missing}")
    return found


def verify(url: str, world: World) -> Commit:
    """Check a checkpoint's commit, its metadata, and the length and CRC32 of its files.

    Each process checks some of the files. The metadata may only name what a checkpoint of this
    engine holds. Raises the same on all processes: InputError when anything is wrong, and OSError
    when a process cannot read its files.
    """
    commit = world.on_main(lambda: _read_commit(url))

    def verify_own() -> None:
        for name in sorted(commit.files)[world.rank :: world.size]:
            if name == dcp_metadata.NAME:
                Reader(url, commit.files).metadata()
            else:
                verify_file(files.join(url, name), *commit.files[name])

    world.on_all(verify_own, shared=True)
    return commit


def _read_commit(url: str) -> Commit:
    place = files.redact(url)
    try:
        document = files.read_json(files.join(url, COMMIT))
    except FileNotFoundError:
        raise InputError(f"{place}: not committed, its save was cut off or still goes on") from None
    except (ValueError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{place}: {COMMIT} is damaged, no JSON: {error}") from None
    there = document.get("format", FORMAT) if isinstance(document, dict) else FORMAT
    if there != FORMAT:
        raise InputError(f"{place}: format {shown(there)}, not {FORMAT}")
    try:
        content = build(_Document, document)
        if content.digest != _digest(document):
            raise InputError("its digest is that of another content")
        named = re.fullmatch(rf"step_({STEP})", url.rstrip("/").rpartition("/")[2])
        if named and int(named[1]) != content.step:
            raise InputError(f"step is {content.step}, not that of the folder's name")
    except InputError as error:
        raise InputError(f"{place}: {COMMIT} is damaged: {error}") from None
    for name in content.files:
        names.check_name(name, f"{place}: {COMMIT}", "take another checkpoint")
    facts = content.method, content.index_digest, content.files, content.digest, content.origin
    return Commit(url, content.step, *facts)


def _digest(document: dict[str, Any]) -> str:
    """Compute 16 hex digits of the SHA-256 of everything in a commit except its digest."""
    facts = {name: value for name, value in document.items() if name != "digest"}
    return digest(json.dumps(facts, sort_keys=True))


def prune(
    run: str,
    step: int,
    keep: int,
    keep_every: int | str = 0,
    report: Callable[[str], None] = print,
    keep_best: str = "",
) -> None:
    """Remove the committed checkpoints except the newest, those of `keep_every` and the best.

    The commit of each is removed first. If the store refuses that, the checkpoint stays whole. What
    a process that was killed in a save, or in a removal, has left of earlier ones is removed too.

    Args:
        step: The step just saved. Checkpoints of later steps were found damaged when this process
            started. They do not count, and stay until they are overwritten.
        keep: Number of checkpoints that stay, at least 1.
        keep_every: Checkpoints at the steps where this duration is due stay too. 0 keeps no others.
        report: Is called with a line about what a store refuses to remove.
        keep_best: The checkpoint where the log has the largest value of this key stays too. ""
            keeps no other.
    """
    found = steps(run)
    committed = _committed(run, found, step)
    best = find_best(run, keep_best, committed).step
    for number in committed[:-keep]:
        if number == best or is_due(keep_every, number):
            continue
        url = step_url(run, number)
        if files.discard(files.join(url, COMMIT), run, report):
            files.discard(url, run, report)
    for number in set(found).difference(committed):
        if number < max(committed, default=0):
            files.discard(step_url(run, number), run, report)


def committed_steps(run: str, until: int = MOST_STEPS) -> list[int]:
    """List the steps of a run's committed checkpoints up to the step `until`, rising."""
    return _committed(run, steps(run), until)


def _committed(run: str, found: list[int], until: int) -> list[int]:
    asked = [step for step in found if step <= until]
    commits = [files.join(step_url(run, step), COMMIT) for step in asked]
    found_there = run_in_threads(files.exists, commits, LOOKS)
    return [step for step, there in zip(asked, found_there, strict=True) if there]


def tell_newest(run: str, until: int) -> str:
    """Return a clause that says which committed checkpoint is the newest up to the step `until`."""
    try:
        found = committed_steps(run, until)
    except OSError:  # what went wrong with the training is more important
        return f"checkpoints up to step {until} are kept"
    if not found:
        return "no checkpoint was saved before that"
    return f"the checkpoint of step {found[-1]}, saved before that, is kept"


def steps(run: str) -> list[int]:
    """List the steps of a run's checkpoints, committed or not, rising.

    Other names in the folder are ignored.
    """
    found = files.list_names(files.join(run, CHECKPOINTS))
    return sorted(int(name[5:]) for name in found if re.fullmatch(rf"step_(?:{STEP})", name))


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Hide torch's warning that there is no process group. A single process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _plain_errors(url: str, what: str) -> Iterator[None]:
    """Raise OSError or InputError in place of torch's CheckpointException.

    That one is no Exception but a BaseException, so `except Exception` would not catch it.
    """
    try:
        yield
    except CheckpointException as error:
        if what == "read" and not files.exists(files.join(url, COMMIT)):
            raise InputError(
                f"{files.redact(url)}: was removed while it was read, as the training of a run "
                "removes its older checkpoints: start again to take a newer one"
            ) from None
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, InputError):
            raise cause from None
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        place = files.redact(url)
        raise OSError(f"{place} could not be {what} by rank {rank}: {reason}") from None
