"""The one door of a server: it takes requests, keeps what was asked for, and hands it to whoever makes it.

It holds no model. ``Gate`` is a deployment of Ray Serve of one replica; that and ``Maker`` are all that there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import logging
import math
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from hvcompile.app.fleet.asked import MOST_BYTES, Limits, asked
from hvcompile.app.fleet.figures import Figures
from hvcompile.app.fleet.jobs import COMPLETED, LOCK, QUEUED, RUNNING, Job, Jobs, locked, shown
from hvcompile.app.fleet.thread import MADE, STOPPED, Outcome
from hvcompile.app.request.serve import is_loopback
from hvcompile.errors import InputError, OutputError, one_line

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
"""How often a video is begun, where its replica breaks."""
MOST_LISTED = 100
EXPIRE_SECONDS = 10.0
"""How often videos that were kept long enough are looked for."""
RETRY_SECONDS = 5
"""After which clients are told to come back."""
BODY_SECONDS = 30.0
"""For which a client may take to send what it asks for."""
BASE = "/v1/videos"
PREFIX = "hvcompile-serve-"
"""Of the temporary directories of servers."""
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
        model: its name, as clients are told it.

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
        model: str,
    ) -> None:
        self._maker, self._keys, self._limits, self._model = maker, keys, limits, model
        self._most_queued, self._timeout, self._num_makers = most_queued, timeout, num_makers
        self._folder = None if store else _folder()
        self._jobs = Jobs(self._folder or Path(store or ""), keep)
        self._queue: list[Job] = [job for job in self._jobs.known.values() if job.status == QUEUED]
        self._running: dict[str, asyncio.Task[None]] = {}
        self._is_draining = False
        self._figures = Figures(lambda: len(self._queue), lambda: len(self._running))
        self._loop: asyncio.Task[None] | None = None

    async def warm(self) -> bool:
        """Wait until every maker is loaded and compiled, and begin to hand out work."""
        calls = [self._maker.warm.remote() for _ in range(self._num_makers)]  # each maker takes one call at a time
        await asyncio.gather(*calls)
        self._begin()
        return True

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
        if self._loop is not None:
            self._loop.cancel()
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
        except _Refusal as refusal:
            self._figures.refused.labels(str(refusal.status)).inc()
            return refusal.response()
        except Exception as error:  # a client must not learn more of it
            log.warning("a request failed", exc_info=error)
            return _Refusal(500, "server_error", "the server failed at this request").response()

    async def _answer(self, request: HttpRequest) -> Response:
        path, method = request.url.path.rstrip("/"), request.method
        if path == "/healthz" and method == "GET":
            status = "draining" if self._is_draining else "ok"
            return JSONResponse({"status": status}, 503 if self._is_draining else 200, headers=SAFE)
        if path == "/metrics" and method == "GET":
            return Response(self._figures.text(), media_type="text/plain; version=0.0.4", headers=SAFE)
        self._check_site(request)
        owner = self._owner(request)
        if path == "/v1/models" and method == "GET":
            model = {"id": self._model, "object": "model", "owned_by": "hvcompile", "created": 0}
            return JSONResponse({"object": "list", "data": [model]}, headers=SAFE)
        if path == BASE and method == "POST":
            return await self._create(request, owner)
        if path == BASE and method == "GET":
            return self._list(request, owner)
        identity, _, rest = path.removeprefix(f"{BASE}/").partition("/")
        if not path.startswith(f"{BASE}/") or (rest, method) not in {("", "GET"), ("", "DELETE"), ("content", "GET")}:
            raise _Refusal(404, "not_found", "there is nothing here")
        job = self._jobs.find(identity, owner)
        if job is None:
            raise _Refusal(404, "not_found", "there is no such video")
        if method == "DELETE":
            return self._delete(job)
        return self._content(job) if rest else JSONResponse(shown(job, self._model), headers=SAFE)

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
        try:
            ask = asked(body, request.headers.get("content-type", ""), self._limits)
        except InputError as error:
            raise _Refusal(400, "invalid_request", one_line(error)) from error
        if len(self._queue) >= self._most_queued:
            message = f"{len(self._queue)} videos wait, the most that may: come back later"
            raise _Refusal(429, "queue_full", message, {"Retry-After": str(RETRY_SECONDS)})
        try:
            job = self._jobs.create(ask, owner)
        except OutputError as error:
            raise _Refusal(507, "disk_full", "the server can't keep more videos") from error
        self._queue.append(job)
        return JSONResponse(shown(job, self._model), headers=SAFE)

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

    def _list(self, request: HttpRequest, owner: str) -> Response:
        text = request.query_params.get("limit", "20")
        limit = int(text) if text.isdecimal() and len(text) < 6 else 0
        if not 1 <= limit <= MOST_LISTED:
            raise _Refusal(400, "invalid_request", f"limit is no number from 1 to {MOST_LISTED}")
        jobs = list(self._jobs.of(owner))
        if request.query_params.get("order", "desc") == "asc":
            jobs.reverse()
        after = request.query_params.get("after")
        if after is not None:
            place = next((place for place, job in enumerate(jobs) if job.id == after), len(jobs))
            jobs = jobs[place + 1 :]
        data = [shown(job, self._model) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, "has_more": len(jobs) > limit, **ends}, headers=SAFE)

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
        if self._loop is None or self._loop.done():
            self._loop = asyncio.get_running_loop().create_task(self._hand_out())

    async def _hand_out(self) -> None:
        """Begin the oldest video that waits whenever a maker is free, and forget what was kept long enough."""
        expired = -math.inf
        while True:
            while self._queue and len(self._running) < self._num_makers:
                job = self._queue.pop(0)
                task = self._running[job.id] = asyncio.create_task(self._run(job))
                # Not in the task itself: one that is cancelled before its first turn never runs.
                task.add_done_callback(functools.partial(self._ended, job))
            if time.monotonic() - expired > EXPIRE_SECONDS:
                expired = time.monotonic()
                self._jobs.expire()
            await asyncio.sleep(0.02)

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
        stream = self._maker.options(stream=True).make.remote(job.ask, self._timeout)
        try:
            async for event in stream:
                if "outcome" not in event:
                    job.progress = min(99, 100 * event["step"] // max(1, event["num_steps"]))
                    continue
                for rank, amount in enumerate(event["memory"]):
                    self._figures.memory.labels(str(event["replica"]), str(rank)).set(amount)
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


def _folder() -> Path:
    """A temporary directory of this process; those of servers that were killed, and left theirs, are removed."""
    place = Path(tempfile.gettempdir())
    for path in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, InputError):  # another user's, or of a server that runs
            if path.is_dir() and not path.is_symlink() and (path / LOCK).exists():
                locked(path).close()
                shutil.rmtree(path)
    return Path(tempfile.mkdtemp(prefix=PREFIX))
