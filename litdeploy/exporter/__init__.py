"""The student in production form: exported, held against PyTorch, entered in the bundle."""

from litdeploy.exporter.exporter import export
from litdeploy.exporter.forms import FORMS
from litdeploy.exporter.onnx import export_onnx
from litdeploy.exporter.parity import BatchParity, Parity, TaskAccuracy

__all__ = [
    "FORMS",
    "BatchParity",
    "Parity",
    "TaskAccuracy",
    "export",
    "export_onnx",
]
