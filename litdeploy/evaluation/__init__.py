"""How good a network is: accuracy, likeness to its teacher, retrieval, and what compressing and exporting cost."""

from litdeploy.evaluation.evaluate import evaluate, evaluate_retrieval
from litdeploy.evaluation.quality import evaluate_quality

__all__ = ["evaluate", "evaluate_quality", "evaluate_retrieval"]
