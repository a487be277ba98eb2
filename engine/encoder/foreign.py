"""Match ResNet checkpoints that others made, whatever their keys, to this project's encoder.

A checkpoint has no strides, dilations, paddings or epsilons. They are assumed to be torchvision's.
"""

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Size, Tensor

from engine.method.encoders import BackboneConfig
from engine.method.resnet import ResNet, ResNetConfig
from shards.documents import shown
from shards.errors import InputError

COUNTER = "num_batches_tracked"

# Names that mark the slowly moving network of a pair. MoCo calls it encoder_k.
_TARGET = re.compile(r"target|momentum|teacher|(^|[._])(ema|key)([._]|$)|_k([._]|$)", re.I)
_TRUNK = re.compile(r"(conv|bn|layer)\d+\.")  # torchvision's names of all but the head
# The positions of torchvision's modules in nn.Sequential(*network.children()).
_CHILDREN = {"0": "conv1", "1": "bn1", **{str(3 + i): f"layer{i}" for i in (1, 2, 3, 4)}}
# The names that others give to the tensors of a norm, in torch's order of the tensors.
_NORM = (
    *(("weight", "gamma", "scale"), ("bias", "beta", "offset")),
    *(("running_mean", "moving_mean", "mean"), ("running_var", "moving_variance", "var")),
    (COUNTER,),
)
# What a stranger's file may hold, so that the search for its network ends.
MOST_NETWORKS = 64  # networks that are found by name
MOST_STEMS = 1000  # tensors that may be the first one of a network
MOST_WIDTHS = 8  # numbers of channels of these; each takes a second

_ROLES = {name: role for role, names in enumerate(_NORM) for name in names}


class Foreign(NamedTuple):
    """A checkpoint's encoder under this project's names."""

    config: BackboneConfig
    state: dict[str, Tensor]  # float32, by torchvision's names
    report: str  # one line that says how it was matched and what was left out


class _Candidate(NamedTuple):
    """A network that a checkpoint may hold."""

    config: ResNetConfig
    shapes: dict[str, Size]  # in state-dict order
    orders: tuple[list[str], list[str]]  # without counters; projections last, or first, in a block
    further: Size  # shape of the next tensor if the network had one more block


class _Match(NamedTuple):
    """The names of a network's tensors in a checkpoint."""

    candidate: _Candidate
    names: dict[str, str]  # this project's name: the file's name
    how: str


def match(
    tensors: dict[str, Tensor],
    network: Literal["online", "target"],
    place: str,
    prefix: str | None = None,
    flag: str = "--prefix",
) -> Foreign:
    """Find the encoder among a checkpoint's tensors.

    Tensors are matched by their names, or else by their order and shapes. To match by order, the
    tensors must follow one another as in a state dict. In each block the projection may come before
    or after the convolutions. When the checkpoint has several encoders, their names decide which is
    the online and which the target one.

    Args:
        tensors: The checkpoint's tensors in the order of the file.
        network: Which network to take.
        place: The file, for messages.
        prefix: Take the encoder with this prefix, whatever `network` says. It is all that stands
            before `conv1.weight`, or the name of the first tensor when tensors match by order.
        flag: The option that gives `prefix`, for messages.

    Raises InputError when there is no such encoder, when there are several, and when values are
    damaged.
    """
    by_name = {plain(name): name for name in tensors}
    trunks = _trunks(by_name, place)
    if prefix is None:
        trunks = _distinct(trunks, by_name, tensors)
    if trunks:
        chosen = choose(list(trunks), network, place, prefix, flag)
        names = {ours: by_name[theirs] for ours, theirs in trunks[chosen].items()}
        found = _match_names(tensors, names, chosen, place)
    else:
        matches = _match_order(tensors, place)
        found = matches[choose(list(matches), network, place, prefix, flag, in_order=True)]
    config = found.candidate.config
    state = read_state(tensors, found.candidate.shapes, found.names, place)
    return Foreign(config, state, describe_match(tensors, describe(config), found.how, found.names))


def plain(name: str) -> str:
    """Remove from a name what torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _trunks(names: Collection[str], place: str) -> dict[str, dict[str, str]]:
    """Find the prefixes of all ResNets.

    Returns:
        For each prefix a dict of the names below it: torchvision's name to the file's name.

    Raises InputError when there are more than MOST_NETWORKS.
    """

    def child(name: str) -> str:
        head, dot, rest = name.partition(".")
        return _CHILDREN.get(head, f"children.{head}") + dot + rest

    found: dict[str, dict[str, str]] = {}
    for stem in names:
        prefix = stem.removesuffix("conv1.weight").removesuffix("0.weight")
        if prefix == stem or (prefix and not prefix.endswith(".")):
            continue
        if not any(f"{prefix}{block}.0.conv1.weight" in names for block in ("layer1", "4")):
            continue
        if len(found) == MOST_NETWORKS:
            raise InputError(
                f"{place}: holds more than {MOST_NETWORKS} networks: save the encoder's state dict "
                "alone"
            )
        below = {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
        if "layer1.0.conv1.weight" in below:
            found[prefix] = below
        elif {"1.weight", "4.0.conv1.weight"} <= below.keys():
            found[prefix] = {child(name): theirs for name, theirs in below.items()}
    return found


def _distinct(
    trunks: dict[str, dict[str, str]], by_name: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Remove networks that are the same as another one, because modules share a part.

    An online and a target network both stay, because they may be equal early in training.
    """
    kept: dict[str, dict[str, str]] = {}
    for prefix, names in trunks.items():
        own = {ours: tensors[by_name[theirs]] for ours, theirs in names.items()}
        side = bool(_TARGET.search(prefix))
        if not any(
            side == bool(_TARGET.search(other))
            and names.keys() == others.keys()
            and all(torch.equal(own[ours], tensors[by_name[t]]) for ours, t in others.items())
            for other, others in kept.items()
        ):
            kept[prefix] = names
    return kept


def choose(
    found: Sequence[str],
    network: str,
    place: str,
    prefix: str | None,
    flag: str,
    in_order: bool = False,
) -> str:
    """Choose one of the networks `found`, given by the prefix or first name of each.

    With `in_order` the first network counts as the online one unless its name says otherwise.
    """
    targets = [name for name in found if _TARGET.search(name)]
    others = [name for name in found if name not in targets]
    chosen = targets if network == "target" else others or targets
    if prefix is not None:
        chosen = [name for name in found if name.rstrip(".") == plain(prefix).rstrip(".")]
    elif in_order and network == "online" and others:
        chosen = others[:1]
    if len(chosen) == 1:
        return chosen[0]
    there = _some([shown(name) for name in found], 16)
    if prefix is not None:
        remedy = f"give one of {there}" if len(found) > 1 else "leave it out, there is one only"
        raise InputError(f"{place}: {flag} {prefix} is of no network there: {remedy}")
    if chosen:
        raise InputError(
            f"{place}: several networks may be the {network} one: give {flag} PREFIX, one of "
            f"{there}"
        )
    raise InputError(
        f"{place}: no network is named as a target network is (target, momentum, teacher, ema or "
        f"key): give {flag} PREFIX, one of {there}"
    )


def _match_names(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], prefix: str, place: str
) -> _Match:
    """Match the network below the prefix. `names` maps torchvision's names to the file's."""
    found = {ours: tensors[name].shape for ours, name in names.items()}
    stem = found["conv1.weight"]
    nearest = min(
        _candidates(stem[0] if stem else 0) or _candidates(64),
        key=lambda c: (len(_misfits(c.shapes, found)), c.shapes["conv1.weight"][2:] != stem[2:]),
    )
    misfits = _misfits(nearest.shapes, found)
    if misfits:
        kinds = {kind: [text for which, text in misfits if which == kind] for kind, _ in misfits}
        told = "; ".join(
            f"{len(texts)} tensor{'s' * (len(texts) > 1)} {kind} ({_some(texts)})"
            for kind, texts in kinds.items()
        )
        raise InputError(
            f"{place}: no ResNet of this engine under {prefix!r}: nearest is "
            f"{describe(nearest.config)}: {told}"
        )
    taken = {ours: names[ours] for ours in nearest.shapes if ours in names}
    return _Match(nearest, taken, f"by name{f' under {prefix!r}' if prefix else ''}")


def _misfits(expected: Mapping[str, Size], found: Mapping[str, Size]) -> list[tuple[str, str]]:
    """List the tensors that are not as expected, as pairs: what is wrong, the tensor's name."""
    misfits = [("missing", n) for n in expected if n not in found and COUNTER not in n]
    for name, shape in found.items():
        if name not in expected and _TRUNK.match(name):
            misfits.append(("too many", name))
        elif name in expected and shape != expected[name]:
            text = f"{name}: {list(shape)}, not {list(expected[name])}"
            misfits.append(("of another shape", text))
    return misfits


def _match_order(tensors: Mapping[str, Tensor], place: str) -> dict[str, _Match]:
    """Find all networks whose tensors follow one another. The keys are their first tensors."""
    everything = _ordered(tensors)
    names = [n for n in everything if tensors[n].ndim and tensors[n].is_floating_point()]
    counters = {a: b for a, b in itertools.pairwise(everything) if not tensors[b].ndim}
    shapes = [tensors[name].shape for name in names]
    found: dict[str, _Match] = {}
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
            found[first] = _Match(candidate, taken, how)
        elif fitting > nearest:
            nearest = fitting
            told = (
                f": nearest is {describe(candidate.config)}: {fitting} tensors from {first!r} on "
                f"fit, not {repr(names[end]) if end < len(names) else 'the end of the file'}"
            )
    if not found:
        depths = ", ".join(str(depth) for depth in _options("depth"))
        raise InputError(
            f"{place}: no ResNet found (of depth {depths}), neither by names such as "
            f"layer1.0.conv1.weight nor by the order of shapes{told}"
        )
    return found


def _attempts(shapes: Sequence[Size], place: str) -> Iterator[tuple[int, _Candidate, list[str]]]:
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
        for candidate in _candidates(shapes[start][0]):
            for order in candidate.orders:
                yield start, candidate, order


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
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


@functools.cache
def _candidates(channels: int) -> list[_Candidate]:
    """Build all networks whose stem has `channels`, if a recipe can have that width."""
    if not 1 <= channels <= 64 * 64:
        return []
    found = []
    for depth, stem in itertools.product(_options("depth"), _options("stem")):
        for projection in (False, True) if depth < 50 else (False,):
            config = ResNetConfig(depth, channels / 64, stem, projection)
            with torch.device("meta"):
                net = ResNet(config, views=1)
            shapes = {name: value.shape for name, value in net.state_dict().items()}
            last = [name for name in shapes if COUNTER not in name]
            blocks = itertools.groupby(last, lambda name: name.split(".")[:2])
            first = [n for _, b in blocks for n in sorted(b, key=lambda n: "downsample" not in n)]
            inner = shapes["layer4.0.conv1.weight"]
            further = Size((inner[0], net.feature_dim, *inner[2:]))
            found.append(_Candidate(config, shapes, (last, first), further))
    return found


def _options(field: str) -> tuple[Any, ...]:
    """Return the values that a field of ResNetConfig can have."""
    return get_args(get_type_hints(ResNetConfig)[field])


def read_state(
    tensors: Mapping[str, Tensor], wanted: Iterable[str], names: Mapping[str, str], place: str
) -> dict[str, Tensor]:
    """Return the tensors that are wanted, in float32. `names` has the file's name of each.

    Raises InputError when values are damaged.
    """
    state: dict[str, Tensor] = {}
    for ours in wanted:
        if COUNTER in ours:  # old checkpoints have none; it has no effect with a fixed momentum
            count = tensors.get(names.get(ours, ""), torch.tensor(0))
            state[ours] = count.to(torch.int64).reshape(())
            continue
        name = names[ours]
        value = tensors[name]
        if not value.is_floating_point():
            raise InputError(f"{place}: {name} is {value.dtype}: only floating point can be read")
        state[ours] = value.to(torch.float32)
        if not state[ours].isfinite().all():
            raise InputError(f"{place}: {name} has values that are not finite in float32")
        if ours.endswith("running_var") and (value < 0).any():
            raise InputError(
                f"{place}: {name}, in the place of {ours}, has negative values: it is no variance, "
                "so the tensors of norms are in another order than weight, bias, mean, variance"
            )
    return state


def describe_match(
    tensors: Mapping[str, Tensor], network: str, how: str, names: Mapping[str, str]
) -> str:
    """Say how a network was matched, and what of the file is left out."""
    taken = set(names.values())
    left = [name for name in tensors if name not in taken]
    text = f"{network}, matched {how}: {len(taken)} tensors"
    return f"{text}; left out {len(left)} ({_some(left)})" if left else text


def describe(config: ResNetConfig) -> str:
    """Return the name of a network."""
    width = f" x{config.width:g}" if config.width != 1 else ""
    stem = f", {config.stem} stem" if config.stem != ResNetConfig.stem else ""
    shortcut = ", projection shortcut" * config.projection_shortcut
    return f"ResNet-{config.depth}{width}{stem}{shortcut}"


def _some(texts: Sequence[str], count: int = 3) -> str:
    return ", ".join(texts[:count]) + ", ..." * (len(texts) > count)
