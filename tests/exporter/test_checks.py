from __future__ import annotations

from typing import Any

import pytest

import litdeploy
from litdeploy.config.target import Target
from litdeploy.errors import SettingsError
from litdeploy.storage.bundle import Bundle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ("fp8",)}, "--precision fp8: no such precision"),
        ({"precisions": ()}, "no precision was given"),
        ({"precisions": ("fp32", "bf16"), "target": "t4"}, r"t4 \(compute capability 7.5\) lacks it"),
        ({"aoti": True, "precisions": ("int8",)}, "--aoti has no int8; it has fp32, fp16, bf16"),
        ({"io_precision": "int8"}, "--io-precision int8"),
        ({"compute_capabilities": ("8.6",)}, "--compute-capability is for TensorRT, .*Add --trt"),
        ({"version_compatible": True}, "--version-compatible is for TensorRT"),
        ({"hardware_compatibility": "ampere-plus"}, "--hardware-compatibility is for TensorRT"),
        ({"hardware_compatibility": "all"}, "Write none, ampere-plus, same-compute-capability"),
    ],
)
def test_what_cannot_be_had_is_refused(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        litdeploy.export(bundle, **{"target": Target(device="cpu", batch_sizes=(1, 16)), **options})
    assert bundle.read().artefacts == {}
    assert not bundle.export_path.exists() or not list(bundle.export_path.iterdir())
