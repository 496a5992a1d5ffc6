"""``hvcompile tune``: settings of the cache, tried on a pipeline's own clips, and the choice among them."""
