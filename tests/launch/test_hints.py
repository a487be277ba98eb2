"""What --lr and other names of other programs mean here."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from engine.method.torch_optimizer import TorchOptimizerConfig
from launch.hints import ADVICE, FIELDS, hint
from shards.errors import InputError
from tests.helpers.imports import modules
from tests.helpers.places import RECIPES
from tests.helpers.recipes import fields_of_all_recipes, parse_recipe
from tests.test_ancestors import TABLES

QUICKSTART = str(RECIPES / "quickstart.py")
LARS = str(RECIPES / "imagenette.py")


def test_every_hint_leads_somewhere() -> None:
    known = fields_of_all_recipes()
    assert {"schedule.base-lr", "optimizer.betas", "optimizer.trust-coefficient"} <= known
    for names, meant in FIELDS.items():
        assert [field for field in meant.fields if field in known], names
        assert not set(names.split()) & known, names
    named = {field for meant in FIELDS.values() for field in meant.fields}
    assert named <= known
    advised = {
        name for text in ADVICE.values() for name in re.findall(r"--([a-z]+(?:\.[a-z0-9]+)+)", text)
    }
    assert advised
    assert advised <= known
    words = [name for names in [*FIELDS, *ADVICE] for name in names.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lr", "3"], "unknown field --lr: did you mean --schedule.base-lr? (it is the peak"),
        (["--lr=3"], "unknown field --lr: did you mean --schedule.base-lr?"),
        (["--learning_rate", "3"], "did you mean --schedule.base-lr?"),
        (["--epochs", "3"], "did you mean --schedule.epochs?"),
        (["--batch-size", "3"], "did you mean --batch.size?"),
        (["--batch_size", "3"], "did you mean --batch.size?"),
        (["--Batch-Size", "3"], "did you mean --batch.size?"),
        (["--bs", "3"], "did you mean --batch.size?"),
        (["--resume"], "the same command continues its run by itself; --checkpoint.resume URL"),
        (["--num-workers", "3"], "did you mean --threads?"),
        (["--optimizer", "lars_adam"], "recipe is AdamWConfig; a recipe file sets it, by optimiz"),
        (
            ["--optimizer.name", "RMSprop"],
            "AdamWConfig, the optimizer of this recipe, has no option name: TorchOptimizerConfig "
            "has it, and a recipe file sets it by optimizer=TorchOptimizerConfig(name=...)",
        ),
        (["--optimizer.momentum", "0"], "no option momentum: LARSConfig and SGDConfig have it"),
        (["--optimizer.trust-coefficient", "0"], "optimizer=LARSConfig(trust_coefficient=...)"),
        (["--optimizer.amsgrad"], '(name="AdamW", options=("amsgrad=...",))'),
        (["--optimizer.lr", "3"], "did you mean --schedule.base-lr?"),
        (["--optimizer.xyzzy", "3"], "unknown field --optimizer.xyzzy: "),
        (["--clip", "1.0"], "did you mean --clip.value or --clip.norm?"),
        (["--early-stop"], "did you mean --early-stop.key or --early-stop.patience? (the first"),
        (["--optimizer.lr", "1"], "did you mean --schedule.base-lr?"),
        (["--uid", "a"], "did you mean --run-url?"),
        (["--num-replicas", "8"], "torchrun starts one process for each GPU"),
        (["--wd", "3"], "did you mean --optimizer.weight-decay?"),
        (["--arch", "resnet50"], "did you mean --model.encoder.depth?"),
        (["--model.encoder.name", "vit_b_16"], "this recipe is ResNet-10 x0.25; a recipe file"),
        (["--model.encoder", "vit_b_16"], "this recipe is ResNet-10 x0.25; a recipe file sets"),
        (["--output", "x"], "did you mean --run-url?"),
        (["--data", "x"], "did you mean --data.train?"),
        (["--gpus", "8"], "torchrun starts one process for each GPU"),
        (["--fp16"], "did you mean --precision?"),
        (["--image-size", "96"], "did you mean --views.size?"),
        (["--ema", "0.99"], "did you mean --schedule.base-tau?"),
        (["--momentum", "0.9"], "did you mean --schedule.base-tau? (it is the target's"),
        (["--schedule.warmup-epochs", "1"], "did you mean --schedule.warmup? (it takes epochs"),
        (["--every", "3"], "did you mean --probe.every or --checkpoint.every or --log.every?"),
        (["--probe.evry", "3"], "did you mean --probe.every?"),
        (["--no-probe.baseline"], "did you mean --probe.no-baseline?"),
        (["--no-baseline"], "did you mean --probe.no-baseline?"),
        (["--no_probe.baseline"], "did you mean --probe.no-baseline?"),
        (["--no-data.audit"], "did you mean --data.no-audit?"),
        (["--model.no-encoder.projection-shortcut"], "--model.encoder.no-projection-shortcut?"),
        (["--probe.baseline", "false"], "on or off without one: --group.name or --group.no-name"),
        (
            ["--data.window", "0", "4095"],
            "the packing does that, once for all runs: python",
        ),
        (["--data.window-percentiles", "1", "99"], "launch/pack.py IMAGES OUT with its --window,"),
        (["--xyzzy", "3"], "unknown field --xyzzy: --help lists the fields"),
        (["--probe.every", "1", "epoch"], "a duration is one value, such as '1 epoch' in quotes"),
    ],
)
def test_other_names_are_understood(arguments: list[str], text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_recipe([QUICKSTART, *arguments])
    assert text in str(error.value)


@pytest.mark.parametrize("name", ["--init", "--pretrained", "--weights", "--load"])
def test_weights_to_start_from(name: str) -> None:
    with pytest.raises(InputError, match=r"did you mean --model\.start\?"):
        parse_recipe([QUICKSTART, name, "x"])


def test_a_field_of_another_recipe_is_not_proposed() -> None:
    recipe = parse_recipe([LARS])
    for option in ("betas", "beta1", "optimizer.betas", "nesterov"):
        text = hint(option, recipe)
        assert text.startswith("LARSConfig, the optimizer of this recipe, has no option "), option
        kind = "SGDConfig(nesterov" if option == "nesterov" else "AdamWConfig(betas"
        assert text.endswith(f"and a recipe file sets it by optimizer={kind}=...)"), option
    torch = replace(recipe, optimizer=TorchOptimizerConfig(name="Adam"))
    assert hint("optimizer.betas", torch) == "did you mean --optimizer.options betas=VALUE?"
    assert hint("optimizer.eps", torch) == "did you mean --optimizer.options eps=VALUE?"
    assert hint("optimizer.momentum", torch).startswith("Adam, the optimizer of this recipe, has")
    assert hint("betas", parse_recipe([QUICKSTART])) == "did you mean --optimizer.betas?"


@pytest.mark.parametrize("title", TABLES)
def test_the_ancestors_options_agree_with_the_cookbook(title: str) -> None:
    recipe = parse_recipe([QUICKSTART])
    for row in TABLES[title]:
        for option in (one for one in row.options if re.fullmatch("[a-z_.-]+", one)):
            if option in row.fields or option.replace("-", "_") in row.fields:
                continue  # the field has the option's name
            text = hint(option, recipe)
            targets = {one.replace("_", "-").replace("run", "run-url") for one in row.fields}
            told = set(re.findall(r"--([a-z]+(?:[.-][a-z0-9]+)*)", text))
            assert not targets or targets & told or "recipe file sets" in text, (option, text)
            assert targets or not text.startswith("did you mean") or option == "distributed", text
            assert text != "--help lists the fields", option


@pytest.mark.parametrize("path", modules().values(), ids=modules().keys())
def test_messages_write_run_url(path: Path) -> None:
    """Because torchrun refuses --run, which it takes for an abbreviation of its own --run-path."""
    tree = ast.parse(path.read_text())
    docs = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node in docs:
            continue
        # One of our own commands gives it alone.
        assert node.value == "--run" or not re.search(r"--run(?![\w-])", node.value), node.lineno
