"""Hosts of one's own: network namespaces with addresses, and links that are cut or slow.

It takes root and iproute2. Everything is gone when the block of `network` ends.
"""

import contextlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

NOWHERE = "02:00:00:00:00:01"  # A hardware address that nobody has.
NETEM = ("netem", "delay", "60ms", "20ms", "loss", "2%")
# Without netem: a narrow link whose queue holds 20 ms, so that it drops what comes faster.
TBF = ("tbf", "rate", "8mbit", "burst", "16kb", "latency", "20ms")


@dataclass(frozen=True)
class Host:
    """A namespace behind the bridge."""

    name: str
    link: str
    """The bridge's end of its link."""
    address: str

    @property
    def enter(self) -> list[str]:
        """The command in front of a command that runs on this host."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        _run("ip", "link", "set", self.link, "down")

    def heal(self) -> None:
        _run("ip", "link", "set", self.link, "up")

    def lose(self, address: str) -> None:
        """Let what this host sends to an address vanish."""
        _run(*self._neighbor("replace", address), "lladdr", NOWHERE, "nud", "permanent")

    def find(self, address: str) -> None:
        _run(*self._neighbor("del", address))

    def slow(self) -> str:
        """Make the link slow and lossy in both directions. Return how."""
        for discipline in (NETEM, TBF):
            try:
                for device in self._devices():
                    _run(*device[0], "replace", "dev", device[1], "root", *discipline)
            except RuntimeError:
                continue
            return " ".join(discipline)
        raise RuntimeError("neither netem nor tbf is in this kernel")

    def hurry(self) -> int:
        """Make the link as it was. Return the number of packets that it has dropped."""
        dropped = 0
        for command, device in self._devices():
            shown = _run(*command[:-1], "-s", command[-1], "show", "dev", device)
            dropped += sum(map(int, re.findall(r"dropped (\d+)", shown)))
            _run(*command, "del", "dev", device, "root")
        return dropped

    def _devices(self) -> list[tuple[list[str], str]]:
        return [(["tc", "qdisc"], self.link), (["tc", "-n", self.name, "qdisc"], "eth0")]

    def _neighbor(self, do: str, address: str) -> list[str]:
        return ["ip", "-n", self.name, "neigh", do, address, "dev", "eth0"]


@dataclass
class Network:
    """A bridge with an address of this process, and hosts."""

    address: str
    hosts: list[Host] = field(default_factory=list)


def missing() -> str | None:
    """Return the reason why no namespace can be made here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "network namespaces need iproute2 (ip and tc)"
    try:
        with network(1):
            return None
    except RuntimeError as error:
        return f"no network namespaces here: {error}"


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Make a bridge and `count` hosts behind it. Raises RuntimeError where that is not allowed."""
    tag = f"byol{secrets.token_hex(3)}"  # a device's name has at most 15 characters
    addresses = _free_addresses(count + 1)
    with contextlib.ExitStack() as stack:
        _run("ip", "link", "add", tag, "type", "bridge")
        stack.callback(_try, "ip", "link", "del", tag)
        _run("ip", "addr", "add", f"{addresses[-1]}/24", "dev", tag)
        _run("ip", "link", "set", tag, "up")
        made = Network(addresses[-1])
        for number in range(count):
            host = Host(f"{tag}-{number}", f"{tag}-{number}", addresses[number])
            _run("ip", "netns", "add", host.name)
            stack.callback(_try, "ip", "netns", "del", host.name)
            inside = ["ip", "-n", host.name]
            peer = ["peer", "name", "eth0", "netns", host.name]
            _run("ip", "link", "add", host.link, "type", "veth", *peer)
            stack.callback(_try, "ip", "link", "del", host.link)  # the kernel would take a while
            _run("ip", "link", "set", host.link, "master", tag, "up")
            _run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run(*inside, "link", "set", device, "up")
            made.hosts.append(host)
        yield made


@contextlib.contextmanager
def listening(host: Host) -> Iterator[int]:
    """Answer connections on a host during the block, at the port that is yielded."""
    program = (
        "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True)\n"
        "while True: s.accept()[0].close()"
    )
    command = [*host.enter, sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def reaches(host: Host, address: str, port: int) -> bool:
    """Return whether a host gets a connection within three seconds."""
    program = f"import socket; socket.create_connection(('{address}', {port}), 3)"
    command = [*host.enter, sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _free_addresses(count: int) -> list[str]:
    """Return addresses of a private network that this machine has no part in."""
    known = json.loads(_run("ip", "-j", "-4", "addr"))
    taken = [
        ipaddress.ip_interface(f"{a['local']}/{a['prefixlen']}").network
        for device in known
        for a in device["addr_info"]
    ]
    for third in range(255):
        free = ipaddress.ip_network(f"10.213.{third}.0/24")
        if not any(free.overlaps(other) for other in taken):
            return [str(free[number]) for number in range(1, count + 1)]
    raise RuntimeError("no private network is free")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _try(*command: str) -> None:
    with contextlib.suppress(RuntimeError):
        _run(*command)
