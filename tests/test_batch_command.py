"""Batches: lines that are refused, the list of what is done, who takes what, and runs that are killed on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fleet_cases
import psutil
import pytest
import ranks
import tiny_pipelines
from fleet_cases import ray_processes, rays_place  # noqa: F401
from PIL import Image
from slow import SLOW
from test_extras import run as run_without
from typer.testing import CliRunner

from hvcompile.app import cli
from hvcompile.app.fleet import batch as engine
from hvcompile.app.fleet import cluster, pictures
from hvcompile.app.fleet.cluster import Needs
from hvcompile.app.fleet.made import Made
from hvcompile.app.fleet.manifest import Manifest
from hvcompile.app.fleet.replica import CHECKING, WAITING, Replica
from hvcompile.app.fleet.thread import BROKEN, FAILED, IDLE, MADE, Outcome, Report
from hvcompile.app.fleet.todo import Task, Todo
from hvcompile.app.request.ask import Ask
from hvcompile.app.request.batch import MANIFEST, Line, Request
from hvcompile.errors import InputError, OutputError, RunError

pytestmark = pytest.mark.xdist_group("fleet")  # one Ray cluster at a time


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def request(folder: Path, *lines: Any, **more: Any) -> Request:
    prompts = write_lines(folder / "prompts.jsonl", *lines)
    given = {"device": "cpu", "backend_settings": fleet_cases.OPTIONS, **fleet_cases.SIZE, **more}
    return Request(prompts=prompts, output=folder / "videos", **given)


# Lines.


def test_lines_that_are_wrong_are_named_by_number(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a"},
        "",
        '{"prompt": "a"',
        {"prompt": "a", "steps": -1},
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "a", "guidance": NaN}',
        {"prompt": "a", "name": "../../etc/passwd"},
        {"prompt": "a", "name": "manifest"},
        {"prompt": "a", "name": "000001"},
        {"prompt": "a", "image": "none.png"},
        {"prompt": "a", "options": {"first_block_cache": {"treshold": 1}}},
        "[" * 100_000,
        {"prompt": "a", "name": "\u732b" * 70},
        {"prompt": "a", "guidance": 10**400},
        {"prompt": "a", "steps": 10**400},
        {"prompt": "a", "options": {"first_block_cache": {"threshold": 10**400}}},
        '{"prompt": "a", "seed": ' + "9" * 5000 + "}",
    ]
    with pytest.raises(InputError) as raised:
        request(tmp_path, *lines).lines()
    message = str(raised.value)
    for part in (
        "line 3: it is no JSON",
        "line 4: steps is -1: give a whole number from 1",
        "line 5: it has a key twice",
        "line 6: it is no JSON",
        "line 7: name '../../etc/passwd' is no file name",
        "line 8: name 'manifest' is taken",
        "line 9: its file '000001' is that of line 1 too",
        "line 10: image '",
        "line 11: unknown key 'treshold'",
        "line 12: it is no JSON",
        "line 13: name '" + "\u732b" * 40 + "' has 210 bytes in UTF-8: give 200 or fewer",
        "line 14: guidance is 1",
        "line 15: steps is 1",
        "line 16: ",
        "line 17: it is no JSON",
        "nothing was started",
    ):
        assert part in message, part
    assert "line 1:" not in message
    assert "\n" not in message


def test_lines_and_their_files(tmp_path: Path) -> None:
    lines = request(
        tmp_path,
        {"prompt": "a", "fps": 9},
        {"prompt": "b", "name": "the cat.mp4"},
        "",
        {"prompt": "c", "fps": None},
        fps=12,
    ).lines()
    assert [(line.number, line.stem, line.ask.fps) for line in lines] == [
        (1, "000001", 9),
        (2, "the cat", 12),
        (4, "000004", 12),
    ]
    assert len({line.identity for line in lines}) == 3
    given, common = request(tmp_path, {"prompt": "a", "guidance": 6.0}, {"prompt": "b"}, guidance=6.0).lines()
    assert given.ask.shape == common.ask.shape
    more = request(tmp_path, *[{"prompt": f"{number}"} for number in range(1, 12)]).lines()
    assert [line.stem for line in more[:2]] == ["000001", "000002"]  # whatever the count


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ("batch", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument"),
        (("none.jsonl",), "prompts 'none.jsonl' can't be read (No such file or directory)"),
        (("p.jsonl", "--replicas", "0"), "replicas is 0: give 1 to 1024"),
        (("p.jsonl", "--ranks", "5000"), "ranks is 5000: give 1 to 1024"),
        (("p.jsonl", "--attempts", "0"), "attempts is 0: give 1 or more"),
        (("p.jsonl", "--timeout", "-1"), "timeout is -1: give a number of seconds above 0"),
        (("p.jsonl", "--fps", "0"), "fps is 0: give a whole number from 1 to 1000"),
        (("p.jsonl", "--output", "p.jsonl"), "output 'p.jsonl' is a file: give a directory"),
        (("p.jsonl", "--device", "cuda:1"), "device 'cuda:1' can't be shared out"),
        (("p.jsonl", "--model", "/none"), "model '/none' is neither a directory nor a hub id"),
        (("p.jsonl", "--option", "lower=quick"), "options['lower'] is 'quick'"),
        (
            ("p.jsonl", "--address", "127.0.0.1:1"),
            "address '127.0.0.1:1' has no Ray cluster to join: Connection refused",
        ),
        (("p.jsonl", "--json", "a.txt"), "json 'a.txt' is no JSON file"),
        (("p.json", "--json", "p.json"), "json 'p.json' is the file of prompts too: give another name"),
        (("manifest.jsonl", "--output", "."), "the list of what is done 'manifest.jsonl' is the file of prompts too"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "p.jsonl", {"prompt": "a"})
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        ("", "set RAY_AUTH_MODE=token, and have its token in that file or in RAY_AUTH_TOKEN"),
        ("token", "RAY_AUTH_MODE is token: see that RAY_AUTH_TOKEN, or ~/.ray/auth_token, holds the token that the"),
    ],
)
def test_a_cluster_that_does_not_let_us_in(
    mode: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        with pytest.raises(InputError) as raised:
            engine.batch(request(tmp_path, {"prompt": "a"}, address=address))
    assert f"address '{address}' has no Ray cluster to join: Failed to connect" in str(raised.value)
    assert advice in str(raised.value)


def test_without_ray(tmp_path: Path) -> None:
    done = run_without(tmp_path, ["ray"], "batch", "p.jsonl")
    line = "error: hvcompile batch needs ray, which is not installed: pip install 'hvcompile[cli,diffusers,ray]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


# The list of what is done.


def line_of(number: int, **fields: Any) -> Line:
    return Line(number=number, ask=Ask(prompt="a", **fields), stem=str(number), identity=f"id{number}")


def test_the_list_of_what_is_done(tmp_path: Path) -> None:
    one, two, three = (line_of(number) for number in (1, 2, 3))
    with Manifest.opened(tmp_path) as manifest:
        assert not manifest.has(one)
        record = manifest.store(one, b"video", ".mp4", {"steps": 4})
        assert (record["output"], record["bytes"], record["steps"]) == ("1.mp4", 5, 4)
        manifest.fail(two, "no luck", 3)
        with pytest.raises(InputError, match="in use by another hvcompile batch"), Manifest.opened(tmp_path):
            pass
    (tmp_path / MANIFEST).write_bytes((tmp_path / MANIFEST).read_bytes() + b'{"id": "id3", "error": null, "outp')
    with Manifest.opened(tmp_path) as manifest:
        assert [manifest.has(line) for line in (one, two, three)] == [True, False, False]
        manifest.store(three, b"other", ".mp4", {})
    records = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert [(record["id"], record["error"]) for record in records] == [("id1", None), ("id2", "no luck"), ("id3", None)]
    (tmp_path / "1.mp4").write_bytes(b"cut")
    (tmp_path / "3.mp4").unlink()
    with Manifest.opened(tmp_path) as manifest:
        assert [manifest.has(line) for line in (one, three)] == [False, False]


def test_lines_of_the_list_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as not done, and are told of; a disk that takes no more leaves the list as it was."""
    lines = [line_of(number) for number in range(1, 6)]
    with Manifest.opened(tmp_path) as manifest:
        for line in lines:
            manifest.store(line, b"video", ".mp4", {"maker": "odd"})
        assert manifest.notes() == manifest.mixed(lines) == ()
    path = tmp_path / MANIFEST
    records = [json.loads(text) for text in path.read_text().splitlines()]
    del records[0]["sha256"]
    records[1]["output"] = "../2.mp4"
    records[2]["id"] = 3
    path.write_text(
        "".join(json.dumps(record) + "\n" for record in records[:4]) + "\x00\x00\n" + json.dumps(records[4]) + "\n"
    )
    with Manifest.opened(tmp_path) as manifest:
        assert [manifest.has(line) for line in lines] == [False, False, False, True, True]
        (note,) = manifest.notes()
        assert note.startswith(f"'{path}' has 4 damaged lines (1, 2, 3, 5): what they told of counts as not done")
        before = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            for _ in range(2):
                with pytest.raises(OutputError, match=r"can't be written .No space left on device.: see to its disk"):
                    manifest.fail(lines[0], "no luck", 1)
        assert path.read_bytes() == before
    assert path.read_bytes() == before
    path.unlink()
    path.mkdir()
    with (
        pytest.raises(OutputError, match=r"can't be opened .Is a directory.: make it yours"),
        Manifest.opened(tmp_path),
    ):
        pass


def test_a_file_is_known_by_its_name_and_content(tmp_path: Path) -> None:
    """A prompt that is changed and changed back is made again, whatever the sizes; equal lines are each done."""
    first, changed = line_of(1), dataclasses.replace(line_of(1), identity="another")
    twin = dataclasses.replace(line_of(2), identity=first.identity)
    with Manifest.opened(tmp_path) as manifest:
        manifest.store(first, b"video", ".mp4", {})
        manifest.store(twin, b"video", ".mp4", {})
        assert manifest.has(first)
        assert manifest.has(twin)
        manifest.store(changed, b"other", ".mp4", {})
    with Manifest.opened(tmp_path) as manifest:
        assert [manifest.has(line) for line in (first, changed, twin)] == [False, True, True]
        (tmp_path / "2.mp4").write_bytes(b"third")
        assert not manifest.has(twin)


def test_a_disk_that_is_full_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Manifest.opened(tmp_path) as manifest:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OutputError, match="No space left on device"):
                manifest.store(line_of(1), b"video", ".mp4", {})
        assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
        manifest.store(line_of(1), b"video", ".mp4", {})
        assert manifest.has(line_of(1))


# Who takes what.


def test_tasks_of_one_shape_go_together() -> None:
    sizes = (5, 9, 5, 9, 5, 13)
    todo = Todo(Task(line=line_of(number, frames=frames)) for number, frames in enumerate(sizes))
    both = (1, 2)

    def take(replica: int, shape: str | None, others: list[str]) -> Task:
        task = todo.take(replica, shape, others, both)
        assert task is not None
        return task

    first = take(1, None, [])
    assert first.line.ask.frames == 5  # most wait for it
    second = take(2, None, [first.shape])
    assert second.line.ask.frames == 9
    taken = [take(1, first.shape, [second.shape]).line.number for _ in range(2)]
    assert taken == [2, 4]
    assert take(1, first.shape, [second.shape]).line.ask.frames == 13
    assert take(2, second.shape, []).line.number == 3
    assert len(todo) == 0
    assert todo.take(1, None, [], both) is None


def test_what_failed_on_one_replica_waits_for_another() -> None:
    todo = Todo([])
    todo.add(Task(line=line_of(1), attempts=1, tried={1}))
    assert todo.take(1, None, [], (1, 2)) is None
    assert todo.take(2, None, [], (1, 2)) is not None
    todo.add(Task(line=line_of(1), attempts=1, tried={1}))
    assert todo.take(1, None, [], (1,)) is not None


class Seated:
    """Stands in for a replica: the first one fails at once, and the second one never gets room."""

    def __init__(self, number: int, *_: Any) -> None:
        self.number, self.state, self.reason, self.report = (
            number,
            IDLE if number == 1 else WAITING,
            "",
            Report(state=IDLE),
        )
        self.wrong: list[str | None] | None = None
        self._outcomes: list[Outcome] = []

    def advance(self) -> Outcome | None:
        return self._outcomes.pop() if self._outcomes else None

    def check(self, asks: list[Ask]) -> None:
        self.wrong = [None] * len(asks)

    def begin(self, number: int, *_: Any) -> None:
        self._outcomes.append(Outcome(number=number, kind=FAILED, reason="no luck"))

    def kill(self) -> None:
        pass


def stand_in(patched: pytest.MonkeyPatch, replica: Any, room: int = 2) -> None:
    """Have a batch run without Ray, by replicas of this class."""
    needs = Needs(cpus=1, gpus=0, environment={}, room=room)
    patched.setattr(engine, "Replica", replica)
    patched.setattr(engine, "PAUSE_SECONDS", 0.0)
    patched.setattr(cluster, "joined", lambda *_: contextlib.nullcontext(needs))


def test_a_replica_that_waits_for_room_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed on the one that is there is tried there again, and then given up."""
    stand_in(monkeypatch, Seated, room=1)
    seen: list[Any] = []
    made = engine.batch(request(tmp_path, {"prompt": "a"}, {"prompt": "b"}, replicas=2), seen.append)
    assert [(line.number, reason, attempts) for line, reason, attempts in made.failures] == [
        (1, "no luck", 3),
        (2, "no luck", 3),
    ]
    assert [event.text for event in seen if isinstance(event, engine.Note)] == [
        "the cluster has room for 1 of 2 replicas: they go on alone"
    ]


class Broken(Seated):
    """Stands in for one whose model's directory went away."""

    def __init__(self, number: int, *_: Any) -> None:
        super().__init__(number)
        self.state, self.reason = BROKEN, "model '/m' is gone"


class Quick(Seated):
    """Stands in for one that makes whatever it is asked for."""

    def begin(self, number: int, *_: Any) -> None:
        sizes: dict[str, Any] = {"frames": 5, "height": 32, "width": 48, "steps": 4, "reused": 1, "captured": 0}
        made = Made(content=b"video", suffix=".mp4", seconds=1.0, compile_seconds=0.0, peak_bytes=None, **sizes)
        self._outcomes.append(Outcome(number=number, kind=MADE, made=made))


@pytest.mark.parametrize(
    ("replica", "error", "message"),
    [
        (
            Broken,
            RunError,
            "no replica is left: 3 in a row ended .*, at last replica 5, since model '/m' is gone; replica 6, since",
        ),
        (Quick, OutputError, "No space left on device.*3 videos in a row were lost; free some space"),
    ],
)
def test_what_ends_a_run(
    replica: Any, error: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that goes away, and a disk that is full: no half file, and the same command goes on later."""
    asked = request(tmp_path, *[{"prompt": f"{number}"} for number in range(5)], replicas=2)
    with monkeypatch.context() as patched:
        stand_in(patched, replica)
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(error, match=message):
                engine.batch(asked)
        assert [path.name for path in asked.output.iterdir()] == [MANIFEST]
        patched.setattr(engine, "Replica", Quick)
        assert len(engine.batch(asked).records) == 5


class Unsteady(Quick):
    """The first one never answers what is wrong with the lines, the second one dies of it, and others do."""

    def check(self, asks: list[Ask]) -> None:
        if self.number == 1:
            self.state = CHECKING
        elif self.number == 2:
            self.state, self.reason = BROKEN, "a rank died"
        else:
            super().check(asks)

    def __init__(self, number: int, *_: Any) -> None:
        super().__init__(number)
        self.state = IDLE


def test_a_replica_that_never_answers_or_dies_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, Unsteady)
    made = engine.batch(request(tmp_path, *[{"prompt": f"{number}"} for number in range(5)], replicas=2))
    assert (len(made.records), made.failures, made.restarts) == (5, (), 1)


def test_pictures_travel_with_their_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that makes one need not have its file; one that is gone from here fails its line alone."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    given: list[Any] = []

    class Given(Quick):
        def begin(self, number: int, *arguments: Any) -> None:
            given.append(arguments)
            super().begin(number)

    stand_in(monkeypatch, Given)
    asked = request(tmp_path, {"prompt": "a", "image": "a.png"}, {"prompt": "b", "last_image": "b.png"}, attempts=2)
    lines = asked.lines()
    monkeypatch.setattr(Request, "lines", lambda _: lines)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").unlink()
    made = engine.batch(asked)
    ((line, reason, attempts),) = made.failures
    assert (line.number, attempts) == (2, 2)
    assert reason == f"last_image '{tmp_path}/b.png' can't be read any more (No such file or directory): put it back"
    ((ask, _, contents),) = given
    assert contents == {"image": content}
    (tmp_path / "a.png").unlink()
    with pictures.unpacked(ask, contents) as here:
        assert Path(here.image or "").read_bytes() == content
    assert not Path(here.image or "").exists()


def start_and_be_terminated() -> None:
    with cluster._own_signals():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_ray_has_sigterm_for_as_long_as_it_starts() -> None:
    """Its handler would end this process by SIGABRT."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        start_and_be_terminated()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_batch_says_where_makers_mix(tmp_path: Path) -> None:
    lines = [line_of(number) for number in (1, 2, 3)]
    with Manifest.opened(tmp_path) as manifest:
        for line, torch in zip(lines, ("2.12.0", "2.13.0", "2.13.0"), strict=True):
            manifest.store(line, b"video", ".mp4", {"maker": {"device": "cpu", "torch": torch}})
        assert manifest.mixed(lines[1:]) == ()
        (note,) = manifest.mixed(lines)
    assert note.endswith("may differ: 2 by device cpu, torch 2.13.0; 1 by device cpu, torch 2.12.0")


# Runs. Each has a Ray of its own, which ends with it.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write("hunyuan_video", tmp_path_factory.mktemp("model"))


def records_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "videos" / MANIFEST
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in whole]


@pytest.mark.parametrize("victim", ["driver", pytest.param("head", marks=SLOW)])
def test_a_driver_that_is_killed_and_the_same_command_again(
    victim: str,
    model: Path,
    tmp_path: Path,
    rays_place: Path,  # noqa: F811
) -> None:
    """SIGKILL after the first video; what is there is whole, and the second run makes the rest, and nothing twice.

    The ranks of the first run compute no longer. Where Ray's head is killed, the driver ends by itself.
    """
    lines = [{"prompt": f"a red ball, {number}", "seed": number} for number in range(4 if victim == "driver" else 40)]
    given = fleet_cases.SIZE | ({"steps": 16} if victim == "head" else {})  # else all is made before it knows
    asked = request(tmp_path, *lines, model=str(model), **given)
    size = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    options = [word for option in fleet_cases.OPTIONS for word in ("--option", option)]
    command = [sys.executable, "-m", "hvcompile", "batch", str(asked.prompts), "-o", str(asked.output), *size, *options]
    command += ["--model", str(model), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        end = time.monotonic() + 240
        while not records_of(tmp_path) and time.monotonic() < end and driver.poll() is None:
            time.sleep(0.05)
        assert ray_processes(rays_place, "ray::Rank")
        if victim == "head":
            (head,) = [item for item in ray_processes(rays_place) if item.name() == "gcs_server"]
            head.kill()
            assert driver.wait(60) == 1
        driver.send_signal(signal.SIGKILL)
    # Two of Ray's own, which compute nothing, try for a minute to tell a head that is gone.
    titles = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    end = time.monotonic() + 15
    while True:
        agents = [agent for title in titles for agent in ray_processes(rays_place, title)]
        if len(left := ray_processes(rays_place)) <= len(agents) or time.monotonic() > end:
            break
        time.sleep(0.1)
    assert not {item.pid for item in left} - {agent.pid for agent in agents}
    for agent in agents:
        agent.kill()
    first = records_of(tmp_path)
    assert 1 <= len(first) < len(lines)
    whole = {record["output"]: record["bytes"] for record in first}
    assert {name: (asked.output / name).stat().st_size for name in whole} == whole

    seen: list[engine.Progress] = []
    made = engine.batch(asked, lambda event: seen.append(event) if isinstance(event, engine.Progress) else None)
    assert (made.lines, made.skipped, len(made.records), made.failures) == (
        len(lines),
        len(first),
        len(lines) - len(first),
        (),
    )
    assert sorted(record["line"] for record in records_of(tmp_path)) == list(range(1, len(lines) + 1))
    assert seen[-1].done == len(lines)
    for line in asked.lines()[:4:3]:  # one of the first run, and one of the second
        expected = fleet_cases.generated(model, line.ask, tmp_path, **given)
        assert (asked.output / f"{line.stem}.mp4").read_bytes() == expected
    again = engine.batch(asked)  # starts nothing
    assert (again.skipped, again.records) == (len(lines), ())


def generated_by_all(model: str, asks: list[Ask], folder: str) -> list[bytes]:
    """What ``generate`` makes on the ranks of this group."""
    place = Path(folder) / str(os.getpid())
    place.mkdir()
    files = []
    for ask in asks:
        with contextlib.suppress(FileNotFoundError):  # of other ranks than the first
            files.append(fleet_cases.generated(model, ask, place))
    return files


@pytest.mark.ranks
@pytest.mark.usefixtures("rays_place")
@SLOW  # by default the driver is killed, above, and a rank and the gate of a server in test_serve.py
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rank_that_is_killed(replicas: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replica begins anew, its line is made all the same, and a line that can't be made is listed."""
    lines = [{"prompt": "a red ball", "seed": number} for number in range(3 * replicas)]
    asked = request(tmp_path, *lines, model=str(model), replicas=replicas, ranks=2)
    begin, begun = Replica.begin, []

    def begin_and_kill(self: Replica, *arguments: Any) -> None:
        begin(self, *arguments)
        begun.append(self.number)
        if len(begun) == 2:
            os.kill(self.pids[1], signal.SIGKILL)

    monkeypatch.setattr(Replica, "begin", begin_and_kill)
    made = engine.batch(asked)
    assert (len(made.records), made.failures, made.restarts) == (len(lines), (), 1)
    assert sorted(record["attempts"] for record in made.records) == [*[1] * (len(lines) - 1), 2]
    assert len(records_of(tmp_path)) == len(lines)
    asks = [line.ask for line in asked.lines()]
    files, _ = ranks.results(ranks.launch(generated_by_all, 2, str(model), asks, str(tmp_path)))
    assert [(asked.output / f"{line.stem}.mp4").read_bytes() for line in asked.lines()] == files


@pytest.mark.usefixtures("rays_place")
@SLOW
def test_a_machine_that_is_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two, with its raylet and its rank, while it computes: the other one makes the rest.

    A replica that then waits for room, which never comes, holds up nothing.
    """
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # else Ray finds out after half a minute
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [machines.add_node(num_cpus=1, wait=True) for _ in range(2)]
    lines = [{"prompt": "a red ball", "seed": number} for number in range(5)]
    asked = request(tmp_path, *lines, model=str(model), replicas=2, address=machines.address)
    begin, begun = Replica.begin, []

    def begin_and_kill(self: Replica, *arguments: Any) -> None:
        begin(self, *arguments)
        begun.append(self.number)
        if begun.count(self.number) == 2 and nodes:
            parents = {parent.pid for parent in psutil.Process(self.pids[0]).parents()}
            raylets = {node: node.all_processes["raylet"][0].process.pid for node in nodes}
            (node,) = [node for node, pid in raylets.items() if pid in parents]
            nodes.clear()
            os.kill(self.pids[0], signal.SIGKILL)  # a machine that goes takes all with it
            machines.remove_node(node, allow_graceful=False)

    monkeypatch.setattr(Replica, "begin", begin_and_kill)
    try:
        made = engine.batch(asked)
    finally:
        machines.shutdown()
    assert not nodes
    assert (len(made.records), made.failures) == (5, ())
    assert made.restarts >= 1
    assert sorted(record["line"] for record in records_of(tmp_path)) == [1, 2, 3, 4, 5]
    for line in asked.lines()[:2]:
        assert (asked.output / f"{line.stem}.mp4").read_bytes() == fleet_cases.generated(model, line.ask, tmp_path)
