"""Run the server of `pctrain report --watch` in a thread, for tests that send requests to it."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path

from pctrain.report import watch


class Serving:
    """Run a server in a thread, as `watch.main` makes it."""

    def __init__(self, source: Path) -> None:
        self.server = watch.serve(source, 0)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer, text

    def data(self) -> dict:
        answer, text = self.get("/data.json")
        assert answer.status == 200
        return json.loads(text)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
