"""Files: locks, checkpoints in and out, the bundle and the records that it is made of."""
