"""Weights in flat buckets are the weights: at any layout, family and size of the bucket."""

import pytest
import torch
import torch.distributed as dist

from tests.helpers import families, small

LAYOUTS = {"TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2}), "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2})}


SIZES = (1, 40_000, 512 << 20)  # one parameter a bucket, a few, all of a stage


def _compare(directory, layout):
    """Names and bits against one parameter at a time; how many collectives that took, and the buckets of each size."""
    from unittest import mock

    from pctrain.core import weight_buckets, weights

    model = small.learner(directory, layout, train=False)
    arguments = model.modules, model.hf, model._te
    with (
        mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as broadcast,
        mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gather,
    ):
        one, calls = list(weights.export_hf(*arguments)), []
        for bucket_bytes in (None, *SIZES):
            if bucket_bytes is not None:
                bucketed = list(weight_buckets.stream_hf(*arguments, bucket_bytes=bucket_bytes))
                assert [name for name, _ in bucketed] == [name for name, _ in one]
                # Compared when the whole stream is there: what a later bucket overwrote would show.
                assert all(
                    torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(one, bucketed, strict=True)
                )
            calls.append(broadcast.call_count + gather.call_count)
            broadcast.reset_mock()
            gather.reset_mock()
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_buckets_bring_what_single_parameters_bring(ranks, hf_dirs, layout, tied):
    world, parallel = LAYOUTS[layout]
    for one, _, few, all_of_a_stage in ranks.run(_compare, hf_dirs[tied], parallel, world=world):
        assert few < one / 2
        assert all_of_a_stage <= 4  # two stages, of each a broadcast and a gather


@pytest.mark.parametrize(
    "layout",
    [{"expert": 2}, {"tensor": 2, "expert": 2, "sequence_parallel": True}, {"pipeline": 2, "expert": 2}],
    ids=["EP2", "TP2 x EP2", "EP2 x PP2"],
)
def test_experts(ranks, tmp_path, layout):
    """At EP2 x PP2 the senders change at other parameters for the ranks of one stage than for those of the other."""
    directory = families.make("qwen3-moe", tmp_path / "moe")
    for one, _, few, _ in ranks.run(
        _compare, directory, layout, world=2 * layout.get("tensor", 1) * layout.get("pipeline", 1)
    ):
        assert few < one


def test_the_next_bucket_is_under_way_while_one_is_loaded(ranks, hf_dirs):
    for ahead in ranks.run(_ahead, hf_dirs[False], {"tensor": 2}, world=2):
        assert max(ahead) == 1 and ahead[0] == 1  # one more than is being read, never more


def _ahead(directory, layout):
    """Return, for each tensor, the buckets started less the one that it comes from."""
    from unittest import mock

    from pctrain.core import weight_buckets

    model = small.learner(directory, layout, train=False)
    started, unpacked, ahead = [], [], []
    send, unpack = weight_buckets._send, weight_buckets._unpack

    def sending(*args):
        started.append(1)
        return send(*args)

    def unpacking(*args):
        unpacked.append(1)
        yield from unpack(*args)

    with mock.patch.multiple(weight_buckets, _send=sending, _unpack=unpacking):
        stream = weight_buckets.stream_hf(model.modules, model.hf, model._te, bucket_bytes=40_000)
        ahead += [len(started) - len(unpacked) for _ in stream]
    assert len(started) > 3
    return ahead
