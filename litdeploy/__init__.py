"""litdeploy makes a trained deep network shallower by LIT, exports it, verifies it and measures the gain.

The public functions, imported on first use; each command of the command line calls the one of its name:

    load(file, ...)                 → Network           weights read, network recognized
    train(network, ...)             → Trained           a teacher, from new weights
    compress(teacher, ...)          → Bundle            a shallower student, trained
    export(bundle, ...)             → Manifest          ONNX, AOTInductor, TensorRT, compared with PyTorch
    export(network, out=..., ...)   → Exports           the same of a network that nobody compressed
    verify(bundle, ...)             → Verification      exported files and student, each compared with its origin
    save_pretrained(bundle, folder) → Path              a folder that transformers and sentence-transformers load
    profile(bundle, ...)            → Report            teacher and student timed in every runner
    deploy(teacher, ...)            → (Bundle, Report)  compress, export and profile
    demo(folder, ...)               → (Bundle, Report)  all stages on scikit-learn's digits

    predict(teacher, depths, ...)   → Prediction        students of several depths timed before any is trained
    diff(a, b)                      → ReportDiff        two reports compared
    compare(teacher, ...)           → MethodComparison  methods compared over depths and seeds
    evaluate(file, ...)             → Score             accuracy of weights or of an exported file
    evaluate_retrieval(file, ...)   → Retrieval, ...    how well embeddings find images of their class
    evaluate_quality(file, ...)     → Judged            FID and Inception score of a generator
    inspect(file, ...)              → FoundNetwork, ... which network a file holds, and the possible depths
    pack(source, out, ...)          → Packing           a dataset as one file
    schema()                        → dict              the JSON Schema of report.json

    Callback()                      → Callback          what a training calls: subclass it, for `callbacks=[…]`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from litdeploy.version import __version__ as __version__

if TYPE_CHECKING:
    from litdeploy.comparison.comparison import compare as compare
    from litdeploy.data.pack import pack as pack
    from litdeploy.evaluation.evaluate import evaluate as evaluate
    from litdeploy.evaluation.evaluate import evaluate_retrieval as evaluate_retrieval
    from litdeploy.evaluation.quality import evaluate_quality as evaluate_quality
    from litdeploy.evaluation.verify import verify as verify
    from litdeploy.exporter.export import export as export
    from litdeploy.inspection import inspect as inspect
    from litdeploy.networks.load import load as load
    from litdeploy.pipeline import demo as demo
    from litdeploy.pipeline import deploy as deploy
    from litdeploy.pretrained import save_pretrained as save_pretrained
    from litdeploy.profiler.analysis.diff import compare_reports as diff
    from litdeploy.profiler.predict import predict as predict
    from litdeploy.profiler.profile import profile as profile
    from litdeploy.profiler.schema import report_schema as schema
    from litdeploy.trainer.compress import compress as compress
    from litdeploy.trainer.progress import Callback as Callback
    from litdeploy.trainer.train import train as train

# Function → where it is.
_PLACES = {
    "Callback": "litdeploy.trainer:Callback",
    "compare": "litdeploy.comparison:compare",
    "compress": "litdeploy.trainer:compress",
    "demo": "litdeploy.pipeline:demo",
    "deploy": "litdeploy.pipeline:deploy",
    "diff": "litdeploy.profiler:compare_reports",
    "evaluate": "litdeploy.evaluation:evaluate",
    "evaluate_quality": "litdeploy.evaluation:evaluate_quality",
    "evaluate_retrieval": "litdeploy.evaluation:evaluate_retrieval",
    "export": "litdeploy.exporter:export",
    "inspect": "litdeploy.inspection:inspect",
    "load": "litdeploy.networks:load",
    "pack": "litdeploy.data:pack",
    "predict": "litdeploy.profiler:predict",
    "profile": "litdeploy.profiler:profile",
    "save_pretrained": "litdeploy.pretrained:save_pretrained",
    "schema": "litdeploy.profiler.schema:report_schema",
    "train": "litdeploy.trainer:train",
    "verify": "litdeploy.evaluation.verify:verify",
}
__all__ = [
    "Callback",
    "compare",
    "compress",
    "demo",
    "deploy",
    "diff",
    "evaluate",
    "evaluate_quality",
    "evaluate_retrieval",
    "export",
    "inspect",
    "load",
    "pack",
    "predict",
    "profile",
    "save_pretrained",
    "schema",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, _, function = _PLACES[name].partition(":")
        return getattr(import_module(module), function)
    raise AttributeError(f"module 'litdeploy' has no attribute '{name}'")
