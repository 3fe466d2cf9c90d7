"""One engine in the learner's process: checked weight updates, reproducible samples, an undisturbed learner."""

import os
import random
from itertools import chain

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pctrain.common.errors import UserError
from pctrain.config.tree import RolloutConfig
from pctrain.rollout import Request, RolloutEngine, sampling_seed

EOS, CONTEXT, TEMPERATURE = 2, 256, 0.7  # a temperature other than 1, so that forgetting it shows
# fp32 noise of two implementations: know-how on this stack measures 1.1e-5; wrong weights or a stale cache give more
# than 0.1.
CLOSE, WRONG = 1e-4, 0.1
DRAW = random.Random(0)
LONG = [DRAW.randrange(3, 320) for _ in range(200)]  # longer than a cache block (128)
PROMPTS = [[DRAW.randrange(3, 320) for _ in range(12)] for _ in range(3)] + [LONG]


def process_state() -> dict:
    """Everything of the learner's process that vLLM is known to change."""
    return {
        "environment": dict(os.environ),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "set_num_threads": torch.set_num_threads,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
    }


class Rig:
    """An engine, and the model whose weights it should have."""

    def __init__(self, tiny, directory, tied):
        self.tiny, self.tied = tiny, tied
        self.model = tiny.build(tied, seed=0)
        self.model.save_pretrained(directory)
        before = process_state()
        rollout = RolloutConfig(temperature=TEMPERATURE, kv_cache_mb=64)
        self.engine = RolloutEngine(directory, rollout, dtype="float32", context=CONTEXT, eos_id=EOS)
        self.state_kept = process_state() == before

    def update_weights(self, seed):
        self.model = self.tiny.build(self.tied, seed)
        return self.engine.load_weights(self.tiny.stream(self.model))

    def difference(self) -> float:
        return self.engine.verify(self.tiny.oracle(self.model, TEMPERATURE), PROMPTS, EOS)


@pytest.fixture(scope="module")
def rigs(tiny, tmp_path_factory):
    """Both engines live in this process at once, and are closed one after the other."""
    made = {tied: Rig(tiny, tmp_path_factory.mktemp(f"tied_{tied}"), tied) for tied in (True, False)}
    yield made
    made[True].engine.close()
    assert made[False].difference() < CLOSE, "closing one engine broke the other"
    made[False].engine.close()
    assert not dist.is_initialized()  # vLLM made the default group itself here, so it is gone again


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def rig(request, rigs):
    return rigs[request.param]


@pytest.fixture
def tied(rigs):
    return rigs[True]


def requests(n, length=12, purpose="test"):
    draw = random.Random(n * length)
    return [
        Request([draw.randrange(3, 320) for _ in range(length)], sampling_seed(0, purpose, 0, i, 0)) for i in range(n)
    ]


def tokens(completions):
    return [completion.token_ids for completion in completions]


def test_logprobs_follow_the_updated_weights(rig):
    assert rig.difference() < CLOSE  # the weights of the directory; fills the prefix cache with the long prompts
    for seed in (1, 2):
        update = rig.update_weights(seed)
        assert rig.difference() < CLOSE
    assert update.bytes == sum(tensor.nbytes for _, tensor in rig.tiny.stream(rig.model)) and update.seconds > 0


def test_a_stale_prefix_cache_is_noticed(rig, monkeypatch):
    rig.difference()
    with monkeypatch.context() as patch:
        patch.setattr(rig.engine._llm, "reset_prefix_cache", lambda: True)
        rig.update_weights(3)
        assert rig.difference() > WRONG
    rig.update_weights(3)
    assert rig.difference() < CLOSE


def test_a_stale_tied_head_is_noticed_and_refused(tied):
    new = tied.tiny.build(True, seed=4)
    headless = [(name, tensor) for name, tensor in tied.tiny.stream(new) if name != "lm_head.weight"]
    with pytest.raises(UserError, match=r"1 of \d+ tensors did not come: lm_head\.weight"):
        tied.engine.load_weights(iter(headless))
    with pytest.raises(RuntimeError, match="load_weights first"):
        tied.engine.generate(requests(1), temperature=1.0, max_response=2)
    tied.engine._usable = True  # past the refusal, the check by log-probs sees it too
    tied.model = new
    assert tied.difference() > WRONG
    tied.update_weights(4)
    assert tied.difference() < CLOSE


def test_bad_streams_are_refused_by_name(tied):
    model = tied.tiny.build(True, seed=5)
    shapes = {"model.norm.weight": torch.zeros(7)}
    scratch = torch.empty(1 << 16)

    def reused_buffer():
        for name, tensor in tied.tiny.stream(model):
            yield name, scratch[: tensor.numel()].view_as(tensor).copy_(tensor)

    with pytest.raises(UserError, match=r"'model.layers.9.x', which the rollout engine's model does not have"):
        tied.engine.load_weights(chain(tied.tiny.stream(model), [("model.layers.9.x", torch.zeros(1))]))
    with pytest.raises(UserError, match=r"'model.norm.weight' twice"):
        tied.engine.load_weights(chain(tied.tiny.stream(model), [("model.norm.weight", torch.zeros(128))]))
    with pytest.raises(UserError, match=r"'model.norm.weight' has shape \(7,\), .* expects \(128,\)"):
        tied.engine.load_weights((name, shapes.get(name, tensor)) for name, tensor in tied.tiny.stream(model))
    with pytest.raises(ValueError, match="shares the storage of"):
        tied.engine.load_weights(reused_buffer())
    tied.update_weights(5)  # and none of it is remembered
    assert tied.difference() < CLOSE


def test_samples_depend_on_the_seed_alone(rig):
    """Not on the batch, its order, or on log-probs being asked for: resumed runs rely on it bit for bit."""
    batch = requests(48)
    plain = rig.engine.generate(batch, temperature=1.0, max_response=20)
    scored = rig.engine.generate(batch, temperature=1.0, max_response=20, logprobs=True)
    assert tokens(plain) == tokens(scored)
    assert plain[0].logprobs is None
    backwards = rig.engine.generate(batch[::-1][:20], temperature=1.0, max_response=20, logprobs=True)
    assert backwards == scored[::-1][:20]
    alone = [
        rig.engine.generate([request], temperature=1.0, max_response=20, logprobs=True)[0] for request in batch[:5]
    ]
    assert alone == scored[:5]
    other_seeds = [Request(request.prompt_ids, request.seed + 1) for request in batch]
    assert tokens(rig.engine.generate(other_seeds, temperature=1.0, max_response=20)) != tokens(plain)


def steps_of(engine, patch, act) -> int:
    """How often vLLM steps while `act()` runs."""
    count, step = [0], engine._llm.llm_engine.step

    def counted():
        count[0] += 1
        return step()

    with patch.context() as here:
        here.setattr(engine._llm.llm_engine, "step", counted)
        act()
    return count[0]


def test_batches_are_what_each_would_be_alone(rig):
    together = requests(90, length=9)
    each = [together[:40], together[40:80], together[80:], []]
    alone = [rig.engine.generate(batch, temperature=1.0, max_response=25) for batch in each]
    assert list(rig.engine.generate_batches(each, temperature=1.0, max_response=25)) == alone
    assert [len(batch) for batch in alone] == [40, 40, 10, 0]


def test_the_next_batch_begins_before_the_last_response_ends(tied, monkeypatch):
    """One long response a batch: batch after batch takes 24 steps each, fed without a pause they overlap."""
    long, short = requests(1, length=8), requests(3, length=7)
    each = [[Request(long[0].prompt_ids, 7), *(Request(one.prompt_ids, one.seed, max_response=4) for one in short)]] * 4
    sampled = []
    apart = steps_of(
        tied.engine,
        monkeypatch,
        lambda: [tied.engine.generate(batch, temperature=0.0, max_response=24) for batch in each],
    )
    fed = steps_of(
        tied.engine,
        monkeypatch,
        lambda: sampled.extend(tied.engine.generate_batches(each, temperature=0.0, max_response=24)),
    )
    assert len(sampled) == 4 and fed * 2 < apart


def test_no_more_than_a_few_batches_are_in_the_engine(tied):
    """A kill loses little and memory stays small, however many batches come."""
    asked = []

    def coming():
        for index in range(20):
            asked.append(index)
            yield requests(1, length=5 + index)

    taken = tied.engine.generate_batches(coming(), temperature=1.0, max_response=6)
    next(taken)
    assert len(asked) < 10
    assert len(list(taken)) == 19 and len(asked) == 20


def test_batches_left_half_way_are_not_mixed_into_the_next_call(tied):
    short = [Request(one.prompt_ids, one.seed, max_response=2) for one in requests(2)]
    taken = tied.engine.generate_batches([short, requests(20, length=20)], temperature=1.0, max_response=60)
    next(taken)
    for act in (
        lambda: tied.engine.generate(requests(1), temperature=1.0, max_response=2),
        lambda: tied.update_weights(7),
        tied.difference,
    ):
        with pytest.raises(RuntimeError, match="left requests behind"):
            act()
    list(taken)
    tied.update_weights(7)
    assert tied.difference() < CLOSE


def test_the_end_of_a_response(rig):
    completions = rig.engine.generate(requests(200), temperature=1.5, max_response=30)
    assert {completion.finish for completion in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.finish == "stop"
        assert EOS not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == EOS) == stopped
        assert len(completion.token_ids) == 30 or stopped


def test_the_end_of_the_context(tied):
    (completion,) = tied.engine.generate(requests(1, length=250), temperature=0.0, max_response=30)
    assert completion.finish == "stop" or len(completion.token_ids) == 6


def test_greedy_is_the_oracles_argmax(rig):
    (completion,) = rig.engine.generate([Request(PROMPTS[0], 0)], temperature=0.0, max_response=10)
    row = list(PROMPTS[0])
    for token in completion.token_ids:
        with torch.no_grad():
            assert rig.model(torch.tensor([row])).logits[0, -1].argmax().item() == token
        row.append(token)


def test_top_p_is_for_evaluation_alone(tied):
    greedy = tokens(tied.engine.generate(requests(8), temperature=0.0, max_response=8))
    assert tokens(tied.engine.generate(requests(8), temperature=1.0, top_p=1e-6, max_response=8)) == greedy
    assert tokens(tied.engine.generate(requests(8), temperature=1.0, max_response=8)) != greedy
    with pytest.raises(ValueError, match="full distribution"):
        tied.engine.generate(requests(1), temperature=1.0, top_p=0.9, max_response=8, logprobs=True)


def test_more_prompts_than_one_pass_takes(tied):
    """100 x 200 tokens exceed one forward pass; a prompt cut in two would have to rewind its generator."""
    batch = requests(100, length=200)
    together = tied.engine.generate(batch, temperature=1.0, max_response=3)
    assert together[90] == tied.engine.generate([batch[90]], temperature=1.0, max_response=3)[0]


def test_the_learners_process_is_left_alone(rig):
    assert rig.state_kept, "starting the engine changed the process"
    before = process_state()
    rig.engine.generate(requests(3), temperature=1.0, max_response=3, logprobs=True)
    rig.update_weights(6)
    assert process_state() == before


def test_impossible_requests(tied):
    for prompt in ([], [5] * CONTEXT):
        with pytest.raises(UserError, match="Expected 1 to 255"):
            tied.engine.generate([Request(prompt, 1)], temperature=1.0, max_response=2)
    with pytest.raises(TypeError, match="seed"):
        tied.engine.generate([Request([5], None)], temperature=1.0, max_response=2)
    assert tied.engine.generate([], temperature=1.0, max_response=2) == []


def test_a_log_prob_that_is_no_number_fails_the_check(tied):
    assert tied.engine.verify(lambda rows: [np.full(len(row), np.nan) for row in rows], PROMPTS, EOS) == float("inf")


def test_unusable_directories_and_layouts(tmp_path):
    with pytest.raises(UserError, match=r"config\.json and \*\.safetensors"):
        RolloutEngine(tmp_path, RolloutConfig(), dtype="float32", context=CONTEXT, eos_id=EOS)


def test_more_ranks_in_an_engine_than_there_are(rigs, tiny, tmp_path):
    tiny.build(True, 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"rollout\.tensor=2 does not divide the world size 1"):
        RolloutEngine(tmp_path, RolloutConfig(tensor=2), dtype="float32", context=CONTEXT, eos_id=EOS)


def test_a_head_size_that_vllm_cannot_compute(rigs, tiny, tmp_path):
    model = tiny.build(True, 0)
    model.config.num_attention_heads = 8  # 128 / 8 = 16
    model.config.head_dim = 16
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="16 wide; vLLM on CPU supports 32"):
        RolloutEngine(tmp_path, RolloutConfig(), dtype="float32", context=CONTEXT, eos_id=EOS)


def test_a_context_beyond_the_models(rigs, tiny, tmp_path):
    tiny.build(True, 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vLLM refuses .* context 512"):
        RolloutEngine(tmp_path, RolloutConfig(), dtype="float32", context=512, eos_id=EOS)
