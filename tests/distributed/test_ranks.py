"""The fixture `ranks` itself: a failing or hanging rank is named, and the next call works again."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RanksFailed


def add_up(value):
    total = torch.tensor([float(value * (dist.get_rank() + 1))])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), os.environ["RANK"]


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"broken on purpose on {rank}")
    time.sleep(600)  # busy with something else, so it does not notice


def meet_without(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"broken on purpose on {rank}")
    dist.barrier()  # the failed rank never arrives


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(600)


def fail_everywhere():
    raise KeyError("everywhere")


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)


def die_on_and_raise_elsewhere(rank):
    die_on(rank)
    raise ValueError("the other one is gone")


def tensor_parallel_size(size):
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=size
    )  # a second initialization without a tear-down would fail
    return parallel_state.get_tensor_model_parallel_world_size()


def process_id():
    return os.getpid()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_function_runs_on_every_rank(ranks, world):
    total = 3.0 * world * (world + 1) / 2
    assert ranks.run(add_up, 3, world=world) == [(rank, world, total, str(rank)) for rank in range(world)]


def test_the_processes_stay_alive_between_calls(ranks):
    assert ranks.run(process_id) == ranks.run(process_id)


def test_a_failing_rank_is_named_with_its_traceback(ranks, monkeypatch):
    monkeypatch.setattr("tests.helpers.ranks.GRACE_SECONDS", 2.0)  # rank 0 will not answer, however long the deadline
    said = r"(?s)rank 1 failed:.*fail_on.*ValueError: broken on purpose on 1.*no answer .* rank\(s\) 0"
    with pytest.raises(RanksFailed, match=said) as failure:
        ranks.run(fail_on, 1)
    assert isinstance(failure.value.causes[1], ValueError)
    assert len(ranks.run(add_up, 1)) == 2  # the next call finds working ranks


def test_a_collective_without_a_failed_rank_ends_at_once(ranks):
    with pytest.raises(RanksFailed, match=r"(?s)ValueError: broken on purpose on 1") as failure:
        ranks.run(meet_without, 1)
    assert set(failure.value.causes) == {0, 1}


def test_an_error_on_all_ranks_keeps_the_processes(ranks):
    before = ranks.run(process_id)
    with pytest.raises(RanksFailed) as failure:
        ranks.run(fail_everywhere)
    assert set(failure.value.causes) == {0, 1}
    assert ranks.run(process_id) == before


def test_a_hanging_rank_is_named_within_the_deadline(ranks):
    with pytest.raises(RanksFailed, match=r"no answer within 1 s from rank\(s\) 0$"):
        ranks.run(hang_on, 0, deadline=1)
    # Reaching this line shows that nobody waited for the rank's ten minutes of sleep.
    assert len(ranks.run(add_up, 1)) == 2


def test_a_dying_rank_is_named(ranks):
    with pytest.raises(RanksFailed, match=r"rank 0 failed:\nthe process died \(exit code 7\)"):
        ranks.run(die_on, 0)
    with pytest.raises(RanksFailed, match=r"rank 0 failed:\nthe process died \(exit code 7\)"):
        ranks.run(die_on_and_raise_elsewhere, 0)
    assert len(ranks.run(process_id)) == 2


def test_megatron_groups_are_taken_down_between_calls(ranks):
    assert ranks.run(tensor_parallel_size, 2) == [2, 2]
    assert ranks.run(tensor_parallel_size, 1) == [1, 1]
