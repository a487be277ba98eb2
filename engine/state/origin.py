"""Describe how a run began: from drawn weights, from given ones, or as a branch of another run.

A run's recipe.json and each of its checkpoints hold this. So a later start needs neither the file
of the weights nor the other run.
"""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.state import layout
from shards.documents import Natural, build
from shards.errors import InputError
from shards.storage import files, local_files, misplaced

# The keys of recipe.json that are no fields of a recipe.
DIGEST = "index_digest"
WEIGHTS = "model.start_digest"
BRANCH = "branched_from"
SOURCE = "recipe_file"
FACTS = {DIGEST, layout.TOTAL, WEIGHTS, BRANCH, SOURCE}


@dataclass(frozen=True)
class Weights:
    """Name the weights that a run started from."""

    url: str  # without secrets; of the checkpoint, where a run was given
    digest: str


@dataclass(frozen=True)
class BranchPoint:
    """Say where a run left another one, its parent."""

    url: str  # of the parent's checkpoint, without secrets
    step: Natural  # of the parent
    digest: str  # of the parent's commit.json
    step_here: Natural  # the same place in this run
    order: str  # whether the order of the images continues
    changed: dict[str, Any] = field(default_factory=dict)  # by field: {"there": ..., "here": ...}


@dataclass(frozen=True)
class Origin:
    """Say how a run began."""

    samples: Natural = 0  # images of its training set; 0 in what earlier versions wrote
    weights: Weights | None = None
    branched_from: BranchPoint | None = None

    def fields(self) -> dict[str, Any]:
        """Return what recipe.json says of it."""
        found: dict[str, Any] = {}
        if self.weights is not None:
            found[WEIGHTS] = self.weights.digest
        if self.branched_from is not None:
            found[BRANCH] = asdict(self.branched_from)
        return found


def describe_source(file: str, said: dict[str, Any]) -> dict[str, Any]:
    """Return what recipe.json says of the recipe file that a start took.

    Args:
        file: The path of the file.
        said: What the file says of the fields that the command line changed, by dotted name.
    """
    place = local_files.absolute(file)
    return {SOURCE: {"file": place, "said": layout.without_secrets(said)}}


def of_fields(fields: dict[str, Any]) -> Origin:
    """Return what the fields of a recipe.json say. What is damaged in them counts as absent."""
    url, digest, branch = (fields.get(name) for name in ("model.start", WEIGHTS, BRANCH))
    weights = Weights(url, digest) if isinstance(url, str) and isinstance(digest, str) else None
    try:
        return Origin(0, weights, None if branch is None else build(BranchPoint, branch))
    except InputError:
        return Origin(0, weights)


def home(url: str) -> str:
    """Return the URL of the run that a checkpoint is in; other URLs are returned as they are."""
    url = url.rstrip("/")
    above = misplaced.folder_of(url)
    return misplaced.folder_of(above) if misplaced.last_name(above) == layout.CHECKPOINTS else url


def names_same(given: str, there: str) -> bool:
    """Return whether the URL `given` is that of `there`, a checkpoint or file, or of its run."""
    return any(_place(given) == _place(one) for one in (there, home(there)))


def _place(url: str) -> tuple[str, str]:
    """Return what is equal for two spellings of one place."""
    url = files.redact(url)
    if not files.is_local(url):
        return "", url.rstrip("/")
    return "local", os.path.realpath(files.local_path(url))
