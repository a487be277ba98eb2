"""The recipes for few GPUs and for other views: what their heads say is what they are."""

import math
import re
from dataclasses import replace

import pytest

from engine.data import check_micro
from engine.recipe import load, method_fields
from recipes.r50_4096_300ep import recipe as paper
from recipes.simclr_views import simclr_views
from recipes.symmetric_views import symmetric_views
from shards.errors import InputError
from shards.fields import differences
from tests.helpers.places import RECIPES
from tests.helpers.recipes import parse_recipe

SMALL = {"r50_256": 256, "r50_1024": 1024}
VIEWS = ("symmetric_views", "simclr_views")


@pytest.mark.parametrize("name", SMALL)
def test_a_small_batch_averages_over_as_many_images(name: str) -> None:
    recipe = load(str(RECIPES / f"{name}.py"))
    assert recipe.batch.size == SMALL[name]
    for step in (0, 1000):
        rate = recipe.schedule.base_tau if step == 0 else 0.999
        ours = math.log(rate) * recipe.schedule.tau_power(recipe.batch.size) / recipe.batch.size
        assert ours == pytest.approx(math.log(rate) / paper.batch.size)
    ratio = recipe.schedule.base_lr / paper.schedule.base_lr
    assert ratio * (1 + 1e-9) >= 1.5
    assert ratio <= 2
    assert recipe.schedule.peak_lr(256) == recipe.schedule.base_lr  # the linear rule
    check_micro(recipe)


@pytest.mark.parametrize("name", SMALL)
def test_the_command_of_the_ablation_is_the_papers_batch_in_parts(name: str) -> None:
    text = (RECIPES / f"{name}.py").read_text()
    (options,) = re.findall(rf"torchrun \.\.\. recipes/{name}\.py((?:\s+--\S+ \S+)+)", text)
    recipe = parse_recipe([str(RECIPES / f"{name}.py"), *options.split()])
    check_micro(recipe)
    assert recipe.batch.size // recipe.batch.micro == SMALL[name]  # share norm statistics
    told = differences(method_fields(paper), method_fields(recipe))
    assert {line.split(":")[0] for line in told} == {"batch.micro", "data.streams"}


@pytest.mark.parametrize("name", VIEWS)
def test_other_views_change_nothing_else(name: str) -> None:
    recipe = load(str(RECIPES / f"{name}.py"))
    recipe.check()
    assert recipe.views.view1 == recipe.views.view2
    assert replace(recipe, run=paper.run, views=paper.views) == paper
    changed = parse_recipe([str(RECIPES / f"{name}.py"), "--views.view1.blur", "0"])
    assert (changed.views.view1.blur, changed.views.view2.blur) == (0, 0.5)


def test_views_of_other_sizes_and_strengths() -> None:
    assert symmetric_views(96).size == simclr_views(96).size == 96
    view, soft = simclr_views().view1, simclr_views(strength=0.5).view2
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (soft.brightness, soft.contrast, soft.saturation, soft.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (view.blur, view.solarize, view.jitter, view.grayscale) == (0.5, 0.0, 0.8, 0.2)
    replace(paper, views=simclr_views(strength=1.25)).check()
    with pytest.raises(InputError, match=r"views.view1.brightness must be from 0 to 1"):
        replace(paper, views=simclr_views(strength=1.5)).check()
