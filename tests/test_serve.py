"""Serving: what a client may send, whose video is whose, and the official client against a server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import fleet_cases
import pytest
import tiny_pipelines
from fleet_cases import ray_processes, rays_place  # noqa: F401
from slow import IS_SLOW
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from test_extras import run as run_without
from typer.testing import CliRunner

from hvcompile.app import cli
from hvcompile.app.fleet import alive
from hvcompile.app.fleet import gate as gate_module
from hvcompile.app.fleet import jobs as jobs_module
from hvcompile.app.fleet.alive import Presence
from hvcompile.app.fleet.asked import MOST_BYTES, Limits, asked
from hvcompile.app.fleet.gate import Gate
from hvcompile.app.fleet.jobs import COMPLETED, LOCK, QUEUED, RUNNING, Jobs, locked
from hvcompile.app.fleet.made import Made
from hvcompile.app.fleet.serving import serving
from hvcompile.app.fleet.thread import FAILED, MADE, STOPPED, Outcome
from hvcompile.app.request.ask import Ask
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.serve import KEYS, Request, Size
from hvcompile.errors import InputError

pytestmark = pytest.mark.xdist_group("fleet")

LIMITS = Limits(
    model="tiny",
    sizes=(Size(width=48, height=32, frames=5), Size(width=32, height=32, frames=49)),
    most_steps=50,
    fps=24,
)
BASE = Request(device="cpu").base
KEY, OTHER_KEY = "k" * 20, "o" * 20


# What a client sends.


def form(**fields: str) -> tuple[bytes, str]:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields.items()]
    return ("".join(parts) + "--b--\r\n").encode(), "multipart/form-data; boundary=b"


def test_what_a_client_may_ask_for() -> None:
    expected = Ask(prompt="a cat", width=48, height=32, frames=5, seed=3, steps=4)
    assert asked(b'{"prompt": "a cat", "seed": 3, "steps": 4, "model": "tiny"}', "application/json", LIMITS) == expected
    assert asked(*form(prompt="a cat", seed="3", steps="4", size="48x32"), LIMITS) == expected
    longer = asked(*form(prompt="a cat", seconds="2", guidance="3.5"), LIMITS)
    assert (longer.frames, longer.guidance) == (49, 3.5)
    shorter = asked(*form(prompt="a cat", seconds="0.208"), LIMITS)
    assert shorter.frames == 5
    near = dataclasses.replace(LIMITS, sizes=tuple(Size(width=48, height=32, frames=frames) for frames in (17, 9)))
    for frames in (17, 9):  # both are within half a second
        assert asked(*form(prompt="a cat", seconds=f"{frames / 24:.3f}"), near).frames == frames
    odd = 'ünï</p><script>alert(1)</script>\u202e 猫 \x00 "; DROP TABLE'
    assert asked(json.dumps({"prompt": odd}).encode(), "application/json", LIMITS).prompt == odd
    assert asked(*form(prompt=odd), LIMITS).prompt == odd


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b"[]", "the body is no JSON object"),
        (b"\xff\xfe", "the body is no JSON in UTF-8"),
        (b"[" * 50_000, "the body is no JSON"),
        (b'{"prompt": "a", "guidance": NaN}', "the body is no JSON"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": ["a"]}', "prompt is no text"),
        (b'{"prompt": " "}', "prompt is empty"),
        (b'{"prompt": "\\ud800"}', "prompt is no valid text"),
        (b'{"prompt": "a", "steps": 51}', "steps is over 50"),
        (b'{"prompt": "a", "prompt": "b"}', "a field twice"),
        (b'{"prompt": "a", "model": "sora-2"}', "model is not served: allowed is tiny, or none"),
        (b'{"prompt": "a", "steps": 0}', "steps is 0"),
        (b'{"prompt": "a", "steps": 1.5}', "steps is no number"),
        (b'{"prompt": "a", "seed": true}', "seed is no number"),
        (b'{"prompt": "a", "seed": 1e999}', "the body is no JSON"),
        (b'{"prompt": "a", "seed": 99999999999999999999999}', "seed is 99999999999999999999999: give"),
        (b'{"prompt": "a", "seed": ' + b"9" * 60_000 + b"}", "the body is no JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", "seed is no number"),
        (b'{"prompt": "a", "seconds": 1' + b"0" * 400 + b"}", "seconds is no number"),
        (b'{"prompt": "a", "seconds": -1' + b"0" * 29 + b"}", "size or seconds is not served"),
        (b'{"prompt": "a", "guidance": 1' + b"0" * 400 + b"}", "guidance is no number"),
        (b'{"prompt": "a", "guidance": 1e9}', "guidance is not from 0 to 1000"),
        (b'{"prompt": "a", "size": "4096x4096"}', "size or seconds is not served: allowed are 48x32 with 5 frames"),
        (b'{"prompt": "a", "size": {"a": 1}}', "size or seconds is not served"),
        (b'{"prompt": "a", "seconds": "9"}', "size or seconds is not served"),
        (b'{"prompt": "a", "image": "/etc/passwd"}', "a field is unknown"),
        (b'{"prompt": "a", "options": {"dump": "/tmp/x"}}', "a field is unknown"),
        (b'{"prompt": "a", "input_reference": {"image_url": "file:///etc/passwd"}}', "input_reference is not served"),
    ],
)
def test_what_a_client_may_not_ask_for(body: bytes, message: str) -> None:
    with pytest.raises(InputError) as raised:
        asked(body, "application/json", LIMITS)
    assert message in str(raised.value)


def test_forms_that_are_none() -> None:
    kind = form()[1]
    field = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n'
    for body, content_type, message in (
        (b"x", "multipart/form-data", "its boundary is missing"),
        (b"x", kind + "\r\nX: y", "the content type can't be read"),
        (b"x", kind + "; x" * 20_000, "the content type can't be read"),
        (b"x", kind, "the body is no form"),
        (b"--b\r\nx", kind, "does not end with its boundary"),
        (form(prompt="a")[0].replace(b"--b--", b"--b"), kind, "does not end with its boundary"),
        (b'{"prompt": "a"}', "text/plain", "is neither application/json nor"),
        (b'{"prompt": "a"}', "", "is neither application/json nor"),
        (b"--b\r\n\r\n" * 9000, kind, "a field without a name"),
        (b"--b\r\nContent-Type: multipart/mixed; boundary=b\r\n" * 20, kind, "no form"),
        (b"--b\r\nContent-Disposition: " + b"; x" * 20_000 + b"\r\n\r\n\r\n--b--", kind, "too many or too long"),
        (field + b"X: y\r\n" * 9000 + b"\r\n\r\n--b--", kind, "too many or too long"),
        (field + b"X" * 60_000, kind, "too many or too long"),
        (field + b"\r\n" + b"\r\n--" * 15_000 + b"\r\n--b--", kind, "prompt has over 4000 characters"),
        (b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n--b--', kind, "no text in UTF-8"),
        (field + b"\r\n\xff\r\n--b--", kind, "no text in UTF-8"),
        (b"--b\r\n\r\nx\r\n--b--", kind, "a field without a name"),
        (field + b'Content-Disposition: form-data; name="seed"\r\n\r\n1\r\n--b--', kind, "a field without a name"),
        (form(prompt="a")[0].replace(b"--b--\r\n", b"") + form(prompt="b")[0], kind, "field twice"),
        (*form(**{f"f{number}": "" for number in range(40)}), "too many fields"),
        (*form(prompt="a", steps="9" * 30), "steps is no number"),
        (*form(prompt="a", seed="١٢"), "seed is "),
    ):
        begin = time.process_time()
        with pytest.raises(InputError, match=message):
            asked(body, content_type, LIMITS)
        assert time.process_time() - begin < 1  # of seconds: a tenth of one is much for 64 KiB
    bomb = b"\x89PNG\r\n\x1a\n" + bytes(1000)
    body = (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b\r\nContent-Disposition: form-data; '
        b'name="input_reference"; filename="../../a.png"\r\nContent-Type: image/png\r\n\r\n' + bomb + b"\r\n--b--\r\n"
    )
    with pytest.raises(InputError, match="input_reference is not served"):
        asked(body, "multipart/form-data; boundary=b", LIMITS)


# Whose video is whose.


def test_videos_are_found_again_after_a_restart(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, 100)
    first, second, third = (jobs.create(Ask(prompt=text), "me", "tiny", "digest") for text in "abc")
    jobs.complete(first, b"video", ".mp4")
    second.status = RUNNING
    jobs.save(second)
    jobs.fail(third, "code", "reason")
    (tmp_path / "video_cut.json").write_text("{")
    jobs.close()
    again = Jobs(tmp_path, 100)
    assert [(job.id, job.status) for job in again.known.values()] == [
        (first.id, COMPLETED),
        (second.id, QUEUED),
        (third.id, "failed"),
    ]
    assert [job.id for job in again.of("me")] == [third.id, second.id, first.id]
    found = again.find(first.id, "me")
    assert found is not None
    assert again.place(found).read_bytes() == b"video"
    assert again.find(first.id, "you") is None
    assert again.find("../../etc/passwd", "me") is None
    with pytest.raises(InputError, match="in use by another hvcompile serve"):
        Jobs(tmp_path, 100)
    found.completed = 0
    again.expire()
    assert again.find(first.id, "me") is None
    assert not (tmp_path / f"{first.id}.mp4").exists()


def test_others_directories_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place for temporary ones, which all users share: links, what others may write to, and what is not ours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / LOCK).touch()
    (tmp_path / "tmp").mkdir()
    for name, mode in (("open", 0o755), ("lock-is-a-link", 0o700), ("no-lock", 0o700), ("abandoned", 0o700)):
        folder = tmp_path / "tmp" / f"{jobs_module.PREFIX}{name}"
        folder.mkdir(mode=mode)
        if name == "lock-is-a-link":
            (folder / LOCK).symlink_to(home / "made")
        elif name != "no-lock":
            (folder / LOCK).touch()
    (tmp_path / "tmp" / f"{jobs_module.PREFIX}link").symlink_to(home)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: os.getuid() + 1)
        made = jobs_module.temporary()
    assert len(list((tmp_path / "tmp").iterdir())) == 6
    assert made.stat().st_mode & 0o777 == 0o700
    jobs_module.temporary()
    left = {path.name.removeprefix(jobs_module.PREFIX) for path in (tmp_path / "tmp").iterdir()}
    assert left >= {"open", "lock-is-a-link", "no-lock", "link"}
    assert "abandoned" not in left
    assert [path.name for path in home.iterdir()] == [LOCK]
    with pytest.raises(InputError, match=r"can't be locked .Too many levels of symbolic links.: give a directory"):
        locked(tmp_path / "tmp" / f"{jobs_module.PREFIX}lock-is-a-link")


# The gate, without Ray: its makers are stood in for.


class Makers:
    """Stands in for a deployment's handle."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome | Exception] = []
        self.hold, self.is_loaded = asyncio.Event(), asyncio.Event()
        self.is_loaded.set()
        self.name = "first"
        self.cancelled = 0
        self.make = self.warm = self

    def options(self, **_: Any) -> Makers:
        return self

    def remote(self, *_: Any) -> Any:
        return self._stream() if _ else self._met()

    async def _met(self) -> Presence:
        await self.is_loaded.wait()
        return Presence(self.name)

    async def _stream(self) -> AsyncIterator[dict[str, Any]]:
        yield {"step": 1, "num_steps": 4}
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        yield {"outcome": outcome, "memory": [7], "maker": Presence(self.name)}


def made() -> Outcome:
    sizes: dict[str, Any] = {"frames": 5, "height": 32, "width": 48, "steps": 4, "reused": 1, "captured": 0}
    video = Made(content=b"video", suffix=".mp4", seconds=1.0, compile_seconds=0.0, peak_bytes=None, **sizes)
    return Outcome(number=1, kind=MADE, made=video)


def gate(makers: Makers, folder: Path, *keys: str, limits: Limits = LIMITS, base: Clips = BASE) -> Gate:
    digests = tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
    return Gate(makers, 1, digests, limits, 2, 5.0, 100.0, str(folder), base, 1)


async def call(
    gate: Gate, method: str, path: str, body: bytes = b"", key: str = "", query: str = "", **headers: str
) -> tuple[int, Any, Response]:
    parts = [body[start : start + 1000] for start in range(0, len(body), 1000)] or [b""]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    spelled = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = (
        {"content-type": "application/json", "host": "127.0.0.1:8000"}
        | spelled
        | ({"authorization": f"Bearer {key}"} if key else {})
    )
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": query.encode()}
    response = await gate(HttpRequest(scope, receive))
    is_json = response.headers.get("content-type") == "application/json"
    return response.status_code, json.loads(bytes(response.body)) if is_json else None, response


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


BODY = b'{"prompt": "<b>a cat</b>"}'


def test_the_gate_from_request_to_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        makers = Makers()
        door = gate(makers, tmp_path)
        status, video, response = await call(door, "POST", "/v1/videos", BODY)
        assert (status, video["status"], video["size"]) == (200, "queued", "48x32")
        assert response.headers["x-content-type-options"] == "nosniff"
        place = f"/v1/videos/{video['id']}"
        await until(lambda: door._jobs.known[video["id"]].progress == 25)
        assert (await call(door, "GET", place))[1]["status"] == "in_progress"
        assert (await call(door, "GET", f"{place}/content"))[0] == 409
        makers.outcomes = [RuntimeError("its rank died"), made()]
        makers.hold.set()
        await until(lambda: door._jobs.known[video["id"]].has_ended)
        assert (await call(door, "GET", place))[1]["status"] == "completed"
        status, _, response = await call(door, "GET", f"{place}/content")
        assert (status, response.headers["content-type"]) == (200, "video/mp4")
        status, listed, _ = await call(door, "GET", "/v1/videos", query="limit=1")
        assert [item["id"] for item in listed["data"]] == [video["id"]]
        assert (await call(door, "GET", "/v1/videos", query=f"after={video['id']}&order=asc"))[1]["data"] == []
        for path, query, message in (
            ("/v1/videos", "limit=99999", "limit is no number from 1 to 100"),
            ("/v1/videos", "limit=٢", "limit is no number"),
            ("/v1/videos", "order=zzz", "order is neither asc nor desc"),
            ("/v1/videos", "after=zzz", "after is no video that is there"),
            ("/v1/videos", "before=x", "a query parameter is unknown: allowed here are limit, after, order"),
            ("/v1/videos", "limit=1&limit=2", "a query parameter is there twice"),
            ("/v1/models", "a=b", "a query parameter is unknown: allowed here are none"),
            ("/healthz", "a=b", "a query parameter is unknown"),
            (place, "variant=video", "a query parameter is unknown"),
            (f"{place}/content", "variant=thumbnail", "variant is not served: allowed is video"),
        ):
            status, refused, _ = await call(door, "GET", path, query=query)
            assert (status, message in refused["error"]["message"]) == (400, True), query
        assert (await call(door, "GET", f"{place}/content", query="variant=video"))[0] == 200
        assert (await call(door, "POST", "/v1/videos", BODY, query="prompt=x"))[0] == 400
        figures = bytes((await call(door, "GET", "/metrics"))[2].body).decode()
        for line in ('videos_total{status="completed"} 1.0', 'steps_total{kind="reused"} 1.0', "retried_total 1.0"):
            assert f"hvcompile_{line}" in figures
        assert "cat" not in figures
        assert (await call(door, "DELETE", place))[1] == {"id": video["id"], "object": "video.deleted", "deleted": True}
        assert (await call(door, "GET", place))[0] == 404
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]

    asyncio.run(scenario())


def test_a_server_is_ready_once_a_maker_is_and_forgets_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "EXPIRE_SECONDS", 0.01)
    dead: set[str] = set()

    async def is_gone(maker: Presence) -> bool:
        return maker.name in dead

    monkeypatch.setattr(alive, "is_gone", is_gone)

    async def scenario() -> None:
        makers = Makers()
        makers.is_loaded.clear()
        door = gate(makers, tmp_path)

        async def health(path: str = "/healthz") -> tuple[int, str]:
            status, content, _ = await call(door, "GET", path)
            return status, content["status"]

        async def figures() -> str:
            return bytes((await call(door, "GET", "/metrics"))[2].body).decode()

        assert await health() == (503, "loading")
        assert await health("/livez") == (200, "ok")
        makers.is_loaded.set()
        await until(lambda: bool(door._makers))
        assert await health() == (200, "ok")
        makers.outcomes = [made()]
        makers.hold.set()
        identity = (await call(door, "POST", "/v1/videos", BODY))[1]["id"]
        await until(lambda: door._jobs.known[identity].has_ended)
        assert 'hvcompile_resident_bytes{rank="0",replica="first"} 7.0' in await figures()
        makers.is_loaded.clear()
        dead.add("first")
        await until(lambda: not door._makers)
        assert await health() == (503, "loading")
        assert "hvcompile_resident_bytes{" not in await figures()
        makers.name = "second"
        makers.is_loaded.set()
        await until(lambda: list(door._makers) == ["second"])
        assert await health() == (200, "ok")
        await door.close()

    asyncio.run(scenario())


def test_what_was_asked_of_another_server_is_not_made_by_this_one(tmp_path: Path) -> None:
    """A store holds what waits, of which model and settings it was asked for, and what was made."""

    async def ask(door: Gate, body: bytes) -> str:
        return str((await call(door, "POST", "/v1/videos", body))[1]["id"])

    async def scenario() -> None:
        makers = Makers()
        door = gate(makers, tmp_path)
        makers.outcomes = [made()]
        makers.hold.set()
        done = await ask(door, BODY)
        await until(lambda: door._jobs.known[done].has_ended)
        makers.hold.clear()
        long = await ask(door, b'{"prompt": "a", "seconds": 2, "steps": 50}')
        await until(lambda: len(door._running) == 1)
        short = await ask(door, b'{"prompt": "a"}')
        await door.close()
        other = dataclasses.replace(LIMITS, model="other")
        for limits, base, left, reason in (
            (LIMITS, BASE, {long, short}, ""),
            (dataclasses.replace(LIMITS, sizes=LIMITS.sizes[:1]), BASE, {short}, "serves 32x32 with 49 frames no more"),
            (dataclasses.replace(LIMITS, most_steps=49), BASE, {short}, "serves 49 steps at most"),
            (LIMITS, dataclasses.replace(BASE, guidance=2.0), set(), "makes videos by other settings than before"),
            (LIMITS, dataclasses.replace(BASE, model="other"), set(), "makes videos by other settings than before"),
            (other, BASE, set(), "serves another model"),
        ):
            kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
            door = gate(Makers(), tmp_path, limits=limits, base=base)
            assert {job.id for job in door._queue} == left
            for identity in {long, short} - left:
                failed = (await call(door, "GET", f"/v1/videos/{identity}"))[1]
                assert (failed["status"], failed["error"]["code"], failed["model"]) == ("failed", "not_served", "tiny")
                assert f"the server was started anew, and {reason}: ask" in failed["error"]["message"]
            completed = (await call(door, "GET", f"/v1/videos/{done}"))[1]
            assert (completed["status"], completed["model"]) == ("completed", "tiny")
            await door.close()
            for path, content in kept.items():
                path.write_bytes(content)

    asyncio.run(scenario())


def test_a_video_that_is_deleted_in_the_turn_in_which_it_is_handed_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        makers = Makers()
        door = gate(makers, tmp_path)
        first = (await call(door, "POST", "/v1/videos", BODY))[1]["id"]
        door._begin()
        while not door._running:  # its task is made, and has not had its turn
            await asyncio.sleep(0)
        await call(door, "DELETE", f"/v1/videos/{first}")
        makers.outcomes = [made()]
        makers.hold.set()
        second = (await call(door, "POST", "/v1/videos", BODY))[1]["id"]
        await until(lambda: door._jobs.known[second].has_ended)
        assert not door._running

    asyncio.run(scenario())


def test_pages_of_other_sites_are_refused_where_no_key_is_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        door, door_with_keys = gate(Makers(), tmp_path / "a"), gate(Makers(), tmp_path / "b", KEY)
        headers: dict[str, Any]
        cases: list[tuple[dict[str, Any], int]] = [
            ({"origin": "http://127.0.0.1:8000"}, 200),
            ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
            ({"host": "[::1]:8000"}, 200),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "http://127.0.0.1:9"}, 403),
            ({"origin": "null"}, 403),
            ({"sec_fetch_site": "cross-site"}, 403),
            ({"host": "evil.example:8000"}, 403),
            ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, 403),
            ({"host": "127.0.0.1.evil.example"}, 403),
            ({"host": ""}, 403),
        ]
        for headers, status in cases:
            assert (await call(door, "GET", "/v1/videos", **headers))[0] == status, headers
            assert (await call(door_with_keys, "GET", "/v1/videos", key=KEY, **headers))[0] == 200, headers
        assert (await call(door, "POST", "/v1/videos", BODY, content_type="text/plain"))[0] == 400
        assert (await call(door, "POST", "/v1/videos", *form(prompt="a")[:1], content_type=form()[1]))[0] == 200

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    asyncio.run(scenario())


def test_what_is_kept_goes_in_time_and_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gate_module, "EXPIRE_SECONDS", 0.0)
    abandoned, other = tmp_path / "hvcompile-serve-killed", tmp_path / "hvcompile-serve-runs"
    for folder in (abandoned, other):
        folder.mkdir(mode=0o700)
        (folder / LOCK).touch()
        (folder / "video_x.json").touch()

    async def scenario() -> None:
        makers = Makers()
        makers.outcomes = [made()]
        makers.hold.set()
        door = Gate(makers, 1, (), LIMITS, 2, 5.0, 0.01, None, BASE, 1)
        assert not abandoned.exists()
        assert other.exists()
        identity = (await call(door, "POST", "/v1/videos", BODY))[1]["id"]
        await until(lambda: identity not in door._jobs.known)  # made, and forgotten with no request in between
        makers.hold.clear()
        await call(door, "POST", "/v1/videos", BODY)
        await until(lambda: len(door._running) == 1)
        await door.close()
        assert list(tmp_path.glob("hvcompile-serve-*")) == [other]

    with locked(other):
        asyncio.run(scenario())


def test_a_queue_that_is_full_and_videos_that_are_cancelled(tmp_path: Path) -> None:
    async def scenario() -> None:
        makers = Makers()
        door = gate(makers, tmp_path)
        ids = []
        for _ in range(3):
            ids.append((await call(door, "POST", "/v1/videos", BODY))[1]["id"])
            await until(lambda: len(door._running) == 1)
        status, refused, response = await call(door, "POST", "/v1/videos", BODY)
        assert (status, refused["error"]["code"], response.headers["retry-after"]) == (429, "queue_full", "5")
        assert (await call(door, "DELETE", f"/v1/videos/{ids[1]}"))[0] == 200  # waits
        assert (await call(door, "DELETE", f"/v1/videos/{ids[0]}"))[0] == 200  # is being made
        await until(lambda: makers.cancelled == 1)
        makers.outcomes = [made()]
        makers.hold.set()
        await until(lambda: door._jobs.known[ids[2]].has_ended)
        assert list(door._jobs.known) == [ids[2]]
        assert await door.drain(1.0) == 0
        status, refused, _ = await call(door, "POST", "/v1/videos", BODY)
        assert (status, refused["error"]["code"]) == (503, "draining")
        assert (await call(door, "GET", "/healthz"))[0] == 503
        assert (await call(door, "GET", f"/v1/videos/{ids[2]}"))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome(number=1, kind=STOPPED, reason="late"), "timeout"),
        (Outcome(number=1, kind=FAILED, reason="/home/me/secret is NaN"), "generation_failed"),
        (None, "server_error"),
    ],
)
def test_what_fails_says_why_and_no_more(outcome: Outcome | None, code: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        makers = Makers()
        door = gate(makers, tmp_path)
        makers.outcomes = [outcome] if outcome else [RuntimeError("/home/me/secret")] * 3
        makers.hold.set()
        identity = (await call(door, "POST", "/v1/videos", BODY))[1]["id"]
        await until(lambda: door._jobs.known[identity].has_ended)
        status, video, _ = await call(door, "GET", f"/v1/videos/{identity}")
        assert (status, video["status"], video["error"]["code"]) == (200, "failed", code)
        assert "secret" not in json.dumps(video)

    asyncio.run(scenario())


def test_keys_and_owners(tmp_path: Path) -> None:
    async def scenario() -> None:
        door = gate(Makers(), tmp_path, KEY, OTHER_KEY)
        for key in ("", "wrong", KEY[:-1], KEY + "x", f"{KEY},{OTHER_KEY}", "ü" * 20):
            status, refused, response = await call(door, "POST", "/v1/videos", BODY, key)
            assert (status, refused["error"]["code"]) == (401, "invalid_api_key")
            assert "www-authenticate" in response.headers
        identity = (await call(door, "POST", "/v1/videos", BODY, KEY))[1]["id"]
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert (await call(door, method, f"/v1/videos/{identity}{path}", b"", OTHER_KEY))[0] == 404
        assert (await call(door, "GET", "/v1/videos", b"", OTHER_KEY))[1]["data"] == []
        assert (await call(door, "GET", f"/v1/videos/{identity}", b"", KEY))[0] == 200
        assert (await call(door, "GET", "/livez"))[0] == 200
        assert KEY not in "".join(path.read_text() for path in tmp_path.iterdir())

    asyncio.run(scenario())


def test_paths_and_bodies_of_an_attacker(tmp_path: Path) -> None:
    async def scenario() -> None:
        door = gate(Makers(), tmp_path / "store")
        for path in (
            "/",
            "/etc/passwd",
            "/v1/videos/../../etc/passwd",
            "/v1/videos/%2e%2e%2fx",
            "/v1/videos/x/content",
        ):
            assert (await call(door, "GET", path))[0] == 404
        for method in ("PUT", "PATCH", "POST"):
            assert (await call(door, method, "/v1/videos/x"))[0] == 404
        large = b'{"prompt": "' + b"a" * MOST_BYTES + b'"}'
        assert (await call(door, "POST", "/v1/videos", large))[0] == 413  # with no length told
        assert (await call(door, "POST", "/v1/videos", b"{}", content_length="9" * 15))[0] == 413
        assert (await call(door, "POST", "/v1/videos", b"{}", content_length="-1"))[0] == 400
        bomb = gzip.compress(bytes(10_000_000))
        assert (await call(door, "POST", "/v1/videos", bomb, content_encoding="gzip"))[0] == 415
        status, refused, _ = await call(door, "POST", "/v1/videos", b'{"prompt": 1, "<script>": 2}')
        assert status == 400
        assert "<script>" not in json.dumps(refused)
        assert [path.name for path in (tmp_path / "store").iterdir()] == [LOCK]

    (tmp_path / "store").mkdir()
    asyncio.run(scenario())


# The command.


@pytest.mark.parametrize(
    ("arguments", "keys", "message"),
    [
        (("--port", "0"), "", "port is 0: give 1 to 65535"),
        (("--host", "0.0.0.0"), "", "may be reached by others, and HVCOMPILE_API_KEYS has no keys"),
        ((), "short", "has a key of fewer than 16 characters"),
        (("--sizes", "48x32"), "", "sizes has '48x32': give WIDTHxHEIGHTxFRAMES"),
        (("--model-x",), "", "No such option"),
        (("/none",), "", "sizes are not given"),
        (("/none", "--sizes", "48x32x5"), "", "model '/none' is neither a directory nor a hub id"),
        (("--most-queued", "0"), "", "most-queued is 0: give 1 to 100000"),
        (("--store", "/none"), "", "store '/none' is no directory"),
        (("--timeout", "0"), "", "timeout is 0: give a number of seconds above 0"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...], keys: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS, keys)
    done = CliRunner().invoke(cli.app, ("serve", *arguments))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = CliRunner().invoke(cli.app, ("serve", "--port", str(port)))
    assert done.exit_code == 2
    assert f"port {port} can't be listened on (Address already in use)" in " ".join(done.output.split())


def test_without_ray(tmp_path: Path) -> None:
    done = run_without(tmp_path, ["ray"], "serve")
    line = "error: hvcompile serve needs ray, which is not installed: pip install 'hvcompile[cli,diffusers,ray]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


# A server on loopback.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write("hunyuan_video", tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def server(model: Path, **more: Any) -> Iterator[tuple[int, Callable[[], int]]]:
    """A port, and what drains the server that listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    request = Request(
        model=str(model), device="cpu", backend_settings=fleet_cases.OPTIONS, port=port, sizes=("48x32x5",), **more
    )
    with serving(request) as drain:
        yield port, drain


def test_the_official_client(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rays_place: Path,  # noqa: F811
) -> None:
    """It makes, follows, fetches, lists, cancels and deletes.

    A rank or a maker that is killed costs no video, and a gate no more than what it alone knew of.
    """
    openai = pytest.importorskip("openai")
    monkeypatch.setenv(KEYS, f"{KEY},{OTHER_KEY}")
    with server(model, most_queued=1, most_steps=10_000) as (port, drain):
        make: dict[str, Any] = {"base_url": f"http://127.0.0.1:{port}/v1", "max_retries": 0}
        client = openai.OpenAI(api_key=KEY, **make)
        videos: Any = client.videos
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(api_key="wrong", **make).videos.create(prompt="x")
        with pytest.raises(openai.BadRequestError, match="size or seconds is not served"):
            videos.create(prompt="a red ball", size="720x1280")
        ask = Ask(prompt="a red ball", seed=3, **fleet_cases.SIZE)
        video = videos.create(prompt=ask.prompt, size="48x32", extra_body={"seed": 3, "steps": 4})
        done = videos.poll(video.id, poll_interval_ms=100)
        assert (done.status, done.progress) == ("completed", 100)
        content = videos.download_content(video.id).read()
        assert content == fleet_cases.generated(model, ask, tmp_path)
        assert [item.id for item in videos.list()] == [video.id]

        long = videos.create(prompt="a red ball", extra_body={"steps": 100})
        waits_until(lambda: videos.retrieve(long.id).status == "in_progress")
        queued = videos.create(prompt=ask.prompt, extra_body={"seed": 3, "steps": 4})
        with pytest.raises(openai.RateLimitError, match="videos wait"):
            videos.create(prompt="a red ball")
        waits_until(lambda: videos.retrieve(long.id).progress >= 2)
        videos.delete(long.id)
        assert videos.poll(queued.id, poll_interval_ms=100).status == "completed"
        assert videos.download_content(queued.id).read() == content

        for title in ("ray::Rank", *(["ray::ServeReplica:hvcompile:Maker"] if IS_SLOW else [])):
            killed = videos.create(prompt=ask.prompt, extra_body={"seed": 3, "steps": 4})
            kill(rays_place, title)
            assert videos.poll(killed.id, poll_interval_ms=200).status == "completed"
            assert videos.download_content(killed.id).read() == content
        figures = got(port, "/metrics")[1]
        assert "hvcompile_captures_total 0.0" in figures
        assert 'hvcompile_videos_total{status="cancelled"} 1.0' in figures
        waits_until(lambda: got(port, "/metrics")[1].count("hvcompile_resident_bytes{") == 1)  # no maker that is gone
        assert got(port, "/healthz")[0] == 200
        assert json.loads(got(port, "/-/routes")[1]) == {"/": "hvcompile"}  # Ray Serve's own, which needs no key

        # The gate is killed while a video is made that would take minutes: it holds up nothing that is asked for next.
        orphan = videos.create(prompt="a red ball", extra_body={"steps": 10_000})
        waits_until(lambda: videos.retrieve(orphan.id).status == "in_progress")
        (rank,) = ray_processes(rays_place, "ray::Rank")
        kill(rays_place, "ray::ServeReplica:hvcompile:Gate")
        waits_until(lambda: got(port, "/livez")[0] == 200)
        with pytest.raises(openai.NotFoundError):
            videos.retrieve(orphan.id)
        next_one = videos.create(prompt=ask.prompt, extra_body={"seed": 3, "steps": 4})
        waits_until(lambda: videos.retrieve(next_one.id).status == "completed")
        assert videos.download_content(next_one.id).read() == content
        assert [process.pid for process in ray_processes(rays_place, "ray::Rank")] == [rank.pid]
        assert [item.id for item in videos.list()] == [next_one.id]
        assert drain() == 0


def kill(place: Path, title: str) -> None:
    (process,) = ray_processes(place, title)
    os.kill(process.pid, signal.SIGKILL)


def got(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    return 0, ""


def waits_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_all_videos_share_leaves_sizes_to_clients() -> None:
    request = Request(steps=7)
    assert dataclasses.asdict(request.base)["steps"] == 7
    assert [str(size) for size in request.served] == ["48x32"]
