"""Recipes beside the paper's main ones, and the options of its ablations: they are what is told."""

import math
import re
from dataclasses import replace

import pytest

from engine.data import check_micro
from engine.method.byol import BYOLConfig
from engine.method.lars import LARSConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import load, method_fields
from recipes.r50_4096 import recipe as main
from recipes.r50_4096_300ep import recipe as paper
from recipes.simclr_views import simclr_views
from recipes.symmetric_views import symmetric_views
from shards.errors import InputError
from shards.fields import differences
from shards.views import ViewConfig, ViewsConfig
from tests.helpers.places import RECIPES, ROOT
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
    assert symmetric_views().view1 == ViewConfig(blur=0.5, solarize=0.2)  # the paper's table 17
    replace(paper, views=simclr_views(strength=1.25)).check()
    with pytest.raises(InputError, match=r"views.view1.brightness must be from 0 to 1"):
        replace(paper, views=simclr_views(strength=1.5)).check()


def test_the_papers_smaller_batch() -> None:
    """Its appendix G, and what the power rule makes of the main setting."""
    recipe = load(str(RECIPES / "r50_512.py"))
    told = differences(method_fields(main), method_fields(recipe))
    assert told == [
        "batch.size: there 4096, here 512",
        "data.streams: there 512, here 64",
        "schedule.base_lr: there 0.2, here 0.4",
        "schedule.base_tau: there 0.996, here 0.9995",
    ]
    assert main.schedule.base_tau ** (512 / 4096) == pytest.approx(0.9995, abs=5e-5)


def test_the_official_small_setting() -> None:
    """Each number of the instructions for Imagenette in the README of the official code."""
    recipe = load(str(RECIPES / "imagenette.py"))
    assert isinstance(recipe.optimizer, LARSConfig)
    assert recipe.optimizer.weight_decay == 1e-6
    assert recipe.model == BYOLConfig(ResNetConfig(18, projection_shortcut=True))
    assert recipe.schedule == ScheduleConfig(1000, "10 epochs", base_lr=2.0, base_tau=0.996)
    assert (recipe.batch.size, recipe.batch.micro) == (256, 1)
    assert recipe.views == ViewsConfig(128)
    assert recipe.probe.crop == 128 / (128 + 32)


def test_the_options_of_the_papers_rows() -> None:
    """Each row of the table is a setting, also with the further values that it lists."""
    table = (ROOT / "recipes/README.md").read_text().partition("<!-- paper -->\n")[2]
    lines = table.partition("\n\n")[0].splitlines()[2:]
    assert len(lines) > 20
    for line in lines:
        row, file, options, figures = (cell.strip() for cell in line[1:-1].split("|"))
        given = [part for span in re.findall("`(.*?)`", options) for part in span.split()]
        further = re.findall(r"\d+", re.sub("`.*?`", "", options))  # of the last option
        for value in ["", *further]:
            changed = [*given[:-1], value] if value else given
            check_micro(parse_recipe([str(RECIPES / file.strip("`")), *changed]))
        if further:
            assert len(figures.split(",")) == len(further) + 1, row
        assert all(18 < float(figure) < 80 for figure in figures.split(", ")), row
