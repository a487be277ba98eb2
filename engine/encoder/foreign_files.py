"""Read tensors from files of torch.save and safetensors without running code in them."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import safetensors.torch
from torch import Tensor

from engine.state.pickles import Object, Pairs
from engine.state.torch_files import NoPlainTensor, NotAdmitted, TorchFile
from shards.documents import shown
from shards.errors import InputError
from shards.storage import files

MOST_SHARED = 16  # times the file's size; networks that share tensors claim more than it has
LONGEST_NAME = 4000  # characters of a tensor's name; a million names may begin with one key
LONGEST_REASON = 200  # characters of a reason in a message

_DICTS = ("collections.OrderedDict", "collections.Counter")

# A checkpoint has no network below these keys.
_NO_NETWORK = re.compile(
    r"optimi[sz]er|^optim$|scheduler|scaler|hyper_?parameters|^(amp|callbacks|loops)$", re.I
)


def read_tensors(url: str, name: str = "") -> dict[str, Tensor]:
    """Read every tensor in a file of safetensors or torch.save.

    The state of optimizers and the like is left out. No code in the file is run.

    Args:
        name: The field or argument that gave the URL, for messages.

    Returns:
        The tensors by dotted name, which is their path in nested dicts and lists. They have the
        file's order. Those of safetensors, which has no order, are sorted by name.

    Raises InputError when the file is missing, damaged or has no tensors, or when it has objects
    that could run code. Raises OSError when storage fails.
    """
    place = f"{name} {files.redact(url)}".lstrip()
    try:
        content = files.read(url)
        found = _tensors(content, place)
        claimed = sum(tensor.nbytes for tensor in found.values())
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{place}: no such file") from None
    except RecursionError:
        raise InputError(f"{place}: is nested too deeply for a checkpoint") from None
    except MemoryError:
        raise InputError(
            f"{place}: takes more memory than there is: use a larger machine"
        ) from None
    if claimed > MOST_SHARED * len(content):
        raise InputError(
            f"{place}: is damaged or malicious: its tensors claim {claimed:,} bytes, and the file "
            f"has {len(content):,}"
        )
    if any(len(name) > LONGEST_NAME for name in found):
        raise InputError(
            f"{place}: is damaged: it has names of more than {LONGEST_NAME} characters"
        )
    if not found:
        raise InputError(f"{place}: holds no tensors of a network: give a state dict")
    return found


def _tensors(content: bytes, place: str) -> dict[str, Tensor]:
    if not content:
        raise InputError(f"{place}: is empty")
    if place.endswith(".safetensors") or content[8:9] == b"{":  # after the header's length
        try:
            return dict(sorted(safetensors.torch.load(content).items()))
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise nearly anything
            reason = " ".join(str(error).split())[:LONGEST_REASON]
            raise InputError(f"{place}: is not a whole safetensors file: {reason}") from None
    try:
        return dict(_flatten(_open(content, place), place))
    except NotAdmitted as error:
        raise InputError(
            f"{place}: holds {shown(str(error))[1:-1]}, which is not loaded, because it could run "
            "code: save the state dict alone where the file was made, by "
            "torch.save(model.state_dict(), ...) for a whole model, or by "
            'torch.save(torch.load(...)["state_dict"], ...) for a checkpoint that has one'
        ) from None
    except (InputError, MemoryError, RecursionError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise InputError(
            f"{place}: is not a whole file of torch.save: it is cut off, damaged or of another "
            f"kind ({reason})"
        ) from None


def _open(content: bytes, place: str) -> TorchFile:
    archive = content.startswith(b"PK")
    if not archive and not content.startswith(b"\x80"):  # neither a zip file nor a pickle
        raise InputError(
            f"{place}: was written neither by torch.save nor by safetensors: it begins with "
            f"{content[:24]!r}"
        )
    if archive and b"/constants.pkl" in content:
        raise InputError(
            f"{place}: is a TorchScript archive: save its state dict alone, by "
            "torch.save(torch.jit.load(...).state_dict(), ...)"
        )
    return TorchFile(content)


def _flatten(file: TorchFile, place: str) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()  # a container may hold itself, or be held a million times

    def walk(value: object, path: str) -> Iterator[tuple[str, Tensor]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        items = _items(value)
        if any(key == "param_groups" for key, _ in items):  # an optimizer
            return
        for key, below in items:
            if type(key) not in (str, int):
                continue
            text = str(key) if type(key) is str else shown(key)
            name = f"{path}{text}"
            if len(name) > LONGEST_NAME:
                raise InputError(f"{place}: is damaged: a name of {len(name):,} characters")
            try:
                tensor = file.tensor(below)
            except NoPlainTensor:
                raise InputError(
                    f"{place}: {name} is sparse, nested or without values: save it dense"
                ) from None
            if tensor is not None:
                yield name, tensor
            elif not _NO_NETWORK.search(text):
                yield from walk(below, f"{name}.")

    return walk(file.root, "")


def _items(value: object) -> Iterable[tuple[Any, object]]:
    """Return the items of what is a dict or a list in the file."""
    if type(value) is Object and str(value.kind) in _DICTS:
        return value.pairs or ()
    if type(value) is Pairs:
        return value
    return list(enumerate(value)) if isinstance(value, list | tuple) else ()
