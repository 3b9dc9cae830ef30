"""Methods held against one another: the same teacher, data and epochs, over depths and seeds."""

from litdeploy.comparison.comparison import commands, compare
from litdeploy.comparison.grid import Cell, Grid
from litdeploy.comparison.result import MethodComparison

__all__ = ["Cell", "Grid", "MethodComparison", "commands", "compare"]
