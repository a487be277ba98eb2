"""Define the paths of folders in the clone."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
GOLDEN = ROOT / "tests" / "golden"
