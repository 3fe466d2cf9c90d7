"""`pctrain report RUN --watch`: serve the report of a run in progress, on this machine only.

There are two addresses: the page, and data.json, which the page fetches every few seconds. The files are read again
after they change, but reading may use at most a tenth of the time, because the run needs the processor more. If a file
cannot be read at the moment (a line is half written, a stage is just starting), the page keeps its last state, with a
note.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.report import command as report
from pctrain.report import page
from pctrain.report.command import Report

POLL_SECONDS = 3.0  # between two requests of the page
READING_SHARE = 0.1  # largest share of one processor spent on reading and fitting
WATCHED = ("metrics.jsonl", "ledger.jsonl", "config.yaml", "start.json", "step-*.jsonl")
LOCALHOST = "127.0.0.1"


def main(source: Path, port: int = 0) -> None:
    """Serve until Ctrl-C (or SIGTERM). Port 0 takes any free port.

    Raises:
        UserError: `source` is not a folder, or the port is taken.
    """
    server = serve(source, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = make_console()
    console.print(
        f"Watching {source}: http://{LOCALHOST}:{server.server_port}/   (Ctrl-C stops it)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    sys.stdout.flush()
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        console.print("Stopped watching. The run itself is not affected.")
    finally:
        server.server_close()


def serve(source: Path, port: int) -> _Server:
    """Return a server that listens on this machine only; the caller starts it."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder. --watch needs the folder of a study or a run.")
    try:
        server = _Server((LOCALHOST, port), _Handler)
    except OSError as error:
        raise UserError(
            f"--port={port}: cannot listen on this port ({error.strerror}). Give another one, or leave out --port for "
            "any free port."
        ) from None
    server.watched = WatchedFolder(source)
    return server


@dataclass
class WatchedFolder:
    """A folder and the newest report that could be made of it."""

    source: Path
    report: Report | None = None
    note: str = ""
    read_at: str = ""
    _signature: str = ""
    _not_before: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> None:
        """Read again if a file has changed and the last reading is long enough ago."""
        with self._lock:
            now = time.monotonic()
            if now < self._not_before:
                return
            signature = _signature(self.source)
            if signature == self._signature:
                return
            try:
                self.report = report.make(self.source)
                self.note, self._signature = "", signature
                self.read_at = time.strftime("%H:%M:%S")
            except UserError as error:
                self.note = str(error)
            self._not_before = time.monotonic() + (time.monotonic() - now) / READING_SHARE

    @property
    def tag(self) -> str:
        """ETag of the state; it changes with the content."""
        return '"' + hashlib.sha256(f"{self._signature} {self.note}".encode()).hexdigest()[:16] + '"'

    def live(self) -> dict[str, Any]:
        """Return the fields that the page shows about its updates."""
        return {"tag": self.tag, "read": self.read_at, "seconds": POLL_SECONDS, "note": self.note}

    def page(self) -> str:
        """Return the report, or a page that waits for one."""
        if self.report is None:
            return page.waiting(self.source.name, self.note, POLL_SECONDS)
        return self.report.page(self.live())

    def data(self, newest: Report) -> dict[str, Any]:
        """Return data.json of the newest report."""
        return page.page_data(newest.charts, self.live()) | {"sections": newest.sections()}


def _signature(source: Path) -> str:
    """Return a hash of the sizes and times of all files that a report is made from."""
    stats = []
    for pattern in WATCHED:
        for file in sorted(source.rglob(pattern)):
            try:
                stat = file.stat()
            except FileNotFoundError:  # renamed since it was listed
                continue
            stats.append(f"{file} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(stats).encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    watched: WatchedFolder


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.0"  # one request per connection: no connection outlives the server
    timeout = 30  # seconds; an idle connection must not hold a thread forever

    def do_GET(self) -> None:
        """Answer with the page or its data."""
        if not self._names_this_machine():
            # Another site can make its own name resolve to this machine, but the browser still sends that name.
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "Use the address 127.0.0.1 or localhost.\n")
        elif self.path == "/":
            self.server.watched.refresh()
            self._answer(HTTPStatus.OK, "text/html", self.server.watched.page())
        elif self.path == "/data.json":
            self.server.watched.refresh()
            self._answer_data(self.server.watched)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "Only the report is served here, at /.\n")

    def _answer_data(self, watched: WatchedFolder) -> None:
        if watched.report is None:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", watched.note + "\n")
        elif self.headers.get("If-None-Match") == watched.tag:
            self._answer(HTTPStatus.NOT_MODIFIED, "application/json", "", tag=watched.tag)
        else:
            text = json.dumps(watched.data(watched.report), ensure_ascii=False, allow_nan=False)
            self._answer(HTTPStatus.OK, "application/json", text, tag=watched.tag)

    def _names_this_machine(self) -> bool:
        port = self.server.server_port
        return self.headers.get("Host") in (f"{LOCALHOST}:{port}", f"localhost:{port}")

    def _answer(self, status: HTTPStatus, kind: str, text: str, tag: str | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in (headers | ({"ETag": tag} if tag else {})).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader has closed the page
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: a line every few seconds would push the address off the screen."""
