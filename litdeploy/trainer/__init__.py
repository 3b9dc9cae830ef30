"""The block trainer: LIT, and on the same loop the methods that it is measured against."""

from litdeploy.trainer.compress import compress
from litdeploy.trainer.loop import evaluate
from litdeploy.trainer.metrics import Progress
from litdeploy.trainer.train import Trained, train

__all__ = ["Progress", "Trained", "compress", "evaluate", "train"]
