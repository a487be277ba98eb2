"""Train small runs that are healthy and runs that are not, and look what `health` says of them.

    python -m tests.whole.health_runs [NAME ...] [--save]

Each run takes half a minute to five minutes of one core. Without names all of them are made. A
table shows what was wanted of each run, what was found, and after which fraction of the run the
first alarm came. --save keeps the figures of the runs in tests/golden/health.json, on which
tests/engine/log/test_health.py tries the rules again in no time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.evaluation.during_training import ProbeConfig
from engine.log import journal
from engine.log.health import ADVICE, HEALTHY, Health, History, judge
from engine.log.journal import Record
from engine.log.metrics import LogConfig
from engine.method import augment, byol
from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig
from engine.method.lars import LARSConfig
from engine.method.precision import Precision
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from shards.errors import InputError
from shards.loader import DataConfig, TrainLoader
from shards.making import synthetic
from shards.order import BatchConfig
from shards.views import ViewsConfig
from tests.helpers.places import GOLDEN
from tests.helpers.training import finish, training

SAVED = GOLDEN / "health.json"
SAMPLES, SIDE = 3000, 32  # of the drawn images
SMALL = ResNetConfig(depth=10, width=0.125, stem="cifar")
KEYS = (
    *("step", "loss", "feature_std", "projection_std", "view_correlation", "view_std"),
    *("grad_norm", "skipped", "data_wait", "knn_top1", "knn_untrained", "knn_chance"),
)

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Change = Callable[[Images, Labels], tuple[Images, Labels]]
Patch = Callable[[], AbstractContextManager[Any]]


def plain(images: Images, labels: Labels) -> tuple[Images, Labels]:
    return images, labels


def shuffled(images: Images, labels: Labels) -> tuple[Images, Labels]:
    return images, np.random.default_rng(0).permutation(labels)


def unlabeled(images: Images, labels: Labels) -> tuple[Images, Labels]:
    return images, np.full_like(labels, -1)


def constant(images: Images, labels: Labels) -> tuple[Images, Labels]:
    """Give every image a gray of its own, and nothing else."""
    gray = (np.arange(len(images)) * 37 % 256).astype(np.uint8)
    return np.broadcast_to(gray[:, None, None, None], images.shape).copy(), labels


def repeated(images: Images, labels: Labels) -> tuple[Images, Labels]:
    return np.broadcast_to(images[:1], images.shape).copy(), labels


def without_predictor() -> AbstractContextManager[Any]:
    built = byol.Online.__init__

    def build(self: byol.Online, *arguments: Any) -> None:
        built(self, *arguments)
        self.predictor = torch.nn.Sequential()

    return patch.object(byol.Online, "__init__", build)


def without_division() -> AbstractContextManager[Any]:
    """Take values of 0 to 255 for values of 0 to 1, so that the views are white."""
    distort = augment.distort

    def wrong(images: Tensor, params: Tensor, *, blur: bool = True) -> Tensor:
        return distort(images.float(), params, blur=blur)

    return patch.object(augment, "distort", wrong)


def divided_by_zero() -> AbstractContextManager[Any]:
    return patch.object(augment, "STD", (0.0, 0.0, 0.0))


def in_bytes() -> AbstractContextManager[Any]:
    """Normalize values of 0 to 255 as if they were values of 0 to 1."""
    normalize = augment.normalize
    return patch.object(augment, "normalize", lambda x: normalize(255 * x))


def slow_data() -> AbstractContextManager[Any]:
    following = TrainLoader.__next__

    def wait(self: TrainLoader) -> Any:
        time.sleep(2)
        return following(self)

    return patch.object(TrainLoader, "__next__", wait)


@dataclass(frozen=True)
class Case:
    """One run, and what its health should become; any of the names in `wanted` is right."""

    wanted: str
    steps: int = 200
    batch: int = 64
    lr: float = 5.0  # the peak, whatever the batch
    warmup: float = 0.08  # fraction of the run
    tau: float = 0.9
    decay: float = 1e-6
    optimizer: type[AdamWConfig | LARSConfig] = LARSConfig
    encoder: ResNetConfig = SMALL
    size: int = 20
    samples: int = SAMPLES
    seed: int = 0
    precision: Precision = "fp32"
    baseline: bool = True
    data: Change = plain
    harm: Patch = nullcontext

    def recipe(self, folder: str, run: str) -> Recipe:
        """Return the recipe of the run, whose data sets are drawn in `folder`."""
        epochs = self.steps * self.batch / self.samples
        labeled = self.data is not unlabeled
        val = draw(folder, 480, 1, plain if self.data in (unlabeled, repeated) else self.data)
        return Recipe(
            run=run,
            seed=self.seed,
            threads=1,
            compile=False,
            precision=self.precision,
            batch=BatchConfig(size=self.batch),
            model=BYOLConfig(encoder=self.encoder, hidden=256, projection=64),
            views=ViewsConfig(size=self.size),
            schedule=ScheduleConfig(
                epochs=epochs,
                warmup=round(self.warmup * self.steps),
                base_lr=self.lr,
                lr_rule="fixed",
                paper_batch=256,
                base_tau=self.tau,
            ),
            optimizer=self.optimizer(weight_decay=self.decay),
            data=DataConfig(train=draw(folder, self.samples, 0, self.data), val=val, streams=8),
            probe=ProbeConfig(
                every=self.steps // 10 * labeled,
                neighbours=20,
                crop=1.0,
                bank=1000,
                baseline=labeled and self.baseline,
            ),
            checkpoint=CheckpointConfig(every=10**6),
            log=LogConfig(every=max(1, self.steps // 50)),
        )


CASES = {
    "LARS": Case("healthy"),
    "another seed": Case("healthy", seed=1),
    "tau 0.97": Case("healthy", tau=0.97, lr=10.0),
    "labels shuffled": Case("healthy", data=shuffled),
    "long warm-up": Case("healthy", warmup=0.3, steps=150),
    "AdamW, no labels": Case(
        "healthy", optimizer=AdamWConfig, lr=1e-3, tau=0.97, decay=1e-4, data=unlabeled, steps=100
    ),
    "tau 0, high rate": Case(
        "collapsed", optimizer=AdamWConfig, lr=1.25e-2, tau=0.0, warmup=0.0, decay=1e-4
    ),
    "no predictor, AdamW": Case(
        "collapsed",
        optimizer=AdamWConfig,
        lr=1e-3,
        tau=0.97,
        decay=1e-4,
        harm=without_predictor,
    ),
    "no predictor, LARS": Case("collapsed", harm=without_predictor, steps=100),
    "rate 5": Case(
        "diverging or collapsed", optimizer=AdamWConfig, lr=5.0, tau=0.97, decay=1e-4, steps=100
    ),
    "LARS, rate 1000": Case("diverging or collapsed", lr=1000.0, warmup=0.0, steps=100),
    "weight decay 1": Case("diverging", decay=1.0),
    "division by zero": Case("diverging", harm=divided_by_zero, baseline=False),
    "images of one color": Case("not learning", data=constant, steps=100),
    "one image repeated": Case("not learning or collapsing or collapsed", data=repeated, steps=100),
    "white views": Case("not learning", harm=without_division, steps=100),
    "pixels not divided": Case("not learning", harm=in_bytes, steps=100),
    "rate 0": Case("not learning", lr=0.0, steps=100),
    "slow data": Case("starved", harm=slow_data, baseline=False, steps=20, batch=16),
    "batch 256": Case("healthy", batch=256, steps=150, tau=0.97),
    "batch 16": Case("healthy", batch=16, steps=800, lr=2.5),
    "few images": Case("healthy", warmup=0.0, samples=256, steps=300),
    "64 pixels": Case(
        "healthy", size=64, encoder=ResNetConfig(depth=10, width=0.25, stem="imagenet"), steps=300
    ),
    "bf16": Case("healthy", precision="bf16", size=12),
    # This recipe is sound, but too short: kNN ends below that of the untrained encoder.
    "too short": Case("not learning", batch=256, steps=50),
}


def draw(folder: str, samples: int, seed: int, change: Change) -> str:
    """Draw a data set, unless the folder has it, and return its URL."""
    url = f"{folder}/{change.__name__}-{samples}-{seed}"
    if not Path(url, "index.json").exists():
        images = synthetic.draw
        with patch.object(synthetic, "draw", lambda *arguments: change(*images(*arguments))):
            synthetic.write(url, samples, SIDE, seed)
    return url


def train(case: Case, folder: str, run: str) -> tuple[int, list[Record]]:
    """Train a run to its end or to its fault. Return its number of steps and its log."""
    with case.harm(), training(case.recipe(folder, run)) as trainer:
        try:
            finish(trainer)
        except InputError as error:
            print(error)
        # Without the number of measured images kNN has no margin, which would be wide of so few.
        return trainer.total_steps, [
            {key: record[key] for key in KEYS if key in record} for record in journal.read(run)
        ]


def judge_all(total_steps: int, records: list[Record]) -> list[tuple[float, Health]]:
    """Return the progress and the health after each logged step."""
    history, found = History(total_steps), []
    for record in records:
        history.add(record)
        if history.recent:
            found.append((record["step"] / total_steps, judge(history)))
    return found


def find_alarm(judged: list[tuple[float, Health]]) -> tuple[str, float, str]:
    """Return the worst status of a run, when the first alarm came, and why."""
    alarms = [(progress, health) for progress, health in judged if health.status != HEALTHY]
    if not alarms:
        return HEALTHY, 1.0, ""
    statuses = [health.status for _, health in alarms]
    worst = min(statuses, key=list(ADVICE).index)
    return worst, alarms[0][0], alarms[0][1].reason


def keep(name: str, total_steps: int, records: list[Record]) -> None:
    """Save the figures of a run as columns of numbers of four digits."""
    saved = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    columns = {
        key: [_round(record.get(key)) for record in records]
        for key in KEYS
        if any(key in record for record in records)
    }
    saved[name] = {"total_steps": total_steps, "records": columns}
    lines = [f"{json.dumps(name)}: {json.dumps(saved[name])}" for name in CASES if name in saved]
    SAVED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _round(value: float | None) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def load() -> dict[str, tuple[int, list[Record]]]:
    """Return what was saved: the number of steps and the records of each run."""
    found = {}
    for name, saved in json.loads(SAVED.read_text()).items():
        rows = zip(*saved["records"].values(), strict=True)
        records = [dict(zip(saved["records"], row, strict=True)) for row in rows]
        for record in records:  # null stands for a missing key, or for a figure that is not finite
            for key in [key for key, value in record.items() if value is None]:
                if record["step"] == 0 or key.startswith("knn"):
                    del record[key]
        found[name] = saved["total_steps"], records
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="the runs to make; all by default")
    parser.add_argument("--save", action="store_true", help="keep the figures for the tests")
    options = parser.parse_args()
    for name in options.names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            total_steps, records = train(CASES[name], folder, f"{folder}/run")
        if options.save:
            keep(name, total_steps, records)
        status, progress, reason = find_alarm(judge_all(total_steps, records))
        print(f"{name:<24} wanted {CASES[name].wanted:<22} found {status:<14}", end=" ")
        print(f"at {progress:4.0%} of the run, {time.monotonic() - start:.0f} s; {reason}")


if __name__ == "__main__":
    main()
