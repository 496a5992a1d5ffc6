"""What a user may ask for: a dataclass a command, whose fields are the parameters of the command line.

These modules are quick to import, for ``--help``: what takes seconds is imported by the checks that need it.
"""
