"""Hosts that are cut off, frozen and woken. See hosts.py."""

from collections.abc import Callable

import pytest

from tests.helpers import object_store
from tests.whole import hosts, hosts_network
from tests.whole.hosts import Hosts


@pytest.fixture(autouse=True)
def _possible() -> None:
    if reason := hosts_network.missing() or object_store.missing():
        pytest.skip(reason)


def choose_some(job: Hosts) -> dict[str, Callable[[], str]]:
    """The faults that tell most, in one or two minutes."""
    some = job.cut_shortly, job.cut_first_off_the_store, job.freeze_host
    return {name: strike for name, strike in job.kinds().items() if strike in some}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("count", "choose"),
    [
        pytest.param(2, choose_some, id="short"),
        pytest.param(3, Hosts.kinds, id="whole", marks=pytest.mark.slow),
    ],
)
def test_the_run_is_the_one_that_was_never_disturbed(
    count: int, choose: Callable[[Hosts], dict[str, Callable[[], str]]]
) -> None:
    print(hosts.run(count, choose))


def test_links_are_cut_lost_and_slow() -> None:
    """What the faults are made of does what it says: seen by a connection of each kind."""
    with hosts_network.network(2) as net:
        first, second = net.hosts
        with hosts_network.listening(first) as port:
            assert hosts_network.reaches(second, first.address, port)
            second.cut()
            assert not hosts_network.reaches(second, first.address, port)
            second.heal()
            assert hosts_network.reaches(second, first.address, port)
            second.lose(first.address)
            assert not hosts_network.reaches(second, first.address, port)
            second.find(first.address)
            second.slow()
            assert hosts_network.reaches(second, first.address, port)
            assert second.hurry() >= 0
    assert hosts_network.missing() is None
