"""Find an optimizer of torch.optim by its name, and read the options that a user gives it."""

import ast
import difflib
import inspect
from typing import Any

import torch

from shards.documents import shown
from shards.errors import InputError

# An element of these moves by its own gradient and state alone, so shards of a tensor can move
# apart. An optimizer that is not here is taken to look at whole tensors.
ELEMENTWISE = {
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
}

_REFUSED = {
    "LBFGS": "it evaluates the loss several times a step, by a closure, and a step has one batch",
    "Muon": "it moves matrices only, and the networks have convolutions, biases and norms",
    "SparseAdam": "it takes sparse gradients only, and those of the networks are dense",
}
_ELSEWHERE = {
    "lars": "a recipe has it by optimizer=LARSConfig(...)",
    "lamb": "torch has none, and the nearest is Adam with --optimizer.adapt (recipes/README.md)",
    "momentum": "write SGD and --optimizer.options momentum=0.9",
}
_OWN = {
    "lr": "the schedule sets it: give --schedule.base-lr",
    "weight_decay": "give --optimizer.weight-decay, which leaves out biases and norms",
    "maximize": "a loss is minimized",
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), "the engine sets it"),
}
_DAMPENING = "torch leaves it out in the first step, whose state a checkpoint cannot tell"


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of torch.optim with this name.

    Raises InputError, naming the field, when there is none or when it cannot train the networks.
    """
    known = {
        one: kind
        for one, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and one == kind.__name__
    }
    del known["Optimizer"]
    place = f"optimizer.name {shown(name)}"
    if name in _REFUSED and name in known:
        raise InputError(f"{place}: cannot be used here, because {_REFUSED[name]}")
    if name in known:
        return known[name]
    usable = sorted(set(known) - set(_REFUSED))
    word = name.lower().removeprefix("lars_")
    adapt = " with --optimizer.adapt" * name.lower().startswith("lars_")
    if word in _ELSEWHERE:
        raise InputError(f"{place}: {_ELSEWHERE[word]}{adapt}")
    near = _nearest(word, sorted(known))
    meant = f"did you mean {near}{adapt}? " if near else ""
    raise InputError(
        f"{place}: torch.optim has no such optimizer: {meant}it has {', '.join(usable)}"
    )


def list_options(name: str) -> dict[str, Any]:
    """Return the options that the optimizer with this name takes, and their defaults."""
    return {
        key: parameter.default
        for key, parameter in inspect.signature(find_optimizer(name)).parameters.items()
        if key not in ("params", *_OWN)
    }


def read_options(name: str, texts: tuple[str, ...]) -> dict[str, Any]:
    """Return the options KEY=VALUE as arguments of the optimizer with this name.

    Raises InputError, naming the field, for one that the optimizer does not take, and for a value
    of another type.
    """
    arguments = list_options(name)
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        place = f"optimizer.options {shown(text)}"
        if not equals or not key:
            raise InputError(f"{place}: write KEY=VALUE, such as {_example(arguments)}")
        if key in _OWN:
            raise InputError(f"{place}: {_OWN[key]}")
        if key == "dampening":
            raise InputError(f"{place}: cannot be used here, because {_DAMPENING}")
        if key in options:
            raise InputError(f"{place}: {key} is given twice")
        if key not in arguments:
            near = _nearest(key, list(arguments))
            meant = f"did you mean {near}? " if near else ""
            what = f"{name} has no such option: {meant}it has {', '.join(arguments)}"
            raise InputError(f"{place}: {what} (--optimizer.options replaces all of them)")
        options[key] = _value(place, value, arguments[key])
    return options


def _value(place: str, text: str, default: Any) -> Any:
    """Return the value that a text stands for; the default tells its type."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(default, tuple):
        wanted = f"{len(default)} numbers, such as {default}"
        fits = (
            isinstance(value, tuple)
            and len(value) == len(default)
            and all(
                _is_number(one) or one is None is was
                for one, was in zip(value, default, strict=True)
            )
        )
    elif isinstance(default, bool):
        wanted, fits = "True or False", isinstance(value, bool)
    else:
        wanted, fits = "a number", _is_number(value)
    if not fits:
        raise InputError(f"{place}: takes {wanted}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9


def try_options(name: str, options: dict[str, Any]) -> None:
    """Raise InputError when the optimizer refuses the values, also of options that conflict."""
    kind = find_optimizer(name)
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.grad = torch.ones(2, 2)
    try:
        kind([weight], lr=0.1, **options).step()  # type: ignore[call-arg]
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        given = " ".join(f"{key}={value}" for key, value in options.items())
        raise InputError(f"optimizer.options {given}: {name} says: {error}") from None


def _nearest(name: str, known: list[str]) -> str:
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[near[0]] if near else ""


def _example(arguments: dict[str, Any]) -> str:
    key, value = next(((k, v) for k, v in arguments.items() if isinstance(v, float)), ("eps", 1e-8))
    return f"{key}={value}"
