"""What a run is told: the recipe, the target and the network's spec, checked as they are read."""
