"""Several sources as one numbered set, and the batch that is made ahead."""

import threading
import time

import numpy as np
import pytest

from pctrain.common.errors import UserError
from pctrain.config.tree import SourceConfig
from pctrain.data.packing import pack_rows
from pctrain.data.prefetch import prefetch
from pctrain.data.rows import make_row
from pctrain.data.trajectories import SOURCE, Trajectories, source_names


class Store(list):
    """As a TokenStore, without files."""

    def __init__(self, name, lengths):
        super().__init__(make_row([1], [10 * len(lengths) + i] * (length - 1)) for i, length in enumerate(lengths))
        self.name, self.lengths, self.loss_tokens = name, np.array(lengths, np.int32), np.array(lengths, np.int32) - 1
        self.tokens, self.counts = sum(lengths), {"overlong": 2} if name == "b" else {}

    def id(self, index):
        return f"{self.name}.jsonl:{index + 1}"


def two_sources():
    sources = [SourceConfig(path="x/a.jsonl.gz", weight=2), SourceConfig(path="y/*.parquet", name="b")]
    return Trajectories(sources, [Store("a", [3, 5]), Store("b", [2, 7, 4])])


def test_samples_are_numbered_through_and_know_their_source():
    data = two_sources()
    assert (data.names, data.weights, data.sizes, len(data)) == (["a", "b"], [2.0, 1.0], [2, 3], 5)
    assert data.lengths.tolist() == [3, 5, 2, 7, 4] and data.loss_tokens.tolist() == [2, 4, 1, 6, 3]
    assert [data.id(i) for i in (1, 2, 4)] == ["a.jsonl:2", "b.jsonl:1", "b.jsonl:3"]
    assert [data[i].streams[SOURCE][0] for i in range(5)] == [0, 0, 1, 1, 1]
    assert data[3].tokens.tolist() == [1] + [31] * 6
    assert data.describe() == [
        "a: 2 trajectories, 8 tokens, 6 trained on, weight 2",
        "b: 3 trajectories, 13 tokens, 10 trained on, 2 overlong",
    ]


def test_a_selection_packs_as_the_rows_themselves():
    data = two_sources()
    chosen = [4, 0, 0, 3]
    ours, plain = pack_rows(data.select(chosen), 32), pack_rows([data[i] for i in chosen], 32)
    assert (ours.loss_tokens, ours.tokens, ours.sequences) == (plain.loss_tokens, plain.tokens, 4) == (13.0, 17, 4)
    assert ours.packs[0].tokens.tolist() == plain.packs[0].tokens.tolist()
    assert ours.packs[0].streams[SOURCE].tolist() == plain.packs[0].streams[SOURCE].tolist()


def test_one_source_needs_no_stream():
    assert Trajectories([SourceConfig(path="a.jsonl")], [Store("a", [3])])[0].streams == {}


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(UserError, match=r"the name 'train'; expected different names. Set `name`"):
        source_names([SourceConfig(path="x/train.jsonl"), SourceConfig(path="y/train.parquet")])
    assert source_names([SourceConfig(path="x/train.jsonl"), SourceConfig(path="y/train.parquet", name="y")]) == [
        "train",
        "y",
    ]


# ---- prefetching


def test_batches_come_in_order_and_one_ahead():
    made = []
    for step, batch, waited in prefetch(lambda step: made.append(step) or step * 10, range(3, 6)):
        assert batch == step * 10 and waited >= 0
        deadline = time.monotonic() + 5
        while made[-1] != min(step + 1, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == list(range(3, min(step + 1, 5) + 1))
    assert list(prefetch(made.append, range(0))) == []


def test_what_the_making_raises_is_raised_where_the_batch_is_taken():
    def make(step):
        if step == 1:
            raise UserError("row 7 is broken")
        return step

    batches = prefetch(make, range(3))
    assert next(batches)[1] == 0
    with pytest.raises(UserError, match="row 7"):
        next(batches)


def test_a_loop_that_is_left_early_leaves_no_thread():
    for step, *_ in prefetch(lambda step: step, range(100)):
        if step == 2:
            break
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("prefetch") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
