"""The trainer: LIT, and on the same loop the methods that it is compared with. The loop is in `trainer.py`."""

from litdeploy.trainer.compress import compress
from litdeploy.trainer.progress import Callback, Progress
from litdeploy.trainer.train import Trained, train
from litdeploy.trainer.trainer import Trainer
from litdeploy.trainer.validation import evaluate

__all__ = ["Callback", "Progress", "Trained", "Trainer", "compress", "evaluate", "train"]
