"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file

from tests.helpers.places import ROOT

README = (ROOT / "README.md").read_text()


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


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= anchors


def test_named_files_exist() -> None:
    for name in set(re.findall(r"(?:launch|recipes|tests|shards|engine)/[\w/]+\.py", README)):
        assert (ROOT / name).exists(), name
