"""What is still to be made, and which of it a replica takes next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from hvcompile.app.request.batch import Line


@dataclass(eq=False, kw_only=True)
class Task:
    """A line that is to be made: how often it was tried, by which replicas, and why it failed last."""

    line: Line
    attempts: int = 0
    tried: set[int] = field(default_factory=set)
    reason: str = ""

    @property
    def shape(self) -> str:
        """The same for all that one compiled graph serves."""
        return self.line.ask.shape


class Todo:
    """Tasks that wait; those of one shape go together, so that a replica compiles as seldom as can be."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = list(tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """Have a task wait once more, first of all."""
        self._tasks.insert(0, task)

    def take(self, replica: int, shape: str | None, others: Collection[str], replicas: Collection[int]) -> Task | None:
        """Give a replica its next task.

        Args:
            replica: its number.
            shape: that it has compiled; None for none.
            others: the shapes that other replicas are at.
            replicas: the numbers of all that are there, or are sure to come. What failed on one waits for another.

        Returns:
            A task of the shape that it has, else of the one that waits most and nobody is at, else of the one that
            waits most; None where nothing is left for it.

        """
        fit = [task for task in self._tasks if replica not in task.tried or not set(replicas) - task.tried]
        if not fit:
            return None
        counts = Counter(task.shape for task in fit)
        if shape not in counts:
            free = {name: count for name, count in counts.items() if name not in others}
            shape = max(free or counts, key=counts.__getitem__)
        task = next(task for task in fit if task.shape == shape)
        self._tasks.remove(task)
        return task
