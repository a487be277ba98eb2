"""Print what launch/train.py is, for --help without a recipe.

It imports neither torch nor the engine's own parts, so the page comes at once.
"""

import ast
import sys
from contextlib import suppress

from engine import recipe_files
from shards.errors import printable

_HELP = {"-h", "--help"}

_PROGRAM = """\
Train an encoder by BYOL, or continue a run that was stopped:

  torchrun launch/train.py RECIPE [--field.name value ...]
  torchrun --nproc-per-node=8 launch/train.py RECIPE ...      one process for each of 8 GPUs
  python launch/train.py RECIPE ...                           one process
  byol-train RECIPE ...                                       the same after pip install

The same command starts a run and continues it. RECIPE is a Python file that defines `recipe`, or
the bare name of one that comes along:
"""
_AFTER = """\
A field on the command line overrides the recipe's. For instance:

  torchrun launch/train.py imagenette --data.train s3://bucket/mine/train \\
      --data.val s3://bucket/mine/val --run-url s3://bucket/runs/mine \\
      --batch.size 512 --schedule.epochs 300 --probe.every "5 epochs"

RECIPE --help lists all fields with the values that the recipe gives them. recipes/README.md tells
how to write a recipe, and which field answers which question.
"""


def print_when_asked(arguments: list[str]) -> None:
    """Print the page and exit, when --help is the first argument."""
    if _HELP & set(arguments[:1]):
        _print()
        sys.exit(0)


def _print() -> None:
    """Print what the program is, and the recipes that come along, each with its first line."""
    lines = [_PROGRAM]
    for name, path in recipe_files.shipped().items():
        first = ""
        with suppress(OSError, ValueError, SyntaxError):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            first = text.partition("\n")[0]
        lines.append(f"  {name:<16} {printable(first)}")
    print("\n".join(lines), f"\n\n{_AFTER}", sep="", end="")
