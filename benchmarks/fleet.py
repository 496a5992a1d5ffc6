"""Many videos: a batch that is killed twice and resumed, checked file by file; and a server under a steady load.

``python benchmarks/fleet.py overnight --lines 200`` makes prompts x seeds x two sizes on replicas of several ranks by
eager lowering. On the way a rank is killed by SIGKILL, and then the process that was started. The same command goes on.
At the end every file must be there once, and be what ``hvcompile generate`` makes on as many ranks, bit for bit.

``python benchmarks/fleet.py soak --requests 1000 --rate 1`` asks a server on loopback for videos of two sizes at a
rate, and then one process in a loop for as many as ``--alone`` says. It tells latencies, throughput, memory at the
beginning and the end, and graphs that were compiled after the warm-up.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

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


def rank_processes() -> list[psutil.Process]:
    """The ranks that run on this machine."""
    every = psutil.process_iter(["cmdline"])
    return [item for item in every if " ".join(item.info["cmdline"] or []).startswith("ray::Rank")]


def killed_runs(command: Sequence[str], manifest: Path, lines: int) -> dict[str, Any]:
    """Run a batch, kill a rank after a quarter and the driver after a half, and go on to the end."""
    begin, killed = time.monotonic(), 0
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None and num_done(manifest) < lines // 2:
            if not killed and num_done(manifest) >= lines // 4 and (ranks := rank_processes()):
                killed = ranks[-1].pid
                os.kill(killed, signal.SIGKILL)
                print(f"killed a rank after {num_done(manifest)} videos")
            time.sleep(0.1)
        driver.kill()
    print(f"killed the driver after {num_done(manifest)} videos")
    until = num_done(manifest)
    subprocess.run(command, env=environment(), check=True)
    return {"rank_killed": bool(killed), "done_when_killed": until, "seconds": time.monotonic() - begin}


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
            told = hvcompile("generate", *files, *size, *EAGER, "--output", str(output), ranks=ranks)
            subprocess.run(told, env=environment(), check=True)
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
    print(json.dumps(figures, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if not len(asked) == figures["made"] == figures["files"] or figures["made_twice"] or different:
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


def load(port: int, requests: int, rate: float, steps: int) -> tuple[list[float], int, float, list[float]]:
    """Ask at a steady rate; gives latencies, refusals, seconds, and the first memory that was seen."""
    begin = time.monotonic()
    open_: dict[str, float] = {}
    latencies: list[float] = []
    first: list[float] = []
    refused = sent = 0
    while sent < requests or open_:
        if sent < requests and time.monotonic() - begin >= sent / rate:
            width, height, frames = SIZES[sent % len(SIZES)]
            body = {"prompt": prompts_of(100)[sent % 100], "seed": sent, "steps": steps, "size": f"{width}x{height}"}
            try:
                identity = call(port, "POST", "/v1/videos", body | {"seconds": f"{frames / 24:.3f}"})["id"]
                open_[identity] = time.monotonic()
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise
                refused += 1
            sent += 1
        for identity, asked in list(open_.items()):
            video = call(port, "GET", f"/v1/videos/{identity}")
            if video["status"] in ("completed", "failed"):
                latencies.append(time.monotonic() - asked)
                del open_[identity]
                assert video["status"] == "completed", video
                call(port, "DELETE", f"/v1/videos/{identity}")
        if not first and len(latencies) >= 10:
            first = figures_of(port, "resident_bytes")
        time.sleep(0.05)
    return latencies, refused, time.monotonic() - begin, first


@app.command()
def soak(
    requests: int = 1000,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 0.5,
    replicas: int = 2,
    ranks: int = 1,
    steps: int = 6,
    alone: Annotated[int, typer.Option(help="Videos of one process in a loop.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Ask a server at a steady rate, and then one process in a loop."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = ",".join(f"{width}x{height}x{frames}" for width, height, frames in SIZES)
    where = ("--port", str(port), "--replicas", str(replicas), "--ranks", str(ranks), "--sizes", sizes)
    command = hvcompile("serve", *where, "--most-queued", "1000", *EAGER)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            assert b"serving at" in server.stdout.readline()
            latencies, refused, seconds, first = load(port, requests, rate, steps)
            last, captures = figures_of(port, "resident_bytes"), figures_of(port, "captures_total")
        finally:
            server.terminate()
            server.wait(120)
    ordered = sorted(latencies)
    figures = {
        "requests": requests,
        "rate": rate,
        "replicas": replicas,
        "refused": refused,
        "latency_p50": statistics.median(ordered),
        "latency_p95": ordered[int(0.95 * (len(ordered) - 1))],
        "videos_a_second": len(latencies) / seconds,
        "videos_a_second_alone": in_a_loop(alone, steps),
        "captured_after_warm_up": captures,
        "resident_bytes_after_10": first,
        "resident_bytes_at_the_end": last,
    }
    print(json.dumps(figures, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def in_a_loop(count: int, steps: int) -> float:
    """Videos a second of one process, after its warm-up."""
    from hvcompile.app.fleet.worker import at_work
    from hvcompile.app.request.ask import Ask, settled
    from hvcompile.app.request.clips import Clips

    base = settled(Clips(prompt="-", device="cpu", backend_settings=("lower=eager",)))
    asks = [
        Ask(prompt=prompts_of(100)[number], seed=number, steps=steps, width=width, height=height, frames=frames)
        for number in range(count)
        for width, height, frames in [SIZES[number % len(SIZES)]]
    ]
    with at_work(base, lambda event: None, holds_all_sizes=True) as worker:
        for ask in asks[: len(SIZES)]:
            worker.make(ask, lambda event: None, lambda: None)
        begin = time.perf_counter()
        for ask in asks:
            worker.make(ask, lambda event: None, lambda: None)
        return count / (time.perf_counter() - begin)


if __name__ == "__main__":
    app()
