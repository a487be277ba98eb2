"""Everything at once: jobs on S3 that are killed, stopped, lost and lied to. See chaos.py."""

import pytest

from tests.helpers.object_store import ObjectStore
from tests.whole import chaos
from tests.whole.chaos_outcomes import Fault, count_lost, table

pytestmark = pytest.mark.versions


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("machines", "faults", "seed", "apart"),
    [
        pytest.param(1, 3, 3, False, id="one machine"),
        pytest.param(1, 3, 1, True, id="loaders apart", marks=pytest.mark.slow),
        pytest.param(2, 1, 2, False, id="two machines", marks=pytest.mark.slow),
    ],
)
def test_the_run_is_the_one_that_was_never_disturbed(
    object_store: ObjectStore, machines: int, faults: int, seed: int, apart: bool
) -> None:
    print(chaos.run(object_store, faults, machines, seed, apart))


def test_what_is_lost_is_laid_to_the_fault_before_it() -> None:
    faults = [Fault("kill", 3), Fault("stop", 8), Fault("kill", 6, "restarted", repeated=2)]
    expected = [{"step": step, "data_digest": f"{step:x}"} for step in range(1, 13)]
    found = [dict(record) for record in expected if record["step"] != 5]  # one is missing
    found[8]["data_digest"] = "other"  # that of step 10
    count_lost(faults, found, expected)
    assert [fault.lost for fault in faults] == [16, 0, 16]
    rows = table(["kill", "stop", "none"], faults, {"drop": 4}).splitlines()[2:]
    assert rows == [
        "| kill | 2 | unknown (1); restarted (1) | 32 | 2 |",
        "| stop | 1 | unknown | 0 | 0 |",
        "| none | 0 |  | 0 | 0 |",
        "| request: drop | 4 | | | |",
    ]
    count_lost(faults, expected, expected)
    assert not any(fault.lost for fault in faults)
