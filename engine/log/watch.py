"""Judge a run while it is logged, and tell its user when its health turns."""

from collections import Counter
from collections.abc import Callable

from engine.log.health import ADVICE, HEALTHY, LASTED, History, is_step, judge
from engine.log.journal import Record


class Watch:
    """Judge a run while it is logged, and tell when its health turns.

    Each status is explained in full when this process tells it first, and shortly later.
    """

    def __init__(
        self,
        total_steps: int,
        records: list[Record],
        say: Callable[[str], None],
        momentum: float = 1.0,
    ) -> None:
        """Take the records that earlier processes logged. `say` is called with a line.

        A run that was not healthy when it ended is told to be so at once. `momentum` is the
        smallest one of the encoder's norms.
        """
        self._history, self._say = History(total_steps, records, momentum), say
        self._known: set[str] = set()
        self._statuses = {one["step"]: str(one.get("health")) for one in records if is_step(one)}
        self.health = judge(self._history)  # of the newest record
        if self.health.status != HEALTHY:
            self._tell(self._history.recent[-1]["step"])

    def judge(self, record: Record) -> Record:
        """Return the health of the next record as a key to add to it; nothing without a step."""
        self._history.add(record)
        if not is_step(record):
            return {}
        before, self.health = self.health, judge(self._history)
        self._statuses[record["step"]] = self.health.status
        if self.health.status != before.status:
            self._tell(record["step"])
        return {"health": self.health.status}

    def summarize(self) -> list[str]:
        """Return what the end of a run tells: its trouble, and one that lasted for most of it."""
        counts, judged = Counter(self._statuses.values()), len(self._statuses)
        troubled = sum(counts[status] for status in ADVICE)
        found = [self.health.summary] if self.health.summary else []
        if troubled > LASTED * judged:
            status = max(ADVICE, key=lambda one: counts[one])
            if status != self.health.status:
                now = "; it is healthy now" if self.health.status == HEALTHY else ""
                found.append(
                    f"{status} at {counts[status]:,} of {judged:,} logged steps: "
                    f"{ADVICE[status].meaning}{now}"
                )
        return found

    def _tell(self, step: int) -> None:
        status = self.health.status
        self._say(self.health.describe(step, status in self._known))
        self._known.add(status)
