"""What the measurements mean: sections, fidelity, diagnosis, verdict, limits, two reports compared."""
