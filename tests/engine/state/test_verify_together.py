"""What one process finds wrong with a checkpoint, all processes raise: nobody waits for another."""

from pathlib import Path
from socket import gethostname

import pytest
import torch

from engine.processes.world import World, enter
from engine.state import checkpoint
from engine.state.dcp_files import Reader
from shards.errors import InputError
from tests.helpers.ranks import Ranks

ALONE = World(0, 1, 1, torch.device("cpu"))


def _verify(url: str, faults: dict[int, str]) -> str:
    """On a rank: verify while the reads of some ranks fail."""

    def refuse(*_: object) -> None:
        kind = faults.get(world.rank)
        if kind is not None:
            raise (InputError if kind == "damaged" else OSError)(f"{kind} at rank {world.rank}")

    with enter(1, True) as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "verify_file", refuse)
        patch.setattr(Reader, "metadata", refuse)
        try:
            checkpoint.verify(url, world)
        except (InputError, OSError) as error:
            return f"{type(error).__name__}: {error}".replace(gethostname(), "HOST")
    return "sound"


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({}, "sound"),
        ({1: "gone"}, "OSError: gone at rank 1 (told by rank 1 on HOST)"),
        ({0: "gone"}, "OSError: gone at rank 0 (told by rank 0 on HOST)"),
        ({0: "gone", 1: "damaged"}, "InputError: damaged at rank 1"),
        ({0: "gone", 1: "gone"}, "OSError: gone at rank 0"),  # no matter of one machine
    ],
)
def test_a_fault_of_one_rank_is_raised_by_all(
    ranks: Ranks, tmp_path: Path, faults: dict[int, str], expected: str
) -> None:
    state = {"a": torch.ones(3)}
    url = checkpoint.save(str(tmp_path), 1, state, {}, "digest", ALONE).url
    assert ranks.run(_verify, url, faults, size=2, seconds=60) == [expected] * 2
