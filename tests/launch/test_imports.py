"""While a command imports, Ctrl-C ends it plainly and no garbage is collected."""

import gc
import signal
from collections.abc import Iterator

import pytest

from launch import imports
from tests.helpers.places import ROOT


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    gc.unfreeze()
    gc.enable()


def test_what_begins_also_ends() -> None:
    imports.begin()
    assert not gc.isenabled()
    assert signal.getsignal(signal.SIGINT) is imports._end
    imports.end()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000  # torch alone has as many
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_user_who_ignores_interrupts_still_does() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    imports.begin()
    imports.end()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("name", ["train", "pack", "evaluate", "export", "bench"])
def test_every_command_begins_and_ends(name: str) -> None:
    """A command that never ends it would keep all garbage of its life."""
    text = (ROOT / "launch" / f"{name}.py").read_text()
    begin, main, end = (
        text.index(f"\n{what}")
        for what in ("    imports.begin()", "def main(", "    imports.end()")
    )
    assert begin < main < end
