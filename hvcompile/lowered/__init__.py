"""A call of a model compiled for a GPU that is not there, and what the compiled code would do on it."""
