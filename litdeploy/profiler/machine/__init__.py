"""The machine that measures: its description, its state during a measurement, its peak rates."""
