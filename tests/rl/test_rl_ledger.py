"""The ledger's entries of a step of each algorithm, against the paper's formula for the tokens of that step."""

import contextlib

import numpy as np
import pytest

from pctrain.compute import flops
from pctrain.compute.flops import EFLOP
from pctrain.compute.ledger import Ledger
from pctrain.compute.model_shape import QWEN2_5_7B
from pctrain.config.tree import Config, RLConfig
from pctrain.core import Update
from pctrain.rl import costs
from pctrain.rl.algorithms import registry as algorithms
from pctrain.rl.batch import make_batch
from pctrain.rl.groups import Sampled
from pctrain.rl.update import train_on
from tests.helpers import rl_cases

PROMPTS, GROUP, RESPONSE, EXPERT = 3, 4, 6, 9
ON, OFF = len(rl_cases.PROMPT) + RESPONSE, len(rl_cases.PROMPT) + EXPERT


class PretendLearner:
    """Fake learner with every method that a step calls, without a model."""

    def pack(self, rows, token_budget, denominator=None):
        return rows

    def train_step(self, batch, loss, temperature):
        return Update(loss=0.0, metrics={}, grad_norm=1.0, lr=1e-6, skipped=False)

    def logprobs(self, rows, token_budget, temperature=1.0, trained_only=False):
        return [np.zeros(len(row), np.float32) for row in rows]

    def logprobs_and_entropies(self, rows, token_budget, temperature=1.0, trained_only=False):
        zeros = self.logprobs(rows, token_budget)
        return zeros, zeros

    @contextlib.contextmanager
    def reference(self):
        yield


def step_of(name, rewards, dropped=0, prefix=0, **options):
    """Return the ledger after one step. `rewards` has a list per kept group; rollouts have ON tokens, experts OFF."""

    def group(i, of_group):
        prefixes = [[] for _ in of_group[1:]] + [list(range(10, 10 + prefix))]
        responses = [[20] * (RESPONSE - len(given)) for given in prefixes]
        return rl_cases.group(i, of_group, responses, prefixes, expert=range(10, 10 + EXPERT))

    config = Config(rl=RLConfig(algorithm={"name": name, **options}, group=GROUP))
    sampled = Sampled([group(i, of_group) for i, of_group in enumerate(rewards)])
    for _ in range(dropped):
        sampled.groups.append(group(9, [0.0] * GROUP))
        sampled.groups[-1].rejection = "all wrong"
    ledger, learner, algorithm = Ledger(QWEN2_5_7B), PretendLearner(), algorithms.build(config.rl, 12)
    batch = make_batch(algorithm, sampled.kept, learner, config.rl, 1.0)
    costs.add_step(ledger, 1, sampled, batch, train_on(batch, learner, algorithm, config.rl, 1.0))
    return ledger


MIXED = [[1.0, 0.0, 1.0, 0.0]] * PROMPTS


def test_grpo():
    assert step_of("grpo", MIXED).eflops_rl * EFLOP == pytest.approx(
        flops.paper_grpo_step(QWEN2_5_7B, batch=PROMPTS, group=GROUP, mean_length=ON)
    )


@pytest.mark.parametrize("name", ["dapo_d", "dapo_dc"])
def test_dapo_counts_every_round(name):
    """Two rounds of four prompts, three of them kept."""
    assert step_of(name, MIXED, dropped=5).eflops_rl * EFLOP == pytest.approx(
        flops.paper_dapo_step(
            QWEN2_5_7B, rounds=2, batch_generated=4, batch_trained=PROMPTS, group=GROUP, mean_length=ON
        )
    )


@pytest.mark.parametrize("name", ["luffy", "srft"])
def test_luffy_and_srft_count_the_expert_four_times(name):
    ledger = step_of(name, [rewards[1:] for rewards in MIXED])
    assert ledger.eflops_rl * EFLOP == pytest.approx(
        flops.paper_luffy_step(QWEN2_5_7B, batch=PROMPTS, group=GROUP - 1, length=ON, experts=1, expert_length=OFF)
    )
    updates = [entry for entry in ledger.entries if entry["phase"] == "rl_update"]
    assert [entry["mean_length"] for entry in updates] == [ON, OFF]
    assert ("logprob" in ledger.totals()) == (name == "srft") and ledger.totals()["expert"]["exact_flops"] == 0


def test_upt_counts_the_rows_it_trains_on():
    """One prompt has no right rollout: the expert's trajectory replaces its rollouts."""
    rollout, expert = (length * flops.paper_forward_per_token(QWEN2_5_7B, length) for length in (ON, OFF))
    assert step_of("upt", [[0.0] * GROUP, *MIXED[1:]]).eflops_rl * EFLOP == pytest.approx(
        PROMPTS * GROUP * rollout + 3 * (2 * GROUP * rollout + expert)
    )


def test_prefix_rft_counts_the_prefix_as_sampled():
    assert step_of("prefix_rft", MIXED, prefix=4).eflops_rl * EFLOP == pytest.approx(
        flops.paper_grpo_step(QWEN2_5_7B, batch=PROMPTS, group=GROUP, mean_length=ON)
    )


def test_a_reference_costs_exact_flops_only():
    plain, held = step_of("grpo", MIXED), step_of("grpo", MIXED, kl_coef=0.1)
    assert held.eflops_rl == plain.eflops_rl and held.totals()["reference"]["paper_flops"] == 0
    assert held.totals()["reference"]["exact_flops"] == flops.exact_forward(QWEN2_5_7B, [ON] * PROMPTS * GROUP)
