"""Many videos: a batch that is killed twice, a worker over a thousand requests, and a server at a steady rate.

``overnight --lines 200`` makes prompts x seeds x two sizes on replicas of several ranks by eager lowering. On the way a
rank is killed by SIGKILL, and then the process that was started. The same command goes on. At the end every file must
be there once, and be what ``hvcompile generate`` makes on as many ranks, bit for bit.

``soak --requests 1000`` gives one worker requests of two sizes and tells its memory on the way, and what it compiled.

``steady --minutes 30 --rate 1`` asks a server on loopback for videos of two sizes at a rate, then for many at once, and
then one process in a loop. It tells latencies, throughput, memory on the way as the server's metrics have it, and what
was compiled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from hvcompile.app.fleet.worker import CANCELLED, StoppedError, Worker, at_work
from hvcompile.app.request.ask import Ask, settled
from hvcompile.app.request.clips import Clips

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((48, 32, 17), (48, 32, 9))
SEEDS = 2
SHAPES = ("circle", "square", "triangle", "diamond")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white")
MOVES = ("moves left", "moves right", "rises", "falls")
EAGER = ("--option", "lower=eager", "--device", "cpu")

app = typer.Typer(add_completion=False)


def prompts_of(count: int) -> list[str]:
    """Some prompts that the embedded model knows the words of."""
    every = [f"a {colour} {shape} {move}" for move in MOVES for shape in SHAPES for colour in COLOURS]
    return every[:count]


def environment() -> dict[str, str]:
    """That of the processes that are started: this checkout, on one thread each."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def hvcompile(*words: str, ranks: int = 1) -> list[str]:
    """The command line, under torchrun for several ranks."""
    if ranks == 1:
        return [sys.executable, "-m", "hvcompile", *words]
    run = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return [sys.executable, *run, "-m", "hvcompile", *words]


def num_done(manifest: Path) -> int:
    """How many videos a manifest has."""
    return manifest.read_bytes().count(b'"error": null') if manifest.exists() else 0


def rank_processes(driver: int) -> list[psutil.Process]:
    """The ranks that a process has started, on this machine."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::Rank"):
                found.append(process)
    return found


def killed_runs(command: Sequence[str], manifest: Path, lines: int) -> dict[str, Any]:
    """Run a batch, kill a rank after a quarter and the driver after a half, and go on to the end."""
    begin, killed = time.monotonic(), 0
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None and num_done(manifest) < lines // 2:
            if not killed and num_done(manifest) >= lines // 4 and (ranks := rank_processes(driver.pid)):
                killed = ranks[-1].pid
                os.kill(killed, signal.SIGKILL)
                print(f"killed a rank after {num_done(manifest)} videos", flush=True)
            time.sleep(0.1)
        ended_by_itself = driver.poll() is not None
        driver.kill()
    print(f"killed the driver after {num_done(manifest)} videos", flush=True)
    until = num_done(manifest)
    subprocess.run(command, env=environment(), check=True)
    return {
        "rank_killed": bool(killed),
        "driver_killed": not ended_by_itself,
        "done_when_killed": until,
        "seconds": time.monotonic() - begin,
    }


def told(figures: dict[str, Any], json_file: Path | None) -> None:
    """Print figures, and write them with what they were measured by."""
    packages = ("torch", "diffusers", "ray", "hvcompile")
    figures |= {
        "command": " ".join(["python", "benchmarks/fleet.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in packages},
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }
    print(json.dumps(figures, indent=2), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


@app.command()
def overnight(
    lines: Annotated[int, typer.Option(help="A multiple of four.")] = 200,
    replicas: int = 2,
    ranks: int = 2,
    steps: int = 6,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Make a batch that is killed twice, and compare every file with generate's."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prompts = prompts_of(lines // (SEEDS * len(SIZES)))
        (place / "prompts.txt").write_text("\n".join(prompts))
        asked = [
            {"prompt": prompt, "seed": seed, "width": width, "height": height, "frames": frames, "steps": steps}
            | {"name": f"{frames}-{number}-{seed}"}
            for number, prompt in enumerate(prompts, 1)
            for seed in range(SEEDS)
            for width, height, frames in SIZES
        ]
        (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
        where = ("--output", str(place / "videos"), "--replicas", str(replicas), "--ranks", str(ranks))
        command = hvcompile("batch", str(place / "prompts.jsonl"), *where, *EAGER)
        figures = killed_runs(command, place / "videos" / "manifest.jsonl", len(asked))
        records = [json.loads(line) for line in (place / "videos" / "manifest.jsonl").read_text().splitlines()]
        made = [record["id"] for record in records if record["error"] is None]
        digits = len(str(len(prompts)))
        different: list[str] = []
        for width, height, frames in SIZES:
            size = ("--width", str(width), "--height", str(height), "--frames", str(frames), "--steps", str(steps))
            files = ("--prompts", str(place / "prompts.txt"), "--seeds", f"0-{SEEDS - 1}", "--quiet")
            output = place / f"expected{frames}" / "out.mp4"
            output.parent.mkdir()
            command = hvcompile("generate", *files, *size, *EAGER, "--output", str(output), ranks=ranks)
            subprocess.run(command, env=environment(), check=True)
            for number in range(1, len(prompts) + 1):
                for seed in range(SEEDS):
                    middle = f"-{number:0{digits}d}" if len(prompts) > 1 else ""
                    expected = output.with_name(f"out{middle}-seed{seed}.mp4").read_bytes()
                    name = f"{frames}-{number}-{seed}.mp4"
                    different += [name] * (expected != (place / "videos" / name).read_bytes())
        figures |= {
            "lines": len(asked),
            "made": len(made),
            "made_twice": len(made) - len(set(made)),
            "different": different,
        }
        figures |= {"files": len(list((place / "videos").glob("*.mp4"))), "replicas": replicas, "ranks": ranks}
    told(figures, json_file)
    were_killed = figures["rank_killed"] and figures["driver_killed"]
    if not len(asked) == figures["made"] == figures["files"] or figures["made_twice"] or different or not were_killed:
        raise typer.Exit(1)


def call(port: int, method: str, path: str, body: Any = None) -> Any:
    """Ask a server on loopback."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if answer.headers.get_content_type() == "application/json" else text


def figures_of(port: int, name: str) -> list[float]:
    """The values of a metric."""
    lines = call(port, "GET", "/metrics").decode().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"hvcompile_{name}")]


class Load:
    """Asks a server at a steady rate, and follows what it was asked.

    Attributes:
        latencies: seconds from each request until the client knew that its video was made.
        refused: requests that got 429.
        memory: seconds since the beginning, and the bytes that all ranks hold, once every ``EVERY_SECONDS``.

    """

    EVERY_SECONDS = 15.0

    def __init__(self, port: int, steps: int) -> None:
        self._port, self._steps = port, steps
        self.latencies: list[float] = []
        self.memory: list[tuple[float, float]] = []
        self.refused = 0
        self.seconds = 0.0

    def run(self, requests: int, rate: float) -> None:
        """Send all requests, and wait for their videos."""
        begin = time.monotonic()
        open_: dict[str, float] = {}
        sent = 0
        while sent < requests or open_:
            if sent < requests and time.monotonic() - begin >= sent / rate:
                self._send(sent, open_)
                sent += 1
            for identity, asked in list(open_.items())[:4]:  # the oldest: the others wait for them
                video = call(self._port, "GET", f"/v1/videos/{identity}")
                if video["status"] in ("completed", "failed"):
                    self.latencies.append(time.monotonic() - asked)
                    del open_[identity]
                    assert video["status"] == "completed", video
                    call(self._port, "DELETE", f"/v1/videos/{identity}")
            if time.monotonic() - begin >= len(self.memory) * self.EVERY_SECONDS:
                self._scrape(time.monotonic() - begin)
            time.sleep(0.1)
        self.seconds = time.monotonic() - begin
        self._scrape(self.seconds)

    def _send(self, number: int, open_: dict[str, float]) -> None:
        width, height, frames = SIZES[number % len(SIZES)]
        body = {"prompt": prompts_of(100)[number % 100], "seed": number, "steps": self._steps}
        try:
            size = {"size": f"{width}x{height}", "seconds": f"{frames / 24:.3f}"}
            open_[call(self._port, "POST", "/v1/videos", body | size)["id"]] = time.monotonic()
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            self.refused += 1

    def _scrape(self, seconds: float) -> None:
        self.memory.append((seconds, sum(figures_of(self._port, "resident_bytes"))))


@app.command()
def steady(
    minutes: Annotated[float, typer.Option(help="For which requests are sent.")] = 30.0,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 0.5,
    most: Annotated[int, typer.Option(help="Requests, at most.")] = 5000,
    replicas: int = 2,
    ranks: int = 1,
    steps: int = 6,
    burst: Annotated[int, typer.Option(help="Requests that are then sent at once, to see what it can do.")] = 80,
    alone: Annotated[int, typer.Option(help="Videos of one process in a loop.")] = 80,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Ask a server at a steady rate, then for many at once, and then one process in a loop."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    requests = min(most, int(minutes * 60 * rate))
    sizes = ",".join(f"{width}x{height}x{frames}" for width, height, frames in SIZES)
    where = ("--port", str(port), "--replicas", str(replicas), "--ranks", str(ranks), "--sizes", sizes)
    command = hvcompile("serve", *where, "--most-queued", "100", *EAGER)
    load = Load(port, steps)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            assert b"serving at" in server.stdout.readline()
            print("serving", flush=True)
            load.run(requests, rate)
            at_once = Load(port, steps)
            at_once.run(burst, 1e6)
            captures = figures_of(port, "captures_total")
            made = figures_of(port, 'videos_total{status="completed"}')
        finally:
            server.terminate()
            code = server.wait(120)
    ordered = sorted(load.latencies)
    figures = {
        "requests": requests,
        "rate": rate,
        "replicas": replicas,
        "ranks": ranks,
        "refused": load.refused,
        "completed_as_the_metrics_say": made,
        "latency_p50": statistics.median(ordered),
        "latency_p95": ordered[int(0.95 * (len(ordered) - 1))],
        "videos_a_second_at_the_rate": len(load.latencies) / load.seconds,
        "videos_a_second_at_once": len(at_once.latencies) / at_once.seconds,
        "videos_a_second_alone": in_a_loop(alone, steps),
        "captured_after_warm_up": captures,
        "resident_bytes": load.memory,
        "left_with": code,
    }
    told(figures, json_file)
    if captures != [0.0] or code or len(ordered) + load.refused != requests:
        raise typer.Exit(1)


def asks_of(count: int, steps: int) -> list[Ask]:
    """Requests whose sizes alternate."""
    return [
        Ask(prompt=prompts_of(100)[number % 100], seed=number, steps=steps, width=width, height=height, frames=frames)
        for number in range(count)
        for width, height, frames in [SIZES[number % len(SIZES)]]
    ]


def worker() -> contextlib.AbstractContextManager[Worker]:
    """A worker of this process."""
    base = settled(Clips(prompt="-", device="cpu", backend_settings=("lower=eager",)))
    return at_work(base, lambda event: None, holds_all_sizes=True)


def in_a_loop(count: int, steps: int) -> float:
    """Videos a second of one process, after its warm-up."""
    with worker() as one:
        for ask in asks_of(len(SIZES), steps):
            one.make(ask, lambda event: None, lambda: None)
        begin = time.perf_counter()
        for ask in asks_of(count, steps):
            one.make(ask, lambda event: None, lambda: None)
        return count / (time.perf_counter() - begin)


@app.command()
def soak(
    requests: int = 1000,
    steps: int = 4,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Give one worker many requests, one after the other, a tenth of which are stopped on the way."""
    memory, captured, stopped = [], 0, 0
    begin = time.monotonic()
    with worker() as one:
        for number, ask in enumerate(asks_of(requests, steps)):
            stop = CANCELLED if number % 10 == 9 else None
            try:
                made = one.make(ask, lambda event: None, lambda stop=stop: stop)  # type: ignore[misc]
                captured += made.captured if number >= len(SIZES) else 0
            except StoppedError:
                stopped += 1
            if number % (requests // 20) == requests // 20 - 1:
                memory.append((number + 1, psutil.Process().memory_info().rss))
                print(f"{number + 1} requests, {memory[-1][1] / 1e6:.0f} MB", flush=True)
    late = [amount for number, amount in memory if number > requests // 5]
    figures = {
        "requests": requests,
        "stopped": stopped,
        "steps": steps,
        "seconds": time.monotonic() - begin,
        "captured_after_warm_up": captured,
        "resident_bytes": memory,
        "growth_after_a_fifth": late[-1] / late[0] - 1,
    }
    told(figures, json_file)
    if captured:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
