"""``python -m hvcompile``: the command line."""

import sys

try:
    from hvcompile.app.cli import app

    app(prog_name="hvcompile")
except KeyboardInterrupt:  # before the command line can catch it
    sys.stderr.write("stopped\n")
    sys.exit(130)
