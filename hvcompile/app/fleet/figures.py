"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Figures:
    """Counters of a server, in a registry of their own.

    Args:
        num_queued: tells how many videos wait.
        num_running: tells how many are being made.

    """

    def __init__(self, num_queued: Callable[[], float], num_running: Callable[[], float]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()

        def of(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(f"hvcompile_{name}", text, labels, registry=self._registry, **more)

        buckets = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
        self.ended = of(Counter, "videos", "Videos that have ended, by what became of them.", "status")
        self.refused = of(Counter, "refused", "Requests that were refused, by status code.", "code")
        self.retried = of(Counter, "retried", "Videos that were begun again, since their replica broke.")
        self.steps = of(Counter, "steps", "Denoising steps, by whether they were reused.", "kind")
        self.captures = of(Counter, "captures", "Steps of videos in which a graph was compiled, after the warm-up.")
        self.waited = of(Histogram, "wait_seconds", "From the request to the beginning.", buckets=buckets)
        self.made = of(Histogram, "make_seconds", "From the beginning to the end.", buckets=buckets)
        self._ranks: dict[str, int] = {}
        self._memory = of(Gauge, "resident_bytes", "Memory of a rank on the host.", "replica", "rank")
        of(Gauge, "queued", "Videos that wait.").set_function(num_queued)
        of(Gauge, "running", "Videos that are being made.").set_function(num_running)

    def remember(self, replica: str, memory: Sequence[int]) -> None:
        """Tell what each rank of a replica holds now, in bytes."""
        self.forget(replica)
        self._ranks[replica] = len(memory)
        for rank, amount in enumerate(memory):
            self._memory.labels(replica, str(rank)).set(amount)

    def forget(self, replica: str) -> None:
        """Tell no more of a replica that is gone."""
        for rank in range(self._ranks.pop(replica, 0)):
            self._memory.remove(replica, str(rank))

    def text(self) -> bytes:
        """All of them, as Prometheus' text format has it."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
