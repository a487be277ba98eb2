"""Which module of the house imports which: the arrows that test_architecture.py guards.

python -m tests.helpers.imports      draws them, by room, as engine/README.md has them
"""

import ast
import textwrap
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.places import ROOT

PACKAGES = ("shards", "engine", "recipes", "launch")

# From the bottom to the top. A module may import what is on lower floors, and what is in its own
# room; rooms on one floor know nothing of each other.
LAYERS: list[tuple[str, ...]] = [
    ("shards.errors",),
    ("shards.fields", "shards.philox"),
    ("shards.storage",),
    ("shards",),
    ("shards.making",),
    ("engine.method",),
    ("engine.log", "engine.processes"),
    ("engine.state",),
    ("engine.encoder",),
    ("engine.evaluation",),
    ("engine.recipe",),
    ("engine.run", "engine.data"),
    ("engine.trainer",),
    ("engine.fit", "engine.debug"),
    ("recipes",),
    ("launch",),
]
ENTRANCES = ("recipes", "launch")  # that nobody else imports


def modules() -> dict[str, Path]:
    """Every module of the house, by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in PACKAGES
        for path in sorted((ROOT / package).glob("**/*.py"))
        if path.name != "__init__.py"
    }


def room(module: str) -> str:
    """The room that a module is in: the longest name in LAYERS that leads to it."""
    rooms = [name for floor in LAYERS for name in floor]
    return max((name for name in rooms if f"{module}.".startswith(f"{name}.")), key=len)


def floor(module: str) -> int:
    """The number of a module's floor, from the bottom."""
    return next(number for number, names in enumerate(LAYERS) if room(module) in names)


def allowed(module: str, below: str) -> bool:
    """Whether `module` may import `below`."""
    if room(module) == room(below):
        return True
    return floor(below) < floor(module) and room(below) not in ENTRANCES


def arrows(source: str, known: Mapping[str, Path]) -> set[str]:
    """The modules of the house that a module's source imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, empty when there are none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        done.add(name)
        return next((c for below in sorted(graph[name]) if (c := walk(below, [*path, name]))), [])

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def drawn() -> str:
    """The rooms from the top to the bottom, each with the rooms that it imports from."""
    known = modules()
    below: dict[str, set[str]] = {}
    for name, path in known.items():
        found = {room(other) for other in arrows(path.read_text(), known)}
        below.setdefault(room(name), set()).update(found - {room(name)})
    lines = []
    for names in reversed(LAYERS):
        for name in names:
            ordered = sorted(below.get(name, ()), key=lambda other: (-floor(other), other))
            line = f"{name:<18} -> {', '.join(ordered) or '(nothing)'}"
            lines.append(textwrap.fill(line, 100, subsequent_indent=" " * 22))
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawn())
