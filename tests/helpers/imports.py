"""Find which module of the project imports which. test_architecture.py checks these arrows.

`python -m tests.helpers.imports` prints them by room, as engine/README.md shows them. A room is a
package, or a module with a layer of its own.
"""

import ast
import textwrap
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.places import ROOT

PACKAGES = ("shards", "engine", "recipes", "launch")

# The floors, from the bottom to the top. A module may import from lower floors and from its own
# room. Rooms on the same floor may not import each other.
LAYERS: list[tuple[str, ...]] = [
    ("shards.errors", "shards.threads"),
    ("shards.fields", "shards.philox"),
    ("shards.documents",),
    ("shards.storage",),
    ("shards",),
    ("shards.making",),
    ("engine.method",),
    ("engine.log", "engine.processes"),
    ("engine.state",),
    ("engine.encoder",),
    ("engine.evaluation",),
    ("engine.recipe_files",),
    ("engine.recipe",),
    ("engine.continuation", "engine.recorded"),
    ("engine.run", "engine.data", "engine.report"),
    ("engine.beginning",),
    ("engine.trainer",),
    ("engine.measuring", "engine.divergence", "engine.greeting", "engine.farewell"),
    ("engine.waiting",),
    ("engine.fit", "engine.debug", "engine.notebook", "engine.explain", "engine.replay"),
    ("recipes",),
    ("launch",),
]
ENTRANCES = ("recipes", "launch")  # No other room imports these.


def modules() -> dict[str, Path]:
    """Return the path of every module of the project, by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in PACKAGES
        for path in sorted((ROOT / package).glob("**/*.py"))
        if path.name != "__init__.py"
    }


def room(module: str) -> str:
    """Return the room of a module, which is the longest name in LAYERS that is its prefix."""
    rooms = [name for floor in LAYERS for name in floor]
    return max((name for name in rooms if f"{module}.".startswith(f"{name}.")), key=len)


def floor(module: str) -> int:
    """Return the number of a module's floor, counted from 0 at the bottom."""
    return next(number for number, names in enumerate(LAYERS) if room(module) in names)


def allowed(module: str, below: str) -> bool:
    """Return whether `module` may import `below`."""
    if room(module) == room(below):
        return True
    return floor(below) < floor(module) and room(below) not in ENTRANCES


def arrows(source: str, known: Mapping[str, Path]) -> set[str]:
    """Return the modules of the project that a module's source imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Find modules that import each other in a circle. The list is empty if there are none."""
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
    """List the rooms from the top to the bottom, each with the rooms that it imports from."""
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
