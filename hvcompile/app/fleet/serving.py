"""A server: Ray Serve with a gate and its makers, from its start until it is drained."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

from hvcompile.app.fleet import cluster
from hvcompile.app.fleet.asked import Limits
from hvcompile.app.fleet.cluster import Needs
from hvcompile.app.fleet.jobs import locked
from hvcompile.app.request.serve import Request
from hvcompile.errors import InputError, RunError

NAME = "hvcompile"
GATE = "Gate"
CLOSE_SECONDS = 10.0
"""For which the gate may take to forget what it holds."""
LOOK_SECONDS = 2.0
"""Between two looks of Ray Serve at the gate and the makers: for so long, one that died is missed at most."""
LOAD_SECONDS = 3600.0
"""For which all replicas may take to load and compile."""


@contextlib.contextmanager
def serving(request: Request, observe: Callable[[str], None] = lambda event: None) -> Iterator[Callable[[], int]]:
    """Serve what a request says, for as long as the block lasts.

    Args:
        request: what to serve.
        observe: told of phases.

    Yields:
        What drains the server: it takes no more, waits, and gives how many videos are left.

    Raises:
        InputError, OptionError: the request can't be met, or the port is taken.
        RunError: a model can't be loaded or a size can't be made.

    """
    request.check()
    _check_port(request.host, request.port)
    if request.store is not None and request.address is None:
        locked(request.store).close()  # the gate takes it; here its message is heard at once
    observe("starting Ray")
    with cluster.joined(request) as needs:
        from ray import serve

        if needs.room < request.replicas:
            observe(f"note: the cluster has room for {needs.room} of {request.replicas} replicas; they serve alone")
            request = dataclasses.replace(request, replicas=needs.room)

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of every deployment
        gate: Any = None
        try:
            serve.start(http_options={"host": request.host, "port": request.port}, proxy_location="HeadOnly")
            observe("loading and compiling")
            gate = _run(request, needs)
            yield lambda: int(gate.drain.remote(request.drain).result(timeout_s=request.drain + 30))
        finally:
            with contextlib.suppress(Exception):
                gate = gate or serve.get_deployment_handle(GATE, NAME)
                gate.close.remote().result(timeout_s=CLOSE_SECONDS)
            with contextlib.suppress(Exception):
                serve.shutdown()


def _run(request: Request, needs: Needs) -> Any:
    """Deploy, and wait until all is compiled; gives a handle of the gate."""
    import ray
    from ray import serve

    from hvcompile.app.fleet.gate import Gate
    from hvcompile.app.fleet.maker import Maker

    # The ranks have what they need by themselves.
    common: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "health_check_period_s": LOOK_SECONDS}
    maker = serve.deployment(Maker, num_replicas=request.replicas, max_ongoing_requests=1, **common).bind(
        request.base, request.ranks, needs, request.served
    )
    gate = serve.deployment(Gate, name=GATE, num_replicas=1, max_ongoing_requests=1000, **common).bind(
        maker,
        request.replicas,
        tuple(hashlib.sha256(key.encode()).hexdigest() for key in request.keys),
        Limits(
            model=request.model or "tiny-hunyuan-video",
            sizes=request.served,
            most_steps=request.most_steps,
            fps=request.fps,
        ),
        request.most_queued,
        request.timeout,
        request.keep,
        None if request.store is None else str(request.store.resolve()),
        request.base,
        request.ranks,
    )
    try:
        handle = serve.run(gate, name=NAME, route_prefix="/", blocking=False)
        handle.warm.remote().result(timeout_s=LOAD_SECONDS)
    except (ray.exceptions.RayError, RuntimeError, TimeoutError) as error:
        from hvcompile.app.pipelines import first_line  # which loads torch

        cause = getattr(error, "cause", None) or error
        raise RunError(f"the server can't start: {first_line(cause)}") from error
    return handle


def _check_port(host: str, port: int) -> None:
    """Raise InputError where nothing can listen there."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InputError(
            f"host {host!r}, port {port} can't be listened on ({error.strerror or error}): give another --port"
        ) from error
