"""Train: torchrun launch/train.py RECIPE [--field.name value ...]

The same command starts a run, continues it after a stop or a crash, and, with other operation
fields, continues it differently. RECIPE --help lists all fields.
"""

import sys

from engine.debug import debug_step
from engine.recipe import parse
from engine.trainer import Trainer
from shards.errors import InputError


def main(arguments: list[str]) -> int:
    try:
        recipe = parse(arguments)
        trainer = Trainer(recipe)
        if recipe.debug_step:
            debug_step(trainer)
        else:
            trainer.fit()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
