"""The one door of a server: it takes requests, keeps what was asked for, and hands it to whoever makes it.

It holds no model. ``Gate`` is a deployment of Ray Serve of one replica; that and ``Maker`` are all that there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import itertools
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from hvcompile.app.fleet import alive, jobs
from hvcompile.app.fleet.alive import Presence
from hvcompile.app.fleet.asked import MOST_BYTES, Limits, asked, listing, queried
from hvcompile.app.fleet.figures import Figures
from hvcompile.app.fleet.jobs import COMPLETED, QUEUED, RUNNING, Job, Jobs, shown
from hvcompile.app.fleet.thread import MADE, STOPPED, Outcome
from hvcompile.app.request.ask import Ask, identity
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.serve import Size, is_loopback
from hvcompile.errors import InputError, OutputError, one_line

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
"""How often a video is begun, where its replica breaks."""
EXPIRE_SECONDS = 10.0
"""How often videos that were kept long enough, and makers that are gone, are looked for."""
RETRY_SECONDS = 5
"""After which clients are told to come back."""
BODY_SECONDS = 30.0
"""For which a client may take to send what it asks for."""
BASE = "/v1/videos"
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
    "Cache-Control": "no-store",
}
"""Headers of every answer: nothing in it is ever to be read as a page."""


class _Refusal(Exception):  # noqa: N818
    """Ends a request with a status, a code and a message."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    def response(self) -> Response:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "code": self.code, "param": None}
        return JSONResponse({"error": error}, self.status, headers=SAFE | self.headers)


class Gate:
    """Answers clients, and has their videos made.

    Args:
        maker: a handle of the makers' deployment.
        num_makers: how many there are.
        keys: digests of the clients' keys, by SHA-256; none where everybody may come.
        limits: what may be asked for.
        most_queued: how many videos may wait.
        timeout: seconds that a video may take.
        keep: seconds for which one that has ended is kept.
        store: a directory for them; None for a temporary one.
        base: what all videos share; with ``ranks``, what a video that is found in the store must have been asked of.
        ranks: how many share a video.

    """

    def __init__(
        self,
        maker: Any,
        num_makers: int,
        keys: tuple[str, ...],
        limits: Limits,
        most_queued: int,
        timeout: float,
        keep: float,
        store: str | None,
        base: Clips,
        ranks: int,
    ) -> None:
        self._maker, self._keys, self._limits = maker, keys, limits
        self._most_queued, self._timeout, self._num_makers = most_queued, timeout, num_makers
        self._base, self._ranks = base, ranks
        self._folder = None if store else jobs.temporary()
        self._jobs = Jobs(self._folder or Path(store or ""), keep)
        self._queue: list[Job] = []
        self._running: dict[str, asyncio.Task[None]] = {}
        self._is_draining = False
        self._figures = Figures(lambda: len(self._queue), lambda: len(self._running))
        self._makers: dict[str, Presence] = {}
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._take_up()

    def _take_up(self) -> None:
        """Have what an earlier server left wait again, or say why it can't be made here."""
        for job in [job for job in self._jobs.known.values() if job.status == QUEUED]:
            if (reason := self._unserved(job)) is None:
                self._queue.append(job)
            else:
                log.warning("%s, asked for of model %r, is not made: %s", job.id, job.model, reason)
                self._fail(job, "not_served", f"the server was started anew, and {reason}: ask for the video again")

    def _unserved(self, job: Job) -> str | None:
        """Why a video that was asked of an earlier server would not be the same from this one; None where it is."""
        ask = job.ask
        size = Size(width=ask.width or 0, height=ask.height or 0, frames=ask.frames or 0)
        if job.model != self._limits.model:
            return "serves another model"
        if size not in self._limits.sizes:
            return f"serves {size} with {size.frames} frames no more"
        if (ask.steps or 0) > self._limits.most_steps:
            return f"serves {self._limits.most_steps} steps at most"
        return None if job.made_for == self._made_for(ask) else "makes videos by other settings than before"

    def _made_for(self, ask: Ask) -> str:
        return identity(ask, self._base, self._ranks)

    async def warm(self) -> bool:
        """Wait until every maker is loaded and compiled, and begin to hand out work."""
        await asyncio.gather(*(self._meet() for _ in range(self._num_makers)))  # each takes one call at a time
        self._begin()
        return True

    async def _meet(self) -> None:
        """Wait until a maker is loaded and compiled, and remember it."""
        maker = await self._maker.warm.remote()
        self._makers[maker.name] = maker

    async def drain(self, seconds: float) -> int:
        """Take no more, and wait until all is made, or the time is up; gives how many videos are left."""
        self._is_draining = True
        end = time.monotonic() + seconds
        while (self._queue or self._running) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        return len(self._queue) + len(self._running)

    async def close(self) -> None:
        """Forget all that was kept for this process alone: prompts and videos are nobody else's to find."""
        self._is_draining = True
        for loop in self._loops.values():
            loop.cancel()
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._jobs.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def __call__(self, request: HttpRequest) -> Response:
        """Answer a client."""
        self._begin()
        try:
            return await self._answer(request)
        except (_Refusal, InputError) as error:
            refusal = error if isinstance(error, _Refusal) else _Refusal(400, "invalid_request", one_line(error))
            self._figures.refused.labels(str(refusal.status)).inc()
            return refusal.response()
        except Exception as error:  # a client must not learn more of it
            log.warning("a request failed", exc_info=error)
            return _Refusal(500, "server_error", "the server failed at this request").response()

    async def _answer(self, request: HttpRequest) -> Response:
        path, method = request.url.path.rstrip("/"), request.method
        query = request.query_params.multi_items()
        if path in ("/livez", "/healthz", "/metrics") and method == "GET":
            queried(query)
            return self._told(path)
        self._check_site(request)
        owner = self._owner(request)
        if path == BASE and method == "GET":
            return self._list(query, owner)
        if path == BASE and method == "POST":
            queried(query)
            return await self._create(request, owner)
        if path == "/v1/models" and method == "GET":
            queried(query)
            model = {"id": self._limits.model, "object": "model", "owned_by": "hvcompile", "created": 0}
            return JSONResponse({"object": "list", "data": [model]}, headers=SAFE)
        identity, _, rest = path.removeprefix(f"{BASE}/").partition("/")
        if not path.startswith(f"{BASE}/") or (rest, method) not in {("", "GET"), ("", "DELETE"), ("content", "GET")}:
            raise _Refusal(404, "not_found", "there is nothing here")
        if queried(query, ("variant",) if rest else ()).get("variant", "video") != "video":
            raise _Refusal(400, "invalid_request", "variant is not served: allowed is video")
        job = self._jobs.find(identity, owner)
        if job is None:
            raise _Refusal(404, "not_found", "there is no such video")
        if method == "DELETE":
            return self._delete(job)
        return self._content(job) if rest else JSONResponse(shown(job), headers=SAFE)

    def _told(self, path: str) -> Response:
        """What whoever runs the server is told: whether its process lives, whether it is ready, and what it counts."""
        if path == "/metrics":
            return Response(self._figures.text(), media_type="text/plain; version=0.0.4", headers=SAFE)
        if path == "/livez":
            return JSONResponse({"status": "ok"}, headers=SAFE)
        status = "draining" if self._is_draining else "ok" if self._makers else "loading"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503, headers=SAFE)

    def _check_site(self, request: HttpRequest) -> None:
        """Where no key is asked for, refuse what a page in a browser may have sent.

        It comes from another site, or by a name of another site that was made to lead here.
        """
        if self._keys:
            return
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
        origin = request.headers.get("origin")
        is_foreign = origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())
        if not is_loopback(name.strip("[]")) or is_foreign or request.headers.get("sec-fetch-site") == "cross-site":
            message = "the request comes from another site, or by a name that is not this machine's own: without keys "
            raise _Refusal(403, "forbidden", message + "only programs on this machine are answered")

    def _owner(self, request: HttpRequest) -> str:
        """A digest of a client's key; every key is compared in full, whichever fits."""
        if not self._keys:
            return ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        fits = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(fits):
            raise _Refusal(401, "invalid_api_key", "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})
        return digest[:32]

    async def _create(self, request: HttpRequest, owner: str) -> Response:
        if self._is_draining:
            raise _Refusal(503, "draining", "the server is about to stop", {"Retry-After": "60"})
        body = await self._body(request)
        ask = asked(body, request.headers.get("content-type", ""), self._limits)
        if len(self._queue) >= self._most_queued:
            message = f"{len(self._queue)} videos wait, the most that may: come back later"
            raise _Refusal(429, "queue_full", message, {"Retry-After": str(RETRY_SECONDS)})
        try:
            job = self._jobs.create(ask, owner, self._limits.model, self._made_for(ask))
        except OutputError as error:
            raise _Refusal(507, "disk_full", "the server can't keep more videos") from error
        self._queue.append(job)
        return JSONResponse(shown(job), headers=SAFE)

    async def _body(self, request: HttpRequest) -> bytes:
        """What a client sends, within the limits of size and time."""
        if not request.headers.get("content-length", "0").isdecimal():
            raise _Refusal(400, "invalid_request", "the content length is no number")
        if int(request.headers.get("content-length", "0")[:20]) > MOST_BYTES:
            raise _Refusal(413, "too_large", f"the body has over {MOST_BYTES} bytes")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise _Refusal(415, "compressed", "a body that is compressed is not read")
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > MOST_BYTES:
                        raise _Refusal(413, "too_large", f"the body has over {MOST_BYTES} bytes")
        except TimeoutError as error:
            raise _Refusal(408, "too_slow", f"the body took over {BODY_SECONDS:g} s") from error
        return body

    def _list(self, query: Sequence[tuple[str, str]], owner: str) -> Response:
        wanted = listing(query)
        found = list(self._jobs.of(owner))
        if wanted.is_ascending:
            found.reverse()
        if wanted.after is not None:
            place = next((place for place, job in enumerate(found) if job.id == wanted.after), None)
            if place is None:
                raise InputError("after is no video that is there: begin the list anew")
            found = found[place + 1 :]
        data = [shown(job) for job in found[: wanted.limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        has_more = len(found) > wanted.limit
        return JSONResponse({"object": "list", "data": data, "has_more": has_more, **ends}, headers=SAFE)

    def _content(self, job: Job) -> Response:
        if job.status != COMPLETED:
            raise _Refusal(409, "not_ready", f"the video is {job.status}")
        place = self._jobs.place(job)
        if not place.is_file():
            raise _Refusal(410, "gone", "the video's file is gone")
        kind = "video/mp4" if job.suffix == ".mp4" else "image/png"
        return FileResponse(place, media_type=kind, headers=SAFE)

    def _delete(self, job: Job) -> Response:
        """Forget a video; one that is being made is stopped after the step that it is at."""
        if job in self._queue:
            self._queue.remove(job)
        if task := self._running.get(job.id):
            task.cancel()
        self._jobs.delete(job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True}, headers=SAFE)

    def _begin(self) -> None:
        """Have both loops run, in the loop of whoever calls first, and again should one have failed."""
        for loop in (self._hand_out, self._look_after):
            task = self._loops.get(loop.__name__)
            if task is None or task.done():
                self._loops[loop.__name__] = asyncio.create_task(loop())

    async def _hand_out(self) -> None:
        """Begin the oldest video that waits whenever a maker is free."""
        while True:
            while self._queue and len(self._running) < self._num_makers:
                job = self._queue.pop(0)
                task = self._running[job.id] = asyncio.create_task(self._run(job))
                # Not in the task itself: one that is cancelled before its first turn never runs.
                task.add_done_callback(functools.partial(self._ended, job))
            await asyncio.sleep(0.02)

    async def _look_after(self) -> None:
        """Forget what was kept long enough, and makers that are gone, and get to know those in their place."""
        meeting: asyncio.Task[None] | None = None
        try:
            while True:
                self._jobs.expire()
                makers = list(self._makers.values())
                are_gone = await asyncio.gather(*map(alive.is_gone, makers))
                for maker in itertools.compress(makers, are_gone):
                    self._makers.pop(maker.name, None)
                    self._figures.forget(maker.name)
                if meeting is not None and meeting.done() and (error := meeting.exception()) is not None:
                    log.warning("a maker can't load: %s", one_line(error))
                if len(self._makers) < self._num_makers and (meeting is None or meeting.done()):
                    meeting = asyncio.create_task(self._meet())
                await asyncio.sleep(EXPIRE_SECONDS)
        finally:
            if meeting is not None:
                meeting.cancel()

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        self._running.pop(job.id, None)
        if task.cancelled():
            self._figures.ended.labels("cancelled").inc()

    async def _run(self, job: Job) -> None:
        begin = time.time()
        self._figures.waited.observe(max(0.0, begin - job.created))
        try:
            await self._make(job)
        except OutputError as error:
            log.warning("%s", one_line(error))
            self._fail(job, "disk_full", "the server could not keep the video")
        except Exception as error:  # whatever it is, the others go on
            log.warning("%s failed", job.id, exc_info=error)
            self._fail(job, "server_error", "the video could not be made")
        finally:
            self._figures.made.observe(time.time() - begin)

    async def _make(self, job: Job) -> None:
        """Have a video made, again elsewhere where its maker breaks."""
        job.status = RUNNING
        while True:
            job.attempts += 1
            self._jobs.save(job)
            try:
                outcome = await self._followed(job)
                break
            except Exception as error:
                log.warning("attempt %d of %s failed", job.attempts, job.id, exc_info=error)
                if job.attempts >= MOST_ATTEMPTS:
                    self._fail(job, "server_error", "the machines that made the video failed, and so did others")
                    return
                self._figures.retried.inc()
                await asyncio.sleep(job.attempts)
        if outcome.kind == MADE and outcome.made is not None:
            made = outcome.made
            self._figures.steps.labels("reused").inc(made.reused)
            self._figures.steps.labels("computed").inc(made.steps - made.reused)
            self._figures.captures.inc(made.captured)
            self._jobs.complete(job, made.content, made.suffix)
            self._figures.ended.labels("completed").inc()
        elif outcome.kind == STOPPED:
            self._fail(job, "timeout", f"the video took over {self._timeout:g} s")
        else:
            # Written for whoever runs the server, it may name files of theirs.
            log.warning("%s failed: %s", job.id, outcome.reason)
            self._fail(job, "generation_failed", "the model failed at this request")

    async def _followed(self, job: Job) -> Outcome:
        stream = self._maker.options(stream=True).make.remote(job.ask, self._timeout, alive.own())
        try:
            async for event in stream:
                if "outcome" not in event:
                    job.progress = min(99, 100 * event["step"] // max(1, event["num_steps"]))
                    continue
                maker = event["maker"]
                self._makers[maker.name] = maker
                self._figures.remember(maker.name, event["memory"])
                outcome: Outcome = event["outcome"]
                return outcome
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                stream.cancel()
            raise
        raise RuntimeError("its maker ended without a word")

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._figures.ended.labels("failed").inc()
        if job.id in self._jobs.known:  # else it was deleted meanwhile
            self._jobs.fail(job, code, message)
