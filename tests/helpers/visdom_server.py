"""Run Visdom's own server on this machine for tests, without the scripts that it would download."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

_SERVE = "from visdom.server.run_server import main; main()"
START_SECONDS = 60

Points = list[tuple[float, float]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class VisdomServer:
    """A server that can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ["-port", str(self.port), "-env_path", str(self.folder), "-bind_local"]
        with open(self.folder / "output.txt", "ab") as output:
            command = [sys.executable, "-c", _SERVE, *options, "--hostname", "127.0.0.1"]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < end, (self.folder / "output.txt").read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        """Kill the server. What it has not saved is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def windows(self, environment: str) -> dict[str, Any]:
        """Return the windows of an environment by their ids, or none when it does not exist."""
        if environment not in self.environments():
            return {}
        found: dict[str, Any] = self._ask("win_data", {"win": None, "eid": environment})
        return found

    def curves(self, environment: str) -> dict[str, Points]:
        """Return the points of all curves of an environment."""
        return read_curves(self.windows(environment))

    def environments(self) -> list[str]:
        found: list[str] = self._ask("env_state", {})
        return sorted(found)

    def _ask(self, what: str, question: dict[str, Any]) -> Any:
        body = json.dumps(question).encode()
        with urllib.request.urlopen(f"{self.url}/{what}", body, timeout=20) as answer:
            return json.loads(answer.read())


def read_curves(windows: dict[str, Any]) -> dict[str, Points]:
    """Return the points of those windows that are curves."""
    return {
        name: list(zip(*(window["content"]["data"][0][axis] for axis in "xy"), strict=True))
        for name, window in windows.items()
        if window["type"] == "plot"
    }
