"""The version, below every other module: what the package writes into its files names it."""

__version__ = "0.1.0"
