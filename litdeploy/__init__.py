"""litdeploy makes a trained deep network shallower by LIT, exports it, verifies it and measures what it gained.

The public verbs, imported when they are first used:

    load(file, ...)            → Network      weights in, network recognised
    compress(teacher, ...)     → Bundle       a shallower student, trained
    export(bundle, ...)        → Manifest     ONNX, held against PyTorch
    profile(bundle, ...)       → Report       teacher and student in every runner
    predict(teacher, ...)      → Prediction   students of several depths in every runner, before they are trained
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from litdeploy.version import __version__ as __version__

if TYPE_CHECKING:
    from litdeploy.exporter.exporter import export as export
    from litdeploy.networks.load import load as load
    from litdeploy.profiler.predict import predict as predict
    from litdeploy.profiler.profile import profile as profile
    from litdeploy.trainer.compress import compress as compress

_VERBS = {
    "load": "litdeploy.networks",
    "compress": "litdeploy.trainer",
    "export": "litdeploy.exporter",
    "predict": "litdeploy.profiler",
    "profile": "litdeploy.profiler",
}
__all__ = ["compress", "export", "load", "predict", "profile"]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'litdeploy' has no attribute '{name}'")
