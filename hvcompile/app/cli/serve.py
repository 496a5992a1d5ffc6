"""``hvcompile serve``."""

from __future__ import annotations

import signal
import threading

import typer
from rich.text import Text

from hvcompile.app import extras, quiet, store
from hvcompile.app.cli.console import err, leaving, out
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.serve import KEYS, Request


@taking(Request)
def serve(request: Request) -> None:
    """Serve MODEL over HTTP, as clients of OpenAI's videos know it, by several replicas on Ray.

    The environment variable HVCOMPILE_API_KEYS holds the keys of clients, with commas between. Ctrl-C, or SIGTERM,
    takes no more requests, and waits until those that were taken are done.
    """
    store.use_own()
    with leaving():
        extras.require("hvcompile serve", "cli", "diffusers", "ray")
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app.fleet import serving

        quiet.hide_progress_bars()
        left = 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # while it loads, that ends it, and all it has begun
        with serving.serving(request, lambda event: err.print(Text(event))) as drain:
            stopped = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopped.set())
            out.print(Text(f"serving at http://{request.host}:{request.port}/v1/videos"), soft_wrap=True)
            if not request.keys:
                err.print(Text(f"note: {KEYS} is not set, so whoever reaches this address may use it"), soft_wrap=True)
            stopped.wait()
            err.print(Text(f"draining, {request.drain:g} s at most; another Ctrl-C ends it at once"), soft_wrap=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            left = drain()
    if left:
        err.print(Text(f"error: {left} videos were not made in time"), soft_wrap=True)
        raise typer.Exit(1)
