"""kNN evaluation: the vote of the nearest training images, for several k and temperatures."""

from dataclasses import asdict, dataclass
from typing import Any

from engine.evaluation import Evaluation, Result, Row
from engine.features import accuracy
from engine.knn import nearest, vote
from engine.supervised import check_some


@dataclass(frozen=True)
class KNNConfig:
    """All combinations are measured with one extraction and one search."""

    k: tuple[int, ...] = (20, 200)
    """How many neighbours vote."""
    temperature: tuple[float, ...] = (0.07,)
    """Of their weights exp(cosine / temperature)."""

    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        return asdict(self)

    def check(self) -> None:
        """Raises InputError."""
        check_some("k", self.k, 1, 2**31)
        check_some("temperature", self.temperature, 1e-3, 1e3)


def evaluate(evaluation: Evaluation, config: KNNConfig) -> Result:
    """Of data.val, with data.train to look for neighbours in; exact, whatever the processes."""
    queries = evaluation.features(evaluation.val)
    bank = evaluation.features(evaluation.train)
    found = nearest(bank, queries.features, max(config.k), evaluation.world)
    metrics, table = {}, list[Row]()
    for k in config.k:
        for temperature in config.temperature:
            scores = vote(found, k, temperature, evaluation.classes)
            here = accuracy(scores, queries.labels, evaluation.world, "data.val")
            row: Row = {"k": k, "temperature": f"{temperature:g}"}
            table.append(row | {"top-1": here.top1, "top-5": here.top5})
            metrics[evaluation.name(f"k{k}_t{temperature:g}_top1")] = here.top1
    return Result(metrics, table)
