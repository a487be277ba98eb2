"""A clock that stands still."""

from datetime import datetime, tzinfo
from types import ModuleType

import pytest


def stop_clock(monkeypatch: pytest.MonkeyPatch, module: ModuleType, moment: datetime) -> None:
    """Let `datetime.now` of a module return `moment`, which has a time zone."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return moment.astimezone(tz)

    monkeypatch.setattr(module, "datetime", Stopped)
