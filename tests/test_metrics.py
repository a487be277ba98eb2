"""What is logged: the log file, digests, collapse signals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from engine.metrics import MetricsLog, StepSums, data_digest, effective_rank


def record(step: int) -> dict[str, float]:
    return {"step": step, "loss": 0.1 + 0.2, "images_per_second": 1.0}


def test_reopened_log_drops_what_comes_again(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = MetricsLog(str(tmp_path), start, 4, Console(quiet=True))
        for step in steps:
            log.write(record(step))
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [record(step) for step in (1, 2, 3, 4)]  # floats in full precision


def test_garbage_in_the_log_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\ngarbage\n[]\n{"step": 2}\n{"st')
    MetricsLog(str(tmp_path), 2, 4, Console(quiet=True)).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_digest_is_order_free_and_tells_samples_apart() -> None:
    ids, crcs = np.arange(100) * 7919, np.zeros(100, np.uint32)
    digest = data_digest(ids, crcs)
    assert data_digest(ids[::-1], crcs) == digest
    assert data_digest(ids[:50], crcs[:50]) + data_digest(ids[50:], crcs[50:]) == digest
    swapped = ids.copy()
    swapped[3] = swapped[4]
    assert data_digest(swapped, crcs) != digest
    crcs[5] = 1
    assert data_digest(ids, crcs) != digest


def feature_std(features: Tensor) -> float | None:
    zero = torch.zeros(())
    # As two processes with different numbers of rows add them up.
    parts = [StepSums.of(zero, zero, part).values for part in features.split(3000)]
    return StepSums(torch.stack(parts).sum(0)).feature_std


def test_feature_std_from_collapse_to_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, 64, generator=generator)
    unit = torch.nn.functional.normalize(spread.double(), dim=1)
    exact = (unit.std(dim=0).mean() * 8).item()
    assert feature_std(spread) == pytest.approx(exact, rel=1e-12)
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(spread[:1].expand(4096, -1)) == pytest.approx(0, abs=1e-6)
    assert feature_std(spread * float("nan")) is None


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_effective_rank_counts_directions(directions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(10_000, directions, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    features = inside @ basis[:directions] + 5  # the mean does not count
    assert effective_rank(features).item() == pytest.approx(directions, rel=0.01)
