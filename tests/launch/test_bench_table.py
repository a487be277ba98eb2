"""The table of speeds in the cookbook has the figures of the measured file, and no others."""

import json

from tests.helpers.bench_table import format_figures
from tests.helpers.places import ROOT


def test_the_table_is_the_files() -> None:
    document = json.loads((ROOT / "recipes/figures.json").read_text())
    assert document["rows"]
    assert format_figures(document) in (ROOT / "recipes/README.md").read_text()
