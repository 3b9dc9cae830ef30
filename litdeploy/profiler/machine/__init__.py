"""The machine that measures: its description, its conditions meanwhile, its ceilings."""
