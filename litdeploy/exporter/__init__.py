"""The student in production form: exported, held against PyTorch, entered in the bundle."""

from litdeploy.exporter.exporter import export
from litdeploy.exporter.forms import FORMS
from litdeploy.exporter.onnx import export_onnx

__all__ = [
    "FORMS",
    "export",
    "export_onnx",
]
