"""The tables of speeds in the cookbook have the figures of the measured files, and no others."""

import json

import pytest

from tests.helpers.bench_table import format_figures
from tests.helpers.places import ROOT


@pytest.mark.parametrize("name", ["figures.json", "figures_h100.json"])
def test_the_table_is_the_files(name: str) -> None:
    document = json.loads((ROOT / "recipes" / name).read_text())
    assert document["rows"]
    assert format_figures(document) in (ROOT / "recipes/README.md").read_text()
