from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from litdeploy.errors import RunnerError
from litdeploy.runtime.providers import check_placement


def test_what_is_computed_elsewhere_is_an_error(onnx_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
    check_placement(session, "CPUExecutionProvider", onnx_path)
    with pytest.raises(RunnerError, match=r"with the CUDAExecutionProvider: \d+ \w*Conv on CPUExecutionProvider"):
        check_placement(session, "CUDAExecutionProvider", onnx_path)
