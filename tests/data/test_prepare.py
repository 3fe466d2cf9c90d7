"""Several jobs that start in one folder at once make what a config leaves to be made, once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
from pctrain.config.load import load
from pctrain.data import arithmetic, prepare
from pctrain.data.prepare import prepare as make
real = arithmetic.write_sets
def counted(*arguments):
    print("made", flush=True)
    return real(*arguments)
arithmetic.write_sets = counted
options = ["--data.problems.train=80", "--data.problems.rl=20", "--data.problems.test=20"]
config = make(load(None, options), Path(sys.argv[1]))
assert config.data.rl.exists() and (config.model.path / "config.json").exists()
"""


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_jobs_that_begin_at_once_make_everything_once(tmp_path):
    command, pipes = (
        [sys.executable, "-c", SCRIPT],
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    jobs = [subprocess.Popen([*command, str(tmp_path / "many")], **pipes) for _ in range(2)]
    told = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
    assert "".join(out for out, _ in told) == "made\n"
    assert ".prepare.lock" not in digests(tmp_path / "many")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".prepare.lock").touch()  # of a job that was killed
    assert subprocess.run([*command, str(tmp_path / "one")], capture_output=True, timeout=120).returncode == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "many")
