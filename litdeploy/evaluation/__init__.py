"""How good a network is: its task's metric, retrieval, image quality, and what compression and export cost."""

from litdeploy.evaluation.evaluate import evaluate, evaluate_retrieval
from litdeploy.evaluation.quality import evaluate_quality

__all__ = ["evaluate", "evaluate_quality", "evaluate_retrieval"]
