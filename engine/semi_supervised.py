"""Semi-supervised evaluation: fine-tuning with the labels of a few images of each class.

Source: BYOL (arXiv 2006.07733), section 4.2 and appendix C.2.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.evaluation import Evaluation
from engine.finetune import FinetuneConfig, Labels
from engine.supervised import hold_out, nothing
from shards import index as indexes
from shards import storage, subset
from shards.errors import InputError


@dataclass(frozen=True)
class SemiSupervisedConfig:
    """Which training images have labels."""

    fraction: float = 0.01
    """Of each class; at least one image of each."""
    subset_seed: int = 0
    """Which ones: the same for every encoder and run."""
    files: str = ""
    """URL of a list of file names, one a line, in place of fraction: a published subset."""

    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        return asdict(self)

    def check(self) -> None:
        """Raises InputError."""
        if not 0 < self.fraction < 1:
            raise InputError(f"--fraction must be between 0 and 1, not {self.fraction}")
        if not 0 <= self.subset_seed < 2**62:
            raise InputError(f"--subset-seed must be from 0 to 2**62, not {self.subset_seed}")
        storage.check(self.files, "--files")


def take_labels(
    evaluation: Evaluation, config: SemiSupervisedConfig, finetune: FinetuneConfig
) -> Labels:
    """Choose the images that have labels, and copy them to shards beside the results.

    The learning rate is chosen on images that are not among them, as in the paper, where the whole
    training set's held-out part served. All processes call it together. Raises InputError.
    """
    index, world = evaluation.train, evaluation.world
    found = subset.find_places(index, (world.rank, world.size), evaluation.report)
    places = subset.Places.join(world.collect(found))
    some = places.take(world.tell(_choice(places, config)))
    url = storage.join(evaluation.url, "data")
    evaluation.console.print(f"{len(some.ids):,} of {index.samples:,} images have labels: {url}")
    world.tell(lambda: subset.write(index, some, url, evaluation.threads))
    held = hold_out(index.samples, finetune.holdout, finetune.seed)
    ids = np.setdiff1d(places.ids, some.ids)
    return Labels(indexes.load(url, "the subset"), nothing, index, ids[held(ids)])


def _choice(places: subset.Places, config: SemiSupervisedConfig) -> Callable[[], Any]:
    def choose() -> Any:
        if not config.files:
            return subset.choose(places.labels, config.fraction, config.subset_seed)
        place = f"--files {storage.redact(config.files)}"
        try:
            wanted = storage.read(config.files).decode().splitlines()
        except FileNotFoundError:
            raise InputError(f"{place}: no such file") from None
        except UnicodeDecodeError:
            raise InputError(f"{place}: no list of names") from None
        return subset.listed(places.names, wanted, place)

    return choose
