"""Show the logged steps on the terminal: a bar that moves, or a line for each."""

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.log.journal import Record
from engine.log.remaining import Remaining, TimeLeftColumn
from engine.log.terminal import Terminal


class StepLines:
    """Show the steps of a process up to step `stop`. On a terminal there is a bar below."""

    def __init__(self, terminal: Terminal, start: int, stop: int) -> None:
        """Start the bar, at step `start`."""
        self._console = terminal.console
        self._remaining = Remaining(stop)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TimeLeftColumn(self._remaining),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("train", total=stop, completed=start, status="")
        if self._console.is_terminal:
            self._bar.start()

    def advance(self) -> None:
        """Move the bar by a step."""
        self._bar.advance(self._task)

    def show(self, record: Record) -> None:
        """Show a logged step, except what is told elsewhere: baselines, and how a branch began."""
        if not record["step"]:
            return
        if "branched_from" in record and not record.keys() & {"loss", "feature_rank"}:
            return
        status = describe(record)
        self._bar.update(self._task, status=status)
        self._remaining.note(record["step"], evaluated="feature_rank" in record)
        left = self._remaining.text(record["step"])
        left = f"  {left} left" if left else ""
        if not self._console.is_terminal or "knn_top1" in record:
            self._console.print(f"step {record['step']}  {status}{left}")

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar.live.is_started:
            self._bar.stop()


def describe(record: Record) -> str:
    """Return the figures of a record that are worth a look at every logged step."""
    parts = []
    if "loss" in record:  # a step that is only evaluated has none
        loss = record["loss"]
        parts.append("loss " + ("not finite" if loss is None else f"{loss:.4f}"))
        for key, name in (("feature_std", "std"), ("grad_norm", "grad")):
            if key in record:
                parts.append(f"{name} {_short(record[key])}")
        parts.append(f"{record.get('images_per_second') or 0:,.0f} images/s")
    if "knn_top1" in record:
        parts.append(f"kNN {record['knn_top1']:.1%}")
    if "online_top1" in record:
        parts.append(f"online head {record['online_top1']:.1%}")
    if "feature_rank" in record:
        parts.append(f"rank {_short(record['feature_rank'])}")
    return "  ".join(parts)


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
