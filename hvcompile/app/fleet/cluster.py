"""A Ray cluster: one that is there, or one of this process's own, which ends with it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hvcompile.app.request.fleet import Fleet
from hvcompile.errors import InputError

PASSED_ON = (
    "HVCOMPILE_STRICT",
    "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_LOGS",
    "TRITON_INTERPRET",
)
"""Variables that ranks are given as they are here."""
HEAD_SECONDS = 10
"""For which the processes of a Ray of this one's own look for a head that is gone, until they end; by default 60.

Where this process itself is killed, ranks end within about 3 s: each looks every second whether its raylet is there.
Two agents of Ray's own, which compute nothing, try for 60 s to tell of it before they end; nothing sets that.
"""


TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
"""Variables that hold, or lead to, what Ray's processes have to know of each other to be answered.

From 2.52 on, Ray can ask for it, and from 2.59 on it does in a cluster of one's own. Where there is none it makes one,
in ``~/.ray/auth_token``, and then every ``ray start`` of the same user asks for that. So a Ray of this process's own
gets one of its own.
"""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a rank needs of its machine, and the environment that it runs in.

    Attributes:
        cpus: cores.
        gpus: 0 or 1.
        environment: variables.
        room: how many of the replicas that were asked for the machines have room for, whoever else uses them.

    """

    cpus: int
    gpus: int
    environment: dict[str, str]
    room: int = 1

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray's placement groups have it."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}


@contextlib.contextmanager
def joined(fleet: Fleet, **init: Any) -> Iterator[Needs]:
    """Connect to Ray, or start it here; at the end, let go of it. Gives what a rank needs.

    Args:
        fleet: how many replicas and ranks.
        init: more arguments of ``ray.init``.

    Raises:
        InputError: there is no cluster at the address, or not room enough in it.

    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    if fleet.address is None:
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEAD_SECONDS))
        if not TOKENS & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        if "ray" not in sys.modules:  # it reads this once
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    was_there = ray.is_initialized()
    if not was_there:
        _connect(fleet, init)
    try:
        yield _needs(fleet, is_ours=fleet.address is None and not was_there)
    finally:
        if not was_there:
            ray.shutdown()


def _connect(fleet: Fleet, init: dict[str, Any]) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False} | init
    try:
        with _own_signals():
            if fleet.address is None:
                room = max(os.cpu_count() or 1, fleet.replicas * fleet.ranks * fleet.cpus + 2)
                ray.init(address="local", num_cpus=room, include_dashboard=False, **quiet)
            else:
                _check_answers(fleet.address)
                ray.init(address=fleet.address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        from hvcompile.app.pipelines import first_line  # which loads torch, and makers and the gate do without

        raise InputError(f"{_where(fleet.address)}: {first_line(error)}; {_advice(fleet.address)}") from error


def _where(address: str | None) -> str:
    return "Ray can't be started here" if address is None else f"address {address!r} has no Ray cluster to join"


def _advice(address: str | None) -> str:
    """What to do where there is no cluster, or it answers but has not let this process in."""
    start = "start one with ray start --head, or leave address out"
    if address is None or not address.rpartition(":")[2].isdecimal() or not _answers(address):
        return start
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return (
            "RAY_AUTH_MODE is token: see that RAY_AUTH_TOKEN, or ~/.ray/auth_token, holds the token that the cluster "
            "was started with"
        )
    return (
        "if it asks for a token, as Ray does where ~/.ray/auth_token was there when it was started, set "
        "RAY_AUTH_MODE=token, and have its token in that file or in RAY_AUTH_TOKEN"
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Within, Ray may take SIGTERM for itself; after, it is whose it was.

    Ray's handler ends the processes of Ray first, which this one then dies of, by SIGABRT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray leaves signals alone there, and so must we
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # nothing but that handler raises it
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_answers(address: str) -> None:
    """Raise ConnectionError where nobody listens at a host and port: Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from error


def _answers(address: str) -> bool:
    try:
        _check_answers(address)
    except ConnectionError:
        return False
    return True


def _needs(fleet: Fleet, *, is_ours: bool) -> Needs:
    """What a rank needs; raises InputError where the machines can't have as many."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(machine.get("GPU", 0) for machine in machines)
    if fleet.device == "cuda" and not has_gpus:
        raise InputError("device 'cuda' is nowhere in the cluster: give cpu, or add machines with GPUs")
    threads = os.environ.get("OMP_NUM_THREADS", str(fleet.cpus))
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    needs = Needs(
        cpus=fleet.cpus,
        gpus=int(has_gpus and fleet.device != "cpu"),
        environment={**environment, "OMP_NUM_THREADS": threads},
    )
    room = sum(
        min(int(machine.get(name, 0) // (amount * fleet.ranks)) for name, amount in needs.bundle.items())
        for machine in machines
    )
    if room < fleet.replicas and (is_ours or not room):
        what = "GPUs" if needs.gpus else "CPU cores"
        raise InputError(
            f"there is room for {room} replicas of {fleet.ranks} ranks on a machine each ({what} of {len(machines)} "
            f"machines): give fewer replicas than {fleet.replicas}, or fewer ranks"
        )
    return dataclasses.replace(needs, room=min(room, fleet.replicas))
