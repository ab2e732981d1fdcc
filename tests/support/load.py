"""Load: wrk for throughput and failures, and a small steady client for what changes when."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.support.busy import WAIT, Deadline
from tests.support.closing import Closing

_SCRIPT = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests":%d,"duration":%d,"status":%d,"socket":%d}\\n',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


class Report(NamedTuple):
    """`non_2xx`: answers of 400 and more."""

    requests: int
    seconds: float
    non_2xx: int
    socket_errors: int

    @property
    def failed(self) -> int:
        return self.non_2xx + self.socket_errors


def have_wrk() -> bool:
    return shutil.which("wrk") is not None


class Wrk(Closing):
    """wrk against one URL, from the constructor on until `stop`."""

    def __init__(
        self,
        url: str,
        *,
        connections: int = 8,
        host: str | None = None,
        timeout: int = 2,
    ) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".lua", delete=False) as file:
            file.write(_SCRIPT)
        self._script = Path(file.name)
        headers = ["-H", f"Host: {host}"] if host else []
        self._process = subprocess.Popen(
            [
                *("wrk", "-t1", f"-c{connections}", "-d3600s", f"--timeout={timeout}s"),
                *("-s", file.name, *headers, url),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._report: Report | None = None

    def stop(self) -> Report:
        """End the load now."""
        if self._report is None:
            self._process.send_signal(signal.SIGINT)
            output, _ = self._process.communicate(timeout=200)
            self._script.unlink(missing_ok=True)
            line = output.strip().splitlines()[-1] if output.strip() else ""
            if not line.startswith("{"):
                raise RuntimeError(f"wrk: {output}")
            found = json.loads(line)
            self._report = Report(
                found["requests"], found["duration"] / 1e6, found["status"], found["socket"]
            )
        return self._report

    def close(self) -> None:
        if self._report is None:
            self._process.kill()
            self._process.communicate()
            self._script.unlink(missing_ok=True)


class Answer(NamedTuple):
    """One answer of the steady client; status 0 where there was none."""

    time: float
    status: int
    body: str


class Poller(Closing):
    """A steady client: one connection, one request after another, every answer kept."""

    def __init__(self, url: str, *, interval: float = 0.002, host: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self._where = (parts.hostname or "127.0.0.1", parts.port)
        self._path = parts.path or "/"
        self._headers = {"Host": host} if host else {}
        self._interval = interval
        self._answers: list[Answer] = []
        self._changed = threading.Condition()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection = http.client.HTTPConnection(*self._where, timeout=5)
        while not self._done.is_set():
            try:
                connection.request("GET", self._path, headers=self._headers)
                response = connection.getresponse()
                body = response.read().decode(errors="replace").strip()
                answer = Answer(time.monotonic(), response.status, body)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                answer = Answer(time.monotonic(), 0, repr(error))
            with self._changed:
                self._answers.append(answer)
                self._changed.notify_all()
            self._done.wait(self._interval)
        connection.close()

    @property
    def answers(self) -> list[Answer]:
        with self._changed:
            return list(self._answers)

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if not 200 <= answer.status < 300]

    def counts(self) -> Counter[str]:
        """How often each body came."""
        return Counter(answer.body for answer in self.answers)

    def next(self, count: int) -> Counter[str]:
        """How often each body comes in so many answers to requests from now on."""
        start = len(self.answers) + 1  # without the one that is under way
        deadline = Deadline(WAIT)
        with self._changed:
            while not self._changed.wait_for(
                lambda: len(self._answers) >= start + count, deadline.left()
            ):
                assert not deadline.over(), f"{len(self._answers) - start} of {count} answers"
            return Counter(answer.body for answer in self._answers[start : start + count])

    def wait_body(self, body: str, timeout: float = WAIT, *, after: float = 0.0) -> Answer:
        """The first answer with this body (and later than `after`)."""
        found: list[Answer] = []

        def seen() -> bool:
            found[:] = [a for a in self._answers if a.body == body and a.time > after][:1]
            return bool(found)

        deadline = Deadline(timeout)
        with self._changed:
            while not self._changed.wait_for(seen, deadline.left()) and not deadline.over():
                pass
            if not found:
                raise TimeoutError(f"no {body!r} within {timeout} s: {self._answers[-3:]}")
        return found[0]

    def close(self) -> None:
        self._done.set()
        self._thread.join(10)
