"""Where a contender runs: a process of its own, over compile caches of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import signal
from pathlib import Path
from typing import Any

from hvcompile.app.bench import process
from hvcompile.app.bench.process import Protocol


class FailedError(Exception):
    """A contender can't go on; the message says why."""


class Seat:
    """A contender's process, started when it is first asked for something, over compile caches of its own."""

    def __init__(self, system: str, protocol: Protocol, folder: Path, timeout: float) -> None:
        self.system, self._protocol, self._timeout = system, protocol, timeout
        self._folder = folder / re.sub(r"\W+", "_", system)
        self._folder.mkdir()
        self._log = self._folder / "log.txt"
        self._process: Any = None
        self._connection: Any = None

    def ask(self, request: str, *arguments: Any) -> Any:
        """Have the process call a method of ``process.Contender``; gives what that returned.

        Raises:
            FailedError: it raised, died, or took longer than the timeout, after which it is ended.

        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((request, arguments))
            ready = multiprocessing.connection.wait([self._connection, self._process.sentinel], self._timeout)
            if not ready:
                self.stop(patience=0)
                raise FailedError(f"no answer to {request!r} in {self._timeout:g} s (--timeout)")
            is_good, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            raise FailedError(f"its process died in {request!r} ({_ending(code)}){self._last_words()}") from error
        if not is_good:
            self.stop()
            raise FailedError(answer)
        return answer

    def stop(self, patience: float = 5) -> None:
        """End the process and the compilers that it started; its compile caches stay.

        Args:
            patience: seconds in which it may leave by itself.

        """
        if self._process is None:
            return
        self._connection.close()  # where it waits for a request, it leaves by itself
        self._process.join(patience)
        if self._process.is_alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # its own group, which it made at its start
            except (AttributeError, OSError):
                self._process.kill()
            self._process.join()
        self._process.close()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, self.system, self._protocol, self._log)
        self._process = context.Process(target=process.serve, args=arguments, daemon=False)
        caches = {name: str(self._folder / "cache") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        before = {name: os.environ.get(name) for name in caches}
        os.environ |= caches
        try:
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
            other.close()

    def _last_words(self) -> str:
        try:
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        except OSError:
            return ""
        words = [line for line in lines if line and not line.startswith("USDT:")]  # torch's profiler writes those
        return f": {words[-1][:120]}" if words else ""


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"
