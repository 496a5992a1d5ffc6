"""``python -m hvcompile``: the command line."""

from hvcompile.cli import app

app(prog_name="hvcompile")
