"""Files of a run: locks, checkpoints, the bundle and its records."""
