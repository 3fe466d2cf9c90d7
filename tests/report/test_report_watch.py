"""`pctrain report RUN --watch`: who is answered and what, while a run writes; and the page that follows it."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pctrain.common.errors import UserError
from pctrain.report import watch
from tests.helpers.study_folders import STEP_RL, STEP_SFT, binomial_se, make_rl, make_study, rising
from tests.helpers.watch_server import Serving


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watch, "READING_SHARE", 1e9)  # every question may read
    make_rl(tmp_path / "rl", 150, "stable", rising(45.0, 72.0, 6))
    return tmp_path / "rl"


@pytest.fixture
def serving(run: Path) -> Iterator[Serving]:
    server = Serving(run)
    yield server
    server.stop()


def eval_line(step: int, score: float) -> str:
    return json.dumps(
        {
            "step": step,
            "kind": "eval",
            "eflops_sft": 150 * STEP_SFT,
            "eflops_rl": step * STEP_RL,
            "score": score,
            "score_se": binomial_se(score),
        }
    )


def points(data: dict) -> int:
    return len(data["charts"]["score_vs_compute"]["spec"]["series"][0]["x"])


def test_a_page_and_its_numbers_and_nothing_else(serving: Serving, run: Path) -> None:
    answer, text = serving.get("/")
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8" and 'id="live"' in text
    assert "connect-src &#39;self&#39;" in text and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert points(serving.data()) == 6
    for path in ("/metrics.jsonl", "/../rl/metrics.jsonl", "/config.yaml", "/%2e%2e/", "//etc/passwd", "/report.html"):
        assert serving.get(path)[0].status == 404
    assert serving.get("/", method="POST")[0].status == 501
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "ledger.jsonl",
        "metrics.jsonl",
        "rollouts",
        "start.json",
    ]


def test_only_this_machine_and_no_borrowed_name(serving: Serving) -> None:
    assert serving.server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{serving.port}", "127.0.0.1", "0.0.0.0"):
        assert serving.get("/data.json", Host=host)[0].status == 403
    assert serving.get("/data.json", Host=f"localhost:{serving.port}")[0].status == 200


def test_nothing_new_is_not_sent_again(serving: Serving, run: Path) -> None:
    tag = serving.get("/data.json")[0].headers["ETag"]
    answer, text = serving.get("/data.json", **{"If-None-Match": tag})
    assert (answer.status, text) == (304, "")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(eval_line(12, 71.0) + "\n")
    answer, text = serving.get("/data.json", **{"If-None-Match": tag})
    assert answer.status == 200 and points(json.loads(text)) == 7 and answer.headers["ETag"] != tag


def test_a_half_written_line_is_left_out_until_it_is_whole(serving: Serving, run: Path) -> None:
    whole, line = (run / "metrics.jsonl").read_text(), eval_line(12, 71.0)
    for cut in (1, len(line) // 2, len(line) - 1):
        (run / "metrics.jsonl").write_text(whole + line[:cut])
        data = serving.data()
        assert points(data) == 6 and data["live"]["note"] == ""
    (run / "metrics.jsonl").write_text(whole + line + "\n")
    assert points(serving.data()) == 7


def test_what_cannot_be_read_leaves_the_last_state_with_a_note(serving: Serving, run: Path) -> None:
    assert points(serving.data()) == 6
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{}\n" + whole)
    data = serving.data()
    assert points(data) == 6 and "metrics.jsonl:1" in data["live"]["note"]
    (run / "metrics.jsonl").write_text(whole + eval_line(12, 71.0) + "\n")
    data = serving.data()
    assert points(data) == 7 and data["live"]["note"] == ""


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "READING_SHARE", 1e9)
    (tmp_path / "<b>run").mkdir()
    server = Serving(tmp_path / "<b>run")
    try:
        answer, text = server.get("/")
        assert (
            answer.status == 200
            and "Waiting for the first numbers" in text
            and "&lt;b&gt;run" in text
            and "no runs here" in text
        )
        assert server.get("/data.json")[0].status == 503
        make_study(tmp_path / "<b>run")
        assert "RL from step 150 (stable)" in server.get("/")[1] and server.get("/data.json")[0].status == 200
    finally:
        server.stop()


def test_reading_takes_a_tenth_of_the_time_at_most(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "READING_SHARE", 0.1)
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    made = []

    def make(source: Path):
        made.append(now[0])
        now[0] += 2.0  # seconds that reading takes
        return None

    monkeypatch.setattr(watch.report, "make", make)
    watched = watch.WatchedFolder(run)
    for _ in range(60):
        with (run / "metrics.jsonl").open("a") as lines:
            lines.write("\n")
        watched.refresh()
        now[0] += 1.0
    assert len(made) == 3 and made[1] - made[0] >= 20


def test_it_ends_cleanly_on_ctrl_c_and_refuses_a_taken_port(serving: Serving, run: Path) -> None:
    command = [sys.executable, "-m", "pctrain", "report", str(run), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        port = int(first.split("http://127.0.0.1:")[1].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/nothing")
        assert connection.getresponse().status == 404
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (0, "") and "Stopped watching" in out
    with pytest.raises(UserError, match=f"--port={serving.port}: cannot listen on this port"):
        watch.main(run, serving.port)
    with pytest.raises(UserError, match="no such folder"):
        watch.main(run / "nowhere")
