"""Show a run in Weights & Biases, and continue the same run there after a restart.

The program wandb-core does the sending, in a process of its own. It keeps what it could not send in
a local folder. The key for W&B is that library's business.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.log.trackers import ANSWER, Description, Point, Tracker
from shards.errors import InputError, printable
from shards.fields import Rule
from shards.storage import files

_NAME = r"[^/\\#?%:\s][^/\\#?%:\x00-\x1f\x7f]{0,127}"
_NO_KEY = (
    "W&B has no API key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline to send "
    "the run later"
)


@dataclass(frozen=True)
class Project(Rule):
    """An annotation on a field that takes PROJECT or ENTITY/PROJECT, or an empty text."""

    def check(self, name: str, value: Any) -> None:
        """Raise InputError naming the field `name` when `value` names no project."""
        text = value if isinstance(value, str) else "?"
        if text and not re.fullmatch(rf"({_NAME}/)?{_NAME}", text):
            given = files.redact(value) if isinstance(value, str) else value
            raise InputError(
                f"{name} takes a project of Weights & Biases, such as byol or team/byol, "
                f"not {given!r}"
            )


def check_key() -> None:
    """Raise InputError when W&B is to be reached and there is no key for it.

    Nothing is raised when W&B does not answer, because it may do so later.
    """
    import wandb

    if _is_offline(wandb):
        return
    try:
        known = wandb.login(prompt=False)  # without this a terminal would be asked for one
    except Exception:
        return
    if not known:
        raise InputError(f"log.wandb: {_NO_KEY}")


class WandbTracker(Tracker):
    """Show a run as a run of W&B, whose steps are those of the training."""

    name = "W&B"

    def __init__(self, project: str, description: Description) -> None:
        """Connect to nothing yet."""
        self._entity, _, self._project = project.rpartition("/")
        self._description = description
        self._run: Any = None
        self._next = 0  # W&B takes no figures of earlier steps

    def start(self, history: Sequence[Point]) -> str:
        with self._renewing():
            if self._run is None:
                self._run = self._open()
                self._next = self._run.starting_step
            for values, step in history:
                self._log(step, values)
        if self._run.offline:
            return f"offline, for `wandb sync {printable(self._run.dir.removesuffix('/files'))}`"
        return str(self._run.url)

    def scalars(self, points: Sequence[Point]) -> None:
        with self._renewing():
            for values, step in points:
                # A figure that is measured late is logged at the next step that W&B takes.
                late = step <= self._description.step
                self._log(max(step, self._next) if late else step, values)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        import wandb

        image = wandb.Image(pixels, caption=f"step {step}")
        with self._renewing():
            self._log(max(step, self._next), {name: image})  # figures of later steps may be there

    def finish(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=int(failed))
        except Exception:
            folder = printable(self._run.dir.removesuffix("/files"))
            raise ConnectionError(f"`wandb sync {folder}` sends what did not arrive") from None
        finally:
            _end_service()  # else Python's exit would do it, and wait again

    def _log(self, step: int, values: dict[str, Any]) -> None:
        """Log values, unless W&B has that step from an earlier process."""
        if step >= self._next:
            self._run.log(values, step=step)
            self._next = step

    @contextmanager
    def _renewing(self) -> Iterator[None]:
        """End wandb-core when the block fails, because it would refuse to open the run again."""
        try:
            yield
        except Exception:
            self._run = None
            _end_service()
            raise

    def _open(self) -> Any:
        import wandb

        if not _is_offline(wandb) and not wandb.login(prompt=False):
            raise ConnectionError(_NO_KEY)
        known = self._description
        return wandb.init(
            entity=self._entity or None,
            project=self._project,
            id=known.id,
            name=known.name,
            resume="allow",
            reinit="create_new",
            config={printable(name): _plain(value) for name, value in known.fields.items()},
            settings=_settings(wandb),
        )


def _end_service() -> None:
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _settings(wandb: Any) -> Any:
    """Return settings that send what the log has, and nothing of the machine or the command line.

    A command line may hold secrets.
    """
    return wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=1.5 * ANSWER,
        finish_timeout=1.5 * ANSWER,
        finish_timeout_raises=True,
    )


def _is_offline(wandb: Any) -> bool:
    return wandb.setup().settings.mode not in ("online", "run", None)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | None) else printable(str(value))
