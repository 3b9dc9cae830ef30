from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.errors import NetworkError
from litdeploy.recipe import read_recipe
from litdeploy.trainer.start import load_teacher

_CODE = """
from pathlib import Path
from litdeploy.networks.resnet import resnet

def build():
    Path("was-run").touch()
    return resnet(8)
"""


@pytest.mark.parametrize("name", ["recipe_code:build", "recipe_code:build,depth=8"])
def test_a_recipe_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe_code.py").write_text(_CODE)
    (tmp_path / "a.yaml").write_text(f"network: {name}\n")
    with pytest.raises(NetworkError, match=f"run only when you name it: --network {name}"):
        load_teacher(teacher_path, read_recipe("a.yaml"), None)
    assert not (tmp_path / "was-run").exists()


def test_a_recipe_names_one_of_our_networks(tmp_path: Path, teacher_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("network: resnet14\n")
    network, record = load_teacher(teacher_path, read_recipe(tmp_path / "a.yaml"), None)
    assert network.spec.name == "resnet"
    assert record is not None
