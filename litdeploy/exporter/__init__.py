"""The student in production form: exported, held against PyTorch, entered in the bundle."""

from litdeploy.exporter.evaluate import evaluate
from litdeploy.exporter.exporter import export
from litdeploy.exporter.onnx import export_onnx
from litdeploy.exporter.verify import BatchParity, Parity, verify

__all__ = ["BatchParity", "Parity", "evaluate", "export", "export_onnx", "verify"]
