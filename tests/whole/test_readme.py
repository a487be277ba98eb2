"""What the READMEs show works as it stands there."""

import argparse
import ast
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
import tyro
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from engine.recipe import load
from launch import bench, command_line, evaluate, export, pack
from tests.helpers.imports import drawn, modules
from tests.helpers.places import RECIPES, ROOT
from tests.helpers.recipes import fields_of_all_recipes, parse_recipe
from tests.whole import chaos, fuzz

NAMES = [
    "README.md",
    *(f"{folder}/README.md" for folder in ("engine", "shards", "recipes", "launch", "tests")),
]
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
README = TEXTS["README.md"]

# Names in examples, of files that a reader has.
READERS = {"mine.py", "photos.npz", "features-00000.npz"}
# Options of programs that are not ours and not torchrun, and what every program has.
OTHERS = {"--help", "--logdir", "--from-env-file", "--signal", "--field.name"}
OTHERS |= {"--shutdown-timeout"}  # torchrun of torch 2.11 has none
OTHERS |= {"--no-build-isolation"}  # of pip
OTHERS |= {"--repo-type", "--local-dir"}  # of hf, the command of the Hugging Face Hub
KINDS = {"--optimizer", "--model.encoder"}  # a recipe file chooses them; they are no options
OPTION = re.compile(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?")

every = pytest.mark.parametrize("name", NAMES)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_all_readmes_are_known() -> None:
    found = [p for p in ROOT.glob("*/README.md") if not p.parent.name.startswith(".")]
    assert {str(path.relative_to(ROOT)) for path in found} | {"README.md"} == set(NAMES)


# Form --------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 260


@every
def test_lines_are_short(name: str) -> None:
    lines = TEXTS[name].splitlines()
    rows = name != "README.md"  # the others have tables with long cells
    assert [line for line in lines if len(line) >= 120 and not (rows and line[:1] == "|")] == []


# What it names -----------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name]))
    assert links
    for link in links:
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / name).parent / place if place else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@every
def test_named_files_exist(name: str) -> None:
    """A name such as `engine/fit.py`, `fit.py` or `r50_4096*.py` is that of a file."""
    for found in re.findall(r"(?<![\w/.*-])[\w*./-]+\.(?:py|sbatch|yaml|npz)\b", TEXTS[name]):
        assert found in READERS or list(ROOT.glob(found)) or is_below(found), found
    for found in re.findall(r"`((?:engine|shards|recipes|launch|tests)/[\w./]*)`", TEXTS[name]):
        assert (ROOT / found).exists(), found


def is_below(name: str) -> bool:
    folders = ("engine", "shards", "recipes", "launch", "tests")
    return any(path for folder in folders for path in (ROOT / folder).rglob(name))


@pytest.mark.parametrize("package", ["engine", "shards"])
def test_the_map_has_every_module(package: str) -> None:
    for path in modules().values():
        relative = str(path.relative_to(ROOT))
        if relative.startswith(f"{package}/"):
            assert f"`{relative}`" in TEXTS[f"{package}/README.md"], relative


def test_the_cookbook_has_every_recipe() -> None:
    for path in RECIPES.glob("[!_]*.py"):
        assert f"`recipes/{path.name}`" in TEXTS["recipes/README.md"], path


def test_the_graph_is_the_drawn_one() -> None:
    """python -m tests.helpers.imports draws it anew."""
    assert f"```text\n{drawn()}\n```" in TEXTS["engine/README.md"]


# Options -----------------------------------------------------------------------------------


def helped(call: Callable[[], object]) -> str:
    """What a program prints before it exits."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        call()
    return output.getvalue()


def helps() -> Iterator[str]:
    for recipe in ("quickstart", "r50_4096", "vit_b16"):  # two optimizers, two kinds of encoders
        yield helped(partial(parse_recipe, [str(RECIPES / f"{recipe}.py"), "--help"]))
    for protocol in (
        "linear",
        "logistic",
        "knn",
        "finetune",
        "semi-supervised",
        "neighbours",
        "features",
        "report",
        "runs",
    ):
        yield helped(partial(evaluate.parse, [protocol, "--help"]))
    yield helped(lambda: export.parse(["--help"]))
    with mock.patch.object(sys, "argv", ["chaos.py"]):
        yield helped(lambda: chaos.main(["--help"]))
    with mock.patch.object(sys, "argv", ["fuzz.py"]):
        yield helped(lambda: fuzz.main(["--help"]))
    pairs_off = (tyro.conf.FlagCreatePairsOff,)
    yield helped(lambda: tyro.cli(pack.main, args=["--help"], config=pairs_off))
    for name in bench.BENCHES:
        with mock.patch.object(sys, "argv", ["bench.py", name, "--help"]):
            yield helped(lambda: runpy.run_path(bench.__file__, run_name="__main__"))


@cache
def options() -> set[str]:
    """The long options of all programs."""
    found = {option for text in helps() for option in OPTION.findall(text)}
    parser: argparse.ArgumentParser = get_args_parser()
    fields = {f"--{field}" for field in fields_of_all_recipes()}  # with any optimizer
    return found | fields | set(parser._option_string_actions)


@every
def test_options_exist(name: str) -> None:
    known = options() | OTHERS
    assert {"--probe.no-baseline", "--optimizer.betas", "--index-only", "--nproc-per-node"} <= known
    assert set(OPTION.findall(TEXTS[name])) - known == set()


def test_the_cookbook_has_every_field() -> None:
    told = set(OPTION.findall(TEXTS["recipes/README.md"])) | {"--run"} | KINDS
    told |= {option.replace("no-", "") for option in told}
    for field in fields_of_all_recipes() - {"run-url"}:
        option = "--" + field.replace("view2", "view1")
        assert option in told, option


# Commands and examples ---------------------------------------------------------------------


@every
def test_training_commands_are_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command_line, "_count_images", lambda _: 4000)  # of data that is not here
    for block in blocks(TEXTS[name], "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            _, mark, rest = line.partition("launch/train.py ")
            words = shlex.split(rest)
            if mark and "..." not in rest and words[0] not in READERS:
                parse_recipe(words)


@every
def test_modules_in_examples_can_be_imported(name: str) -> None:
    for block in blocks(TEXTS[name], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                exec(f"from {node.module} import {', '.join(a.name for a in node.names)}", {})


def test_the_recipes_of_the_cookbook_are_complete(tmp_path: Path) -> None:
    found = re.findall(
        r"<!-- recipe -->\n```python\n(.*?)```", TEXTS["recipes/README.md"], re.DOTALL
    )
    assert len(found) >= 2
    for code in found:
        (tmp_path / "mine.py").write_text(code)
        load(str(tmp_path / "mine.py")).check()


def test_an_encoder_is_used_without_this_package(tmp_path: Path) -> None:
    code = re.search(r"<!-- use -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()
    save_file(model.state_dict(), tmp_path / "encoder.safetensors")
    check = """
import sys
assert features.shape == (1, 2048)
assert {name: tuple(x.shape) for name, x in maps.items()} == {
    "layer3": (1, 1024, 14, 14), "layer4": (1, 2048, 7, 7)
}
assert "engine" not in sys.modules
"""
    script = code[1] + check
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


# Error lines -------------------------------------------------------------------------------


def template(node: ast.AST) -> str:
    """A string of the code, with a null character for each part that is computed."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "\0" for part in node.values)
    return ""


def is_said(line: str, templates: set[str]) -> bool:
    """Whether a template begins as the line does, where `...` stands for anything."""
    pattern = ".+".join(map(re.escape, re.split(r"\.\.\.|index\.json", line.removesuffix("..."))))
    return any(re.match(f"(error: )?{pattern}", text, re.DOTALL) for text in templates)


def test_error_lines_are_those_of_the_code() -> None:
    trees = [ast.parse(path.read_text()) for path in modules().values()]
    templates = {text for tree in trees for node in ast.walk(tree) if (text := template(node))}
    section = README.partition("## When something goes wrong")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    assert len(lines) >= 15
    assert [line for line in lines if not is_said(line, templates)] == []
    assert not is_said("... is not set: give --... URI, the ...", templates)
