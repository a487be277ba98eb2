"""Data sets are checked against the recipe before anything expensive begins."""

import dataclasses
from pathlib import Path

import pytest

from shards.errors import InputError
from shards.loader import DataConfig
from shards.order import BatchConfig
from tests.helpers import tiny
from tests.helpers.training import open_trainer


@pytest.mark.parametrize(
    ("micro", "remedy"),
    [(8, "use --data.streams 2"), (3, "use a --batch.micro that divides batch.size 16")],
)
def test_a_remedy_for_micro_batches_that_do_not_fit(
    tiny_data: DataConfig, tmp_path: Path, micro: int, remedy: str
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, batch=BatchConfig(size=16, micro=micro))
    with pytest.raises(InputError, match=f"batch.micro {micro} does not divide .*: {remedy}$"):
        open_trainer(recipe)
    if micro == 8:
        mended = dataclasses.replace(recipe, data=dataclasses.replace(tiny_data, streams=2))
        assert open_trainer(mended).step == 0
