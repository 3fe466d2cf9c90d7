"""The fake device itself: what counts as a wait of the host, what is refused, and how memory is summed."""

import json

import pytest

from tests.fake_cuda import build, reports

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]
WAITS = {
    "real work on the host": {},
    "matrix product and its gradient": {},
    "item": {"item": 1},
    "condition": {"item": 1},
    "list of the values": {"copy to the host": 1},
    "list of tensors": {"item": 2},
    "blocking copy to the device": {"copy to the device": 1},
    "value made on the device": {"copy to the device": 1},
    "blocking copy from pinned memory": {"copy to the device": 1},
    "non-blocking copy from pageable memory": {"copy to the device from pageable memory": 1},
    "non-blocking copy from pinned memory": {},
    "non-blocking copy of a part of pinned memory": {},
    "non-blocking copy into a tensor": {},
    "copy to the host": {"copy to the host": 1},
    "non-blocking copy to the host": {},
    "non-blocking copy into pageable memory": {"copy to the host": 1},
    "non-blocking copy into pinned memory": {},
    "and back": {},
    "nonzero": {"nonzero": 1},
    "read by a mask": {"index by a mask": 1},
    "write by a mask": {"index by a mask": 2},
    "one value by a mask": {},
    "index on the host": {"index on the host": 1},
    "synchronize": {"synchronize": 1},
    "event": {"synchronize": 1},
    "mixed devices": {},
    "numpy": {},
}
RAISED = {"mixed devices": "FakeTensorDeviceMismatchError", "numpy": "TypeError"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = reports.run_module("tests.fake_cuda.mode_program", tmp_path_factory.mktemp("mode"), "{}")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_counts_as_a_wait(found):
    assert {name: found[name]["waits"] for name in WAITS} == WAITS


def test_what_is_refused(found):
    assert {name: found[name]["raised"] for name in WAITS if found[name]["raised"]} == RAISED


def test_memory_is_counted_by_storage_in_steps_of_512_bytes(found):
    assert found["memory"] == {"held": 4096, "left": 0, "peak": 4096}


def test_a_wait_that_is_not_pinned_is_named():
    waits = [("sft 1", "item", "a.py:f", 3, [7]), ("sft 2", "item", "a.py:f", 5, [7])]
    report = reports.Report("", 0, waits, {}, [])
    per_micro_batch, per_step = report.per_micro_batch_and_step("sft", (1, 2))
    assert (per_micro_batch, per_step) == ({"item: a.py:f": 2}, {"item: a.py:f": 1})
    assert reports.difference("sft, per step", per_step, {"nonzero: b.py:g": 2}, report) == [
        "sft, per step: item: a.py:f (line 7): counted 1, pinned 0",
        "sft, per step: nonzero: b.py:g: counted 0, pinned 2",
    ]


def test_waits_that_do_not_follow_the_micro_batches_are_an_error():
    waits = [(f"sft {n}", "item", "a.py:f", n * n, [7]) for n in (1, 2, 4)]
    with pytest.raises(AssertionError, match=r"item: a\.py:f: by micro-batches \{1: 1, 2: 4, 4: 16\}"):
        reports.Report("", 0, waits, {}, []).per_micro_batch_and_step("sft", (1, 2, 4))
