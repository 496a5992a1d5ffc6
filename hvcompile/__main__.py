"""``python -m hvcompile``: the command line."""

from hvcompile.app.cli import app

app(prog_name="hvcompile")
