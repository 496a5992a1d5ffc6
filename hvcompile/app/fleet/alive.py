"""Whether another actor of a server is alive: makers look after the gate whose video they make, and it after them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

LOOK_SECONDS = 1.0
"""Between two looks at one."""
ANSWER_SECONDS = 5.0
"""For which one may take to answer. One that is only slow is not gone."""


@dataclass(frozen=True)
class Presence:
    """An actor, as another one knows it: a name that no other has, and its handle; None where there is no Ray."""

    name: str
    actor: Any = None


def own() -> Presence:
    """The actor that this runs in."""
    import ray

    if not ray.is_initialized():
        return Presence("here")
    context = ray.get_runtime_context()
    return Presence(str(context.get_actor_id()), context.current_actor)


async def is_gone(presence: Presence) -> bool:
    """Whether Ray says that an actor has died, and does not begin it again under this handle."""
    import ray

    if presence.actor is None:
        return False
    try:
        await asyncio.wait_for(presence.actor.__ray_ready__.remote(), ANSWER_SECONDS)  # every actor has this method
    except ray.exceptions.RayActorError as error:
        return not isinstance(error, ray.exceptions.ActorUnavailableError)
    except (TimeoutError, ray.exceptions.RayError):
        pass  # whoever can't be asked now may be there
    return False


async def gone(presence: Presence) -> None:
    """Wait until an actor has died."""
    while not await is_gone(presence):
        await asyncio.sleep(LOOK_SECONDS)
