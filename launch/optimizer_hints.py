"""Say which optimizer has an option that a recipe's own optimizer does not have."""

from dataclasses import fields

from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.method.torch_options import ELEMENTWISE, list_options
from engine.recipe import Recipe, optimizers


def explain_option(option: str, recipe: Recipe) -> str:
    """Return which optimizer has an option such as optimizer.betas, and how one chooses it.

    It is "" when no optimizer has it.
    """
    group, _, name = option.replace("-", "_").partition(".")
    if group != "optimizer" or not name:
        return ""
    own = type(recipe.optimizer).__name__
    if isinstance(recipe.optimizer, TorchOptimizerConfig):
        own = recipe.optimizer.name
        if own in ELEMENTWISE and name in list_options(own):
            return f"did you mean --optimizer.options {name}=VALUE?"
    lacks = f"{own}, the optimizer of this recipe, has no option {name}"
    owners = [kind for kind in optimizers() if name in {entry.name for entry in fields(kind)}]
    if owners:
        have = " and ".join(kind.__name__ for kind in owners)
        verb = "has" if len(owners) == 1 else "have"
        choice = f"{owners[0].__name__}({name}=...)"
        return f"{lacks}: {have} {verb} it, and a recipe file sets it by optimizer={choice}"
    takers = [kind for kind in sorted(ELEMENTWISE) if name in list_options(kind)]
    if not takers:
        return ""
    first = own.removesuffix("Config")
    first = first if first in takers else takers[0]
    choice = f'TorchOptimizerConfig(name="{first}", options=("{name}=...",))'
    return (
        f"{lacks}: torch's {', '.join(takers)} {'has' if len(takers) == 1 else 'have'} it, and a "
        f"recipe file sets it by optimizer={choice}"
    )
