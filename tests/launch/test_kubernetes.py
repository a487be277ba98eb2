"""launch/kubernetes.yaml and launch/Dockerfile: that their parts fit each other, torchrun and us.

Neither a cluster nor a builder of images was at hand: what they make of it was not tried.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser

from tests.helpers.places import ROOT
from tests.helpers.recipes import parse_recipe

pytestmark = pytest.mark.versions

LAUNCH = ROOT / "launch"
MANIFEST = LAUNCH / "kubernetes.yaml"
TORCHRUN = f"#!{sys.executable} -S\nimport json, sys; print(json.dumps(sys.argv[1:]))\n"
TORCH_STOPS = 30  # seconds that torchrun, when others join, gives its workers, whatever it is told

Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    """The manifest, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def job(documents: dict[str, Document]) -> Document:
    found: Document = documents["Job"]["spec"]
    return found


@pytest.fixture(scope="module")
def pod(job: Document) -> Document:
    found: Document = job["template"]["spec"]
    return found


@pytest.fixture(scope="module")
def container(pod: Document) -> Document:
    (found,) = pod["containers"]
    assert isinstance(found, dict)
    return found


def started(container: Document, folder: Path, index: int) -> tuple[Namespace, LaunchConfig]:
    """What torchrun is told in a pod of this index: its arguments, and what it makes of them."""
    file = folder / "torchrun"
    file.write_text(TORCHRUN)
    file.chmod(0o755)
    done = subprocess.run(
        container["command"],
        env={"PATH": f"{folder}:{os.defpath}", "JOB_COMPLETION_INDEX": str(index)},
        capture_output=True,
        check=True,
        timeout=60,
    )
    arguments = get_args_parser().parse_args(json.loads(done.stdout))
    assert arguments.nproc_per_node == "gpu"
    arguments.nproc_per_node = "1"  # there is none here
    config, _, _ = config_from_args(arguments)
    return arguments, config


def test_pods_meet_at_the_first(
    documents: dict[str, Document],
    job: Document,
    pod: Document,
    container: Document,
    tmp_path: Path,
) -> None:
    service, name = documents["Service"], documents["Job"]["metadata"]["name"]
    labels = job["template"]["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= labels.items()
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["completionMode"] == "Indexed"
    for index in range(job["completions"]):
        _, config = started(container, tmp_path, index)
        host, port = config.rdzv_endpoint.split(":")
        assert host == f"{name}-0.{pod['subdomain']}"
        assert 1024 <= int(port) < 32768
        assert config.rdzv_backend == "c10d"
        assert config.run_id == name
        assert config.rdzv_configs["is_host"] == str(int(index == 0))


def test_any_number_of_pods_trains(job: Document, container: Document, tmp_path: Path) -> None:
    _, config = started(container, tmp_path, 0)
    assert config.min_nodes == 1
    assert config.max_nodes == job["completions"] == job["parallelism"]
    assert config.max_restarts > 0
    assert {"SIGTERM", "SIGINT"} < set(config.signals_to_handle.split(","))
    assert environment(container)["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_torch_knows_the_rendezvous_settings(container: Document, tmp_path: Path) -> None:
    """It ignores those that it does not know."""
    _, config = started(container, tmp_path, 0)
    parameters = RendezvousParameters("c10d", "localhost:0", "x", 1, 1, **config.rdzv_configs)
    backend, store = create_backend(parameters)
    settings = create_handler(store, backend, parameters).settings
    assert config.rdzv_configs.pop("timeout")  # torchrun's own
    given = {name: timedelta(seconds=int(value)) for name, value in config.rdzv_configs.items()}
    assert store.timeout == given.pop("read_timeout")  # type: ignore[attr-defined]
    assert settings.timeout.last_call == given.pop("last_call_timeout")
    assert settings.keep_alive_interval == given.pop("keep_alive_interval")
    assert given.keys() == {"is_host"}
    # As the manifest's head says of pods that die unannounced.
    assert settings.keep_alive_max_attempt == 3


def test_who_is_told_to_stop_has_time_to_save(
    pod: Document, container: Document, tmp_path: Path
) -> None:
    arguments, _ = started(container, tmp_path, 0)
    recipe = parse_recipe(arguments.training_script_args)
    shutdown = int(environment(container)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert recipe.checkpoint.grace < min(shutdown, TORCH_STOPS)
    assert shutdown < pod["terminationGracePeriodSeconds"]
    assert pod["shareProcessNamespace"] is True


def test_a_pod_that_left_comes_back(job: Document, pod: Document) -> None:
    assert pod["restartPolicy"] == "Never"  # as both of these need
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "Ignore"
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimitPerIndex"] > 0
    assert job["podReplacementPolicy"] == "Failed"
    assert job["successPolicy"]["rules"] == [{"succeededIndexes": "0"}]


def test_no_secret_and_nothing_of_the_machine(
    documents: dict[str, Document], pod: Document, container: Document
) -> None:
    assert documents.keys() == {"Service", "NetworkPolicy", "Job"}
    (source,) = container["envFrom"]
    assert source["secretRef"]["name"]
    known = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    assert environment(container).keys() == known
    assert [set(volume) for volume in pod["volumes"]] == [{"name", "emptyDir"}]
    (mount,) = container["volumeMounts"]
    assert (mount["name"], mount["mountPath"]) == (pod["volumes"][0]["name"], "/dev/shm")


def test_strangers_do_not_reach_the_store(documents: dict[str, Document], job: Document) -> None:
    labels = job["template"]["metadata"]["labels"]
    policy = documents["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]


def test_the_image_holds_what_pods_run(container: Document, tmp_path: Path) -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (\S+) \1$", text, re.MULTILINE))
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.removesuffix("*") for pattern in patterns}
    assert copied == packages
    arguments, _ = started(container, tmp_path, 0)
    for path in (arguments.training_script, arguments.training_script_args[0]):
        assert (LAUNCH.parent / path).is_file()
        assert Path(path).parts[0] in copied
    assert 'ENTRYPOINT ["torchrun"]' in text


def environment(container: Document) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}
