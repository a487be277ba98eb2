"""Show a run in Visdom, in an environment of its own: a window for each curve and each picture.

A window is always sent whole. So a server that was restarted, or a run that went back to an earlier
step, leaves neither gaps nor doubled points.
"""

import html
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from engine.log.trackers import ANSWER, Description, Point, Tracker
from shards.errors import InputError, printable
from shards.fields import Rule
from shards.storage import files

RECIPE = "recipe"  # the window of the recipe
MOST = 2000  # points of a window; a curve with more is shown by every second point, or fourth ...
PORT = 8097  # of Visdom
GROUPS = ("train", "eval", "schedule", "system")  # of curves, in the order of their windows


class Address(NamedTuple):
    """Hold the parts of a server's URL."""

    server: str  # scheme and host
    port: int
    base: str  # the path of the server, such as /visdom, or ""
    environment: str  # "" when the URL names none
    user: str
    password: str


@dataclass(frozen=True)
class VisdomURL(Rule):
    """An annotation on a field that takes the URL of a Visdom server, or an empty text."""

    def check(self, name: str, value: Any) -> None:
        """Raise InputError naming the field `name` when `value` is no URL of a server."""
        if value == "":
            return
        try:
            parse(value)
        except (ValueError, AttributeError, TypeError):
            given = _without_login(value) if isinstance(value, str) else value
            raise InputError(
                f"{name} takes the URL of a Visdom server and an environment there, such as "
                f"http://localhost:{PORT} or http://localhost:{PORT}/mine, not {given!r}"
            ) from None


def parse(url: str) -> Address:
    """Return the parts of a server's URL. Raises ValueError when it is none.

    The last part of the path is the environment, also when it is copied from a browser, as in
    http://localhost:8097/env/mine.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(url)
    if re.search(r"\s", url) or (parts.username and not parts.password):
        raise ValueError(url)
    *base, environment = [unquote(name) for name in parts.path.split("/") if name] or [""]
    if base and base[-1] == "env":
        del base[-1]
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(
        server=f"{parts.scheme}://{host}",
        port=parts.port or (443 if parts.scheme == "https" else PORT),
        base="".join(f"/{name}" for name in base),
        environment=environment,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def _without_login(url: str) -> str:
    """Return a URL, which may lack its scheme, without user and password."""
    return files.redact(url) if "://" in url else url.rpartition("@")[2]


class VisdomTracker(Tracker):
    """Show a run in an environment of a Visdom server."""

    name = "Visdom"

    def __init__(self, url: str, description: Description) -> None:
        """Connect to nothing yet. Without an environment in the URL, one is named after the run."""
        self._address, self._fields = parse(url), description.fields
        name = re.sub(r"[^\w.-]+", "-", description.name)
        run = f"{name}-{description.id}"
        self._environment = self._address.environment or run
        # Other runs may be shown in an environment that the URL names.
        self._run = run if self._address.environment else ""
        self._client: Any = None
        self._curves: dict[str, tuple[list[int], list[float]]] = {}

    def start(self, history: Sequence[Point]) -> str:
        if self._client is None:
            self._client = _connect(self._address, self._environment)
        self._curves = {}
        changed = self._extend(history)
        self._show_recipe()
        self._show(changed)
        server, port, base, *_ = self._address
        return f"{server}:{port}{base}/env/{self._environment}"

    def scalars(self, points: Sequence[Point]) -> None:
        changed = self._extend(points)
        question = {"win": self._window(RECIPE), "eid": self._environment}
        if self._client._send(question, endpoint="win_exists", quiet=True) != "true":
            raise ConnectionError("the server was restarted, or the run's windows were closed")
        self._show(changed)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        title = {"title": self._title(f"{name}, step {step}"), "caption": f"step {step}"}
        self._client.image(pixels.transpose(2, 0, 1), win=self._window(name), opts=title)

    def finish(self, failed: bool) -> None:  # noqa: ARG002 - it shows no such state
        self._client.save([self._environment])  # a server keeps nothing else over its restart

    def _window(self, name: str) -> str:
        """Return the id of a window, which no other run has in the environment."""
        return f"{self._run}/{name}" if self._run else name

    def _title(self, text: str) -> str:
        return f"{text}, {self._run}" if self._run else text

    def _extend(self, points: Iterable[Point]) -> list[str]:
        """Add points to the curves, and return the names of those that have new ones, in order."""
        changed = set()
        for values, step in points:
            for name, value in values.items():
                steps, known = self._curves.setdefault(name, ([], []))
                steps.append(step)
                known.append(value)
                changed.add(name)
        return sorted(changed, key=_rank)

    def _show(self, names: list[str]) -> None:
        for name in names:
            steps, values = (thin(numbers) for numbers in self._curves[name])
            self._client.line(
                Y=np.array(values, np.float64),
                X=np.array(steps, np.float64),
                win=self._window(name),
                # A curve of one point would not be seen without a marker.
                opts={"title": self._title(name), "xlabel": "step", "markers": len(steps) < 2},
            )

    def _show_recipe(self) -> None:
        rows = "".join(
            f"<tr><td>{_escape(name)}&emsp;</td><td>{_escape(value)}</td></tr>"
            for name, value in self._fields.items()
        )
        size = {"width": 600, "height": 350}  # pixels
        table = f"<table>{rows}</table>"
        window = self._window(RECIPE)
        options = {"title": self._title(RECIPE), **size}
        if self._client.text(table, win=window, opts=options) != window:
            # Visdom names the window. A login page, for one, has other answers.
            server, port, *_ = self._address
            raise ConnectionError(f"what answers at {server}:{port} is no Visdom server")


def thin(numbers: list[Any]) -> list[Any]:
    """Return about MOST of many numbers, evenly taken, with the newest one always among them."""
    stride = 1
    while len(numbers) > stride * MOST:
        stride *= 2  # so that most of the numbers stay the same ones
    return [*numbers[:-1:stride], *numbers[-1:]]


def _rank(name: str) -> tuple[int, str]:
    group = name.partition("/")[0]
    return GROUPS.index(group) if group in GROUPS else len(GROUPS), name


def _escape(value: Any) -> str:
    return html.escape(printable(str(value)))


def _connect(address: Address, environment: str) -> Any:
    """Return a client of Visdom that waits for no answer longer than it may."""
    requests: Any = import_module("requests")  # Visdom needs it, too
    visdom: Any = import_module("visdom")

    logging.getLogger("visdom").setLevel(logging.ERROR)  # it warns of what is meant so

    place = f"{address.server}:{address.port}"

    class Session(requests.Session):
        def request(self, *arguments: Any, **options: Any) -> Any:
            try:
                answer = super().request(*arguments, **{"timeout": ANSWER, **options})
            except requests.Timeout:
                raise ConnectionError(f"{place} does not answer") from None
            except requests.RequestException:
                raise ConnectionError(f"{place} cannot be reached") from None
            if not answer.ok:
                raise ConnectionError(f"{place} refuses, with HTTP {answer.status_code}")
            return answer

    class Client(visdom.Visdom):
        _session: Any

        @property
        def session(self) -> Any:
            if self._session is None:
                session = Session()
                if self.username:
                    login = {"username": self.username, "password": self.password}
                    session.post(f"{self.server}:{self.port}{self.base_url}", json=login)
                self._session = session
            return self._session

    return Client(
        server=address.server,
        port=address.port,
        base_url=address.base or "/",
        env=environment,
        username=address.user or None,
        password=address.password or None,
        use_incoming_socket=False,
        raise_exceptions=True,
    )
