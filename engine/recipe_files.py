"""Find recipe files, which are Python files, and run them with the modules beside them."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from shards.documents import shown
from shards.errors import InputError
from shards.storage import files

RECORDED, FILE = "recipe.json", "recipe_file"  # a run's recipe, and its key for the recipe file
SHIPPED = "recipes"  # the package of the recipes that come with the engine
_OURS = {"engine", "launch", "recipes", "shards"}


@contextmanager
def running(path: str, explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Run code of a recipe file in the block, which can import the modules of the file's folder.

    They are forgotten at the end, so that the file of another folder gets its own ones.

    Args:
        explain: Returns in words what an error means; "" when it does not know.

    Raises InputError with one line, which names the file and the line, when the code fails.
    """
    file = Path(path)
    try:
        with _importing_from(file.resolve().parent):
            yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        reason = explain(error) or f"{type(error).__name__}: {error}"
        raise InputError(f"{_place(error, file)}: {' '.join(reason.split())}") from None


def find(name: str | Path) -> str:
    """Return the path of a recipe file, which may also be given by the bare name of a shipped one.

    Raises InputError when there is none, with the names that there are.
    """
    if not isinstance(name, str | Path):
        raise InputError(f"a recipe file is named by a text or a Path, not {shown(name)}")
    name = str(name)
    if Path(name).is_file() and not name.lower().endswith(".json"):
        return name
    if name.isidentifier() and name in (known := shipped()):
        return str(known[name])
    if remedy := _explain_run(name):
        raise InputError(f"{files.redact(name)}: {remedy}")
    if "://" in name:
        raise InputError(f"{files.redact(name)}: a recipe file must be on a local disk")
    raise InputError(
        f"{name}: no such recipe file; those that come along are {', '.join(shipped())}"
    )


def _explain_run(name: str) -> str:
    """Say what to give in place of a run or of a JSON file; "" when the name is of neither."""
    is_json = name.lower().endswith(".json")
    document = name if is_json else f"{name}/{RECORDED}"
    if "://" in name or not Path(document).is_file():
        return ""
    try:
        found = files.read_json(document)[FILE]["file"]
        file = found if isinstance(found, str) else ""
    except (OSError, ValueError, LookupError, TypeError):
        file = ""
    what = "is JSON, and a recipe file is Python" if is_json else "is a run, and no recipe file"
    return (
        f"{what}: to go on with a run, give the recipe file{f' {shown(file)}' * bool(file)} and "
        "the options that it was started with; in Python, engine.load_recipe(RUN) reads what a "
        "run has"
    )


def shipped() -> dict[str, Path]:
    """Return the recipe files that come with the engine, by their names."""
    spec = importlib.util.find_spec(SHIPPED)
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or () for path in sorted(Path(folder).glob("[!_]*.py"))]
    return {path.stem: path for path in found}


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let the modules of a folder be imported in the block, and forget them at its end."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # the folder may have changed a moment ago
    try:
        yield
    finally:
        with suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(str(folder))
        # Names below a dot go with their package.
        tops = {name.partition(".")[0] for name in sys.modules.keys() - before} - _OURS
        beside = {top for top in tops if _lies_in(sys.modules.get(top), folder)}
        for name in sys.modules.keys() - before:
            if name.partition(".")[0] in beside:
                del sys.modules[name]


def _lies_in(module: ModuleType | None, folder: Path) -> bool:
    """Return whether a top-level module is a file of the folder, or a package in it."""
    places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    return any(place is not None and Path(place).resolve().parent == folder for place in places)


def _place(error: BaseException, file: Path) -> str:
    """Return the file and the line of an error: the last line of the user's own files."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    place = str(file)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(file) or _is_the_users(Path(frame.filename), file):
            place = f"{frame.filename}, line {frame.lineno}"
    return place


def _is_the_users(source: Path, file: Path) -> bool:
    """Return whether a source lies in or below the folder of a recipe file, as its modules do."""
    try:
        first, *below = source.resolve().relative_to(file.resolve().parent).parts
    except ValueError:
        return False
    return first not in _OURS and "site-packages" not in below and source.is_file()
