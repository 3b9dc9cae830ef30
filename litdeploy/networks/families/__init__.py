"""Network families that are recognized from their weights. One file per family."""
