"""The trunk: the repeated blocks of a captured graph, found and outlined as calls of shared bodies."""
