"""Dumps: the graphs of a compilation as Python that runs, read back, and searched for the step that went wrong."""
