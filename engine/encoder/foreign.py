"""Match ResNet checkpoints that others made, whatever their keys, to this project's encoder.

A checkpoint has no strides, dilations, paddings or epsilons. They are assumed to be torchvision's.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Size, Tensor

from engine.encoder.foreign_order import Match, match_order
from engine.encoder.foreign_shapes import COUNTER, candidates, describe
from engine.method.encoders import BackboneConfig
from shards.documents import shown
from shards.errors import InputError

# Names that mark the slowly moving network of a pair. MoCo calls it encoder_k.
_TARGET = re.compile(r"target|momentum|teacher|(^|[._])(ema|key)([._]|$)|_k([._]|$)", re.I)
_TRUNK = re.compile(r"(conv|bn|layer)\d+\.")  # torchvision's names of all but the head
# The positions of torchvision's modules in nn.Sequential(*network.children()).
_CHILDREN = {"0": "conv1", "1": "bn1", **{str(3 + i): f"layer{i}" for i in (1, 2, 3, 4)}}
MOST_NETWORKS = 64  # that are found by name, so that the search in a stranger's file ends


Side = Literal["online", "target"]


class Foreign(NamedTuple):
    """A checkpoint's encoder under this project's names."""

    config: BackboneConfig
    state: dict[str, Tensor]  # float32, by torchvision's names
    report: str  # one line that says how it was matched and what was left out


def match(
    tensors: dict[str, Tensor],
    network: Side,
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
        matches = match_order(tensors, place)
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
) -> Match:
    """Match the network below the prefix. `names` maps torchvision's names to the file's."""
    found = {ours: tensors[name].shape for ours, name in names.items()}
    stem = found["conv1.weight"]
    nearest = min(
        candidates(stem[0] if stem else 0) or candidates(64),
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
    return Match(nearest, taken, f"by name{f' under {prefix!r}' if prefix else ''}")


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
            known = count if count.numel() == 1 and not count.is_complex() else torch.tensor(0)
            state[ours] = known.to(torch.int64).reshape(())
            continue
        name = names[ours]
        value = tensors[name]
        if not value.is_floating_point():
            raise InputError(f"{place}: {name} is {value.dtype}: only floating point can be read")
        try:
            state[ours] = value.to(torch.float32)
        except (RuntimeError, NotImplementedError):  # such as two numbers of 4 bits in a byte
            raise InputError(f"{place}: {name} is {value.dtype}: save it in float32") from None
        if not state[ours].isfinite().all():
            raise InputError(f"{place}: {name} has values that are not finite in float32")
        if ours.endswith("running_var") and (state[ours] < 0).any():
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


def _some(texts: Sequence[str], count: int = 3) -> str:
    return ", ".join(texts[:count]) + ", ..." * (len(texts) > count)
