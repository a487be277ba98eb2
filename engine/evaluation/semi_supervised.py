"""Semi-supervised evaluation: fine-tune with the labels of a few images of each class.

Source: BYOL (arXiv 2006.07733), section 4 and appendix C.1.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval

from engine.evaluation.finetune import FinetuneConfig, Split
from engine.evaluation.session import Evaluation
from engine.evaluation.supervised import check_held_out, hold_out, hold_out_nothing
from engine.processes.world import waiting_for_hours
from shards import index as indexes
from shards.digest import digest
from shards.errors import InputError
from shards.index import Index
from shards.making import subset
from shards.storage import files


@dataclass(frozen=True)
class SemiSupervisedConfig:
    """Options that choose which training images have labels."""

    fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.01
    """Fraction of each class's training images that have labels. Every class keeps one at least."""
    subset_seed: Annotated[int, Interval(ge=0, lt=2**62)] = 0
    """Seed of the choice of these images. With the same seed every encoder and run gets the same
    ones."""
    files: str = ""
    """URL of a list of file names, one a line, that replaces fraction, such as a published
    subset."""

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the result.

        Raises InputError when the list of files can't be read.
        """
        if not self.files:
            return asdict(self)
        names = digest("\n".join(self.names()))
        return asdict(self) | {"files": names}  # its content counts, since the list may change

    def names(self) -> list[str]:
        """Return the lines of the list of files. Raises InputError when it can't be read."""
        place = f"--files {files.redact(self.files)}"
        try:
            return files.read(self.files).decode().splitlines()
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{place}: no such file") from None
        except UnicodeDecodeError:
            raise InputError(f"{place}: no list of names") from None

    def check(self) -> None:
        """Raise InputError when `files` is no URL."""
        files.check(self.files, "--files")


def take_labels(
    evaluation: Evaluation, config: SemiSupervisedConfig, finetune: FinetuneConfig
) -> Split:
    """Choose the images that have labels, and copy them to shards beside the results.

    The learning rate is chosen on other, held-out images. These are copied too: otherwise every
    measurement would have to read a quarter of ImageNet for them. All processes call it together.

    Raises InputError when no image is held out, or when the list of files does not fit the data.
    """
    index, world = evaluation.train, evaluation.world
    some, others = (files.join(evaluation.url, name) for name in ("data", "held_out"))
    standing = (files.exists(files.join(url, indexes.NAME)) for url in (some, others))
    if not world.on_main(lambda: all(standing)):
        found = subset.find_places(index, (world.rank, world.size), evaluation.terminal.report)
        places = subset.Places.join(world.all_gather_object(found))

        def copy() -> None:
            chosen = _choose(places, index, config)
            rest = np.setdiff1d(np.flatnonzero(places.labels >= 0), chosen)
            held = hold_out(index.samples, finetune.holdout, finetune.seed)
            aside = rest[held(places.ids[rest])]
            # Whether they are few is told later, also where this was done before.
            check_held_out(len(aside), 1, evaluation.terminal.say)
            subset.write(index, places.take(aside), others, evaluation.threads)
            subset.write(index, places.take(chosen), some, evaluation.threads)

        with waiting_for_hours():
            world.on_main(copy)
    learned, chosen_in = (indexes.load(url, "the subset") for url in (some, others))
    evaluation.terminal.say(
        f"{learned.samples:,} of {index.samples:,} images have labels ({files.redact(some)}), and "
        f"{chosen_in.samples:,} others with labels choose the learning rate"
    )
    return Split(learned, hold_out_nothing, chosen_in, np.arange(chosen_in.samples))


def _choose(places: subset.Places, index: Index, config: SemiSupervisedConfig) -> subset.Ids:
    if config.files:
        place = f"--files {files.redact(config.files)}"
        return subset.find_listed(places, index.classes, config.names(), place)
    return subset.choose(places.labels, config.fraction, config.subset_seed)
