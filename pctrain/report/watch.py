"""`pctrain report RUN --watch`: the report of a run that goes on, served on this machine alone.

Two addresses answer: the page, and data.json, which the page asks for every few seconds. The files are read again when they have changed,
and no oftener than a tenth of the time that reading takes would allow: the run needs the processor more. What cannot be read at the moment
(a line half written, a stage that is just beginning) leaves the last state on the page, with a note.
"""

from __future__ import annotations

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

POLL_SECONDS = 3.0  # between two questions of the page
READING_SHARE = 0.1  # of one processor, at most, goes into reading and fitting
WATCHED = ("metrics.jsonl", "ledger.jsonl", "config.yaml", "start.json", "step-*.jsonl")
LOCALHOST = "127.0.0.1"


def main(source: Path, port: int = 0) -> None:
    """Serve until Ctrl-C (or SIGTERM). `port` 0: any free one. UserError where `source` is no folder or the port is taken."""
    server = serve(source, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = make_console()
    console.print(
        f"Watching {source}: http://{LOCALHOST}:{server.server_port}/   (Ctrl-C ends it)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    sys.stdout.flush()
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        console.print("Stopped watching; the run itself is not touched.")
    finally:
        server.server_close()


def serve(source: Path, port: int) -> _Server:
    """A server that listens on this machine alone, and has yet to be set going."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; --watch takes the folder of a study or a run")
    try:
        server = _Server((LOCALHOST, port), _Handler)
    except OSError as error:
        raise UserError(
            f"--port={port}: cannot be listened at ({error.strerror}); give another one, or none for any free port"
        ) from None
    server.watched = Watched(source)
    return server


@dataclass
class Watched:
    """The newest report of a folder that could be made."""

    source: Path
    report: report.Report | None = None
    note: str = ""
    read_at: str = ""
    _signature: str = ""
    _not_before: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> None:
        """Read again where a file has changed and the last reading is long enough ago."""
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
        """ETag of the state: another one means other content."""
        return '"' + hashlib.sha256(f"{self._signature} {self.note}".encode()).hexdigest()[:16] + '"'

    def live(self) -> dict[str, Any]:
        return {"tag": self.tag, "read": self.read_at, "seconds": POLL_SECONDS, "note": self.note}

    def page(self) -> str:
        return self.report.page(self.live()) if self.report else page.waiting(self.source.name, self.note, POLL_SECONDS)

    def data(self) -> dict[str, Any]:
        return page.page_data(self.report.charts, self.live()) | {"sections": self.report.sections()}


def _signature(source: Path) -> str:
    """Sizes and times of all files that a report is made from."""
    stats = []
    for pattern in WATCHED:
        for file in sorted(source.rglob(pattern)):
            try:
                stat = file.stat()
            except FileNotFoundError:  # renamed between the listing and here
                continue
            stats.append(f"{file} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(stats).encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    watched: Watched


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.0"  # a connection a question: none outlives the server
    timeout = 30  # seconds: a connection that says nothing does not hold a thread for ever

    def do_GET(self) -> None:
        if not self._is_ours():
            # A page from elsewhere can make its own name point here; it cannot change what the browser says it asked for.
            return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "Ask for 127.0.0.1 or localhost.\n")
        watched = self.server.watched
        if self.path not in ("/", "/data.json"):
            return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is only the report here, at /.\n")
        watched.refresh()
        if self.path == "/":
            return self._answer(HTTPStatus.OK, "text/html", watched.page())
        if watched.report is None:
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", watched.note + "\n")
        if self.headers.get("If-None-Match") == watched.tag:
            return self._answer(HTTPStatus.NOT_MODIFIED, "application/json", "", tag=watched.tag)
        self._answer(
            HTTPStatus.OK,
            "application/json",
            json.dumps(watched.data(), ensure_ascii=False, allow_nan=False),
            tag=watched.tag,
        )

    def _is_ours(self) -> bool:
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
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the reader has closed the page

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent: a line every few seconds would push the address off the screen."""
