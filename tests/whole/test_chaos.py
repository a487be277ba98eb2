"""Everything at once: jobs on S3 that are killed, stopped, lost and lied to. See chaos.py."""

import pytest

from tests.helpers.object_store import ObjectStore
from tests.whole import chaos

pytestmark = pytest.mark.versions


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("machines", "faults", "seed"),
    [
        pytest.param(1, 4, 3, id="one machine"),
        pytest.param(2, 1, 2, id="two machines", marks=pytest.mark.slow),
    ],
)
def test_the_run_is_the_one_that_was_never_disturbed(
    object_store: ObjectStore, machines: int, faults: int, seed: int
) -> None:
    print(chaos.run(object_store, faults, machines, seed))
