"""The student in production form: exported, verified against PyTorch, entered in the bundle."""

from litdeploy.exporter.export import export

__all__ = ["export"]
