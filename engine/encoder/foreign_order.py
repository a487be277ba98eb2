"""Match the tensors of a ResNet by their order and their shapes, whatever their names are."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Size, Tensor

from engine.encoder.foreign_shapes import COUNTER, Candidate, candidates, describe, options
from shards.errors import InputError

# The names that others give to the tensors of a norm, in torch's order of the tensors.
_NORM = (
    *(("weight", "gamma", "scale"), ("bias", "beta", "offset")),
    *(("running_mean", "moving_mean", "mean"), ("running_var", "moving_variance", "var")),
    (COUNTER,),
)
_ROLES = {name: role for role, names in enumerate(_NORM) for name in names}

# What a stranger's file may hold, so that the search for its network ends.
MOST_STEMS = 1000  # tensors that may be the first one of a network
MOST_WIDTHS = 8  # numbers of channels of these; each takes a second


class Match(NamedTuple):
    """The names of a network's tensors in a checkpoint."""

    candidate: Candidate
    names: dict[str, str]  # this project's name: the file's name
    how: str


def match_order(tensors: Mapping[str, Tensor], place: str) -> dict[str, Match]:
    """Find all networks whose tensors follow one another. The keys are their first tensors."""
    everything = _sort_names(tensors)
    names = [n for n in everything if tensors[n].ndim and tensors[n].is_floating_point()]
    counters = {a: b for a, b in itertools.pairwise(everything) if not tensors[b].ndim}
    shapes = [tensors[name].shape for name in names]
    found: dict[str, Match] = {}
    nearest, told = 5, ""  # the stem's five tensors alone are no sign of a ResNet
    for start, candidate, order in _attempts(shapes, place):
        there = shapes[start : start + len(order)]
        pairs = zip((candidate.shapes[ours] for ours in order), there, strict=False)
        fitting = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        end, first = start + fitting, names[start]
        if fitting == len(order) and shapes[end : end + 1] != [candidate.further]:
            taken = dict(zip(order, names[start:end], strict=True))
            for ours, name in list(taken.items()):
                if ours.endswith("running_var") and name in counters:
                    taken[ours.replace("running_var", COUNTER)] = counters[name]
            how = f"by position and shape from {first!r} on"
            found[first] = Match(candidate, taken, how)
        elif fitting > nearest:
            nearest = fitting
            told = (
                f": nearest is {describe(candidate.config)}: {fitting} tensors from {first!r} on "
                f"fit, not {repr(names[end]) if end < len(names) else 'the end of the file'}"
            )
    if not found:
        depths = ", ".join(str(depth) for depth in options("depth"))
        raise InputError(
            f"{place}: no ResNet found (of depth {depths}), neither by names such as "
            f"layer1.0.conv1.weight nor by the order of shapes{told}"
        )
    return found


def _attempts(shapes: Sequence[Size], place: str) -> Iterator[tuple[int, Candidate, list[str]]]:
    """Yield every start, network and order of its tensors that may be in the file.

    A start is a convolution of three channels before the four tensors of its norm. Raises
    InputError when there are more of them than any checkpoint has.
    """
    starts = [
        start
        for start, shape in enumerate(shapes)
        if len(shape) == 4 and shape[1] == 3 and set(shapes[start + 1 : start + 5]) == {shape[:1]}
    ]
    widths = {shapes[start][0] for start in starts}
    if len(starts) > MOST_STEMS or len(widths) > MOST_WIDTHS:
        raise InputError(
            f"{place}: {len(starts):,} tensors of {len(widths):,} widths may be the first one of a "
            "ResNet, more than can be tried: save the encoder's state dict alone"
        )
    for start in starts:
        for candidate in candidates(shapes[start][0]):
            for order in candidate.orders:
                yield start, candidate, order


def _sort_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the file's order, and undo what sorting them as text has mixed up."""
    names = list(tensors)
    if names == sorted(names):  # sorting puts block 10 before block 2
        parts = {name: re.split(r"(\d{1,9})", name) for name in names}  # numbers at odd places
        names.sort(key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(parts[name])])
    ordered: list[str] = []
    for _, group in itertools.groupby(names, lambda name: name.rpartition(".")[0]):
        module = list(group)
        roles = [_ROLES.get(name.rpartition(".")[2]) for name in module]
        if None not in roles:  # sorting puts a norm's bias before its weight
            module.sort(key=lambda name: _ROLES[name.rpartition(".")[2]])
        ordered += module
    return ordered
