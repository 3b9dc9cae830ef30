"""Settings of a run, validated when read: recipe, target, the network's spec and the table of export formats."""
