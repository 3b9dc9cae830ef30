"""The student in production form: exported, held against PyTorch, entered in the bundle."""

from litdeploy.exporter.evaluate import evaluate, evaluate_retrieval
from litdeploy.exporter.exporter import export
from litdeploy.exporter.forms import FORMS
from litdeploy.exporter.onnx import export_onnx
from litdeploy.exporter.parity import BatchParity, Parity, TaskAccuracy
from litdeploy.exporter.quality import evaluate_quality

__all__ = [
    "FORMS",
    "BatchParity",
    "Parity",
    "TaskAccuracy",
    "evaluate",
    "evaluate_quality",
    "evaluate_retrieval",
    "export",
    "export_onnx",
]
