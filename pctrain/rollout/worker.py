"""The rollout worker: a rollout engine with the learner's weights, a verifier, and the problems to solve."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.common.device import on_gpu
from pctrain.config.tree import ResolvedConfig
from pctrain.core import Learner
from pctrain.data.encode import Encoder
from pctrain.data.problems import Problem, read_problems
from pctrain.data.rows import make_row
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.hf.config import HFConfig
from pctrain.reward import Verdict, VerifierPool
from pctrain.rollout.accuracy import Score, evaluate
from pctrain.rollout.engine import RolloutEngine, WeightUpdate
from pctrain.rollout.queue import Completion, Request

# `rollout.verify_tolerance` by dtype where it is not given. bfloat16 keeps 8 bits, and engine and learner round at
# different places: the largest difference of a single token on a small model was 0.14 nats.
VERIFY_TOLERANCE = {"float32": 2e-5, "bfloat16": 0.1}
# vLLM has no float32 FlashAttention: its Triton attention multiplies in TF32, which keeps 11 bits.
FLOAT32_TOLERANCE_ON_GPU = 5e-3
VERIFY_PROMPTS = 4


class RolloutWorker:
    """One rollout engine and one verifier pool for every stage of a process; a context manager.

    The engine starts at its first use, so a run that never samples, or that had already finished, never pays for it.
    Every method is collective.
    """

    def __init__(self, config: ResolvedConfig):
        self.config = config
        self.hf = HFConfig.read(config.model.path)
        self.encoder = Encoder(config.model.path, config.data, self.hf.context)
        self.tokenizer = self.encoder.tokenizer
        self.verifier = VerifierPool(config.reward)
        self.weight_updates = 0
        self._training: dict[bool, tuple[list[Problem], list[str]]] = {}

    @cached_property
    def engine(self) -> RolloutEngine:
        """The rollout engine, started with the weights of `model.path`."""
        model = self.config.model
        return RolloutEngine(
            model.path, self.config.rollout, dtype=model.dtype, context=self.context, eos_id=self.tokenizer.eos_id
        )

    @property
    def context(self) -> int:
        """The engine's context: its longest prompt plus response, in tokens."""
        return self.config.longest_rollout(self.hf.context)

    # ---- problems --------------------------------------------------------------------------------------------------

    @cached_property
    def problems(self) -> list[Problem]:
        """The test problems, `data.test`. One that is too long is an error, because dropping it changes the score."""
        return self._read_problems(self.config.data.test_problems(), self._prompt_limit())

    def training_problems(self, with_expert: bool) -> tuple[list[Problem], list[str]]:
        """Return the problems of `data.rl`, and one message for each that `data.overlong` drops.

        `with_expert` reads the experts' trajectories too, of at most `rollout.max_response` tokens each.
        """
        if with_expert in self._training:  # the next stage of a study asks again
            return self._training[with_expert]
        dropped: list[str] = []
        max_response = self.config.rollout.max_response
        # Every prompt with its response must fit in one pack.
        room_in_pack = self.config.rl.token_budget - max_response, "rl.token_budget less rollout.max_response"
        problems = self._read_problems(
            self.config.data.rl_problems(),
            min(self._prompt_limit(), room_in_pack),
            expert=max_response if with_expert else None,
            left_out=None if self.encoder.stops("overlong") else dropped,
        )
        self._training[with_expert] = problems, dropped
        return problems, dropped

    def _prompt_limit(self) -> tuple[int, str]:
        """Return the most tokens a prompt may have, and the name of the setting that limits them."""
        room = self.context - self.config.longest_response()
        if room == self.config.rollout.max_prompt:
            return room, "rollout.max_prompt"
        return room, "the context less the longest response"

    def _read_problems(self, path: Path, limit: tuple[int, str], **options: Any) -> list[Problem]:
        room, name = limit
        fields = self.config.data.fields
        return parallel.agree(lambda: read_problems(path, fields, self.encoder, room=room, room_name=name, **options))

    # ---- the steps of an RL iteration ------------------------------------------------------------------------------

    @watchdog.phase("swap")
    def update_weights(self, learner: Learner) -> WeightUpdate:
        """Copy the learner's weights into the engine.

        The first update, and every `rollout.verify_every`-th after it, is verified: engine and learner compute the
        log-probs of the same tokens. RuntimeError if they differ by more than `rollout.verify_tolerance` on average.
        """
        update = self.engine.load_weights(learner.hf_weights())
        if self.weight_updates % self.config.rollout.verify_every == 0:
            self._verify(learner)
        self.weight_updates += 1
        return update

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample one training rollout per request from the policy, with the engine's log-prob of every token."""
        rollout = self.config.rollout
        return self.engine.generate(
            requests, temperature=rollout.temperature, max_response=rollout.max_response, logprobs=True
        )

    def score(self, responses: Sequence[tuple[Sequence[int], str]]) -> list[Verdict]:
        """Return the verifier's verdict on each (token ids of a response, gold answer); the ranks share the work."""
        texts = [(self.tokenizer.decode(list(token_ids)), answer) for token_ids, answer in responses]
        return parallel.map_over_ranks(self.verifier.score, texts)

    def sleep(self) -> None:
        """Give the engine's GPU memory to the learner until the next weight update."""
        self.engine.sleep()

    @watchdog.phase("evaluation")
    def evaluate(self, learner: Learner) -> Score:
        """Return the accuracy of the learner's weights on the test problems."""
        self.update_weights(learner)
        score = evaluate(
            self.engine,
            self.verifier,
            self.tokenizer,
            self.problems,
            self.config.eval,
            max_response=self.config.rollout.max_response,
            seed=self.config.run.seed,
        )
        self.sleep()
        return score

    def _verify(self, learner: Learner) -> None:
        rollout = self.config.rollout
        token_budget = max(self.config.rl.token_budget, self.config.sft.token_budget)

        def learner_logprobs(token_rows: list[list[int]]) -> list[np.ndarray]:
            rows = [make_row(tokens[:1], tokens[1:]) for tokens in token_rows]
            return learner.logprobs(rows, token_budget, temperature=rollout.temperature)

        prompts = [problem.prompt_ids for problem in self.problems[:VERIFY_PROMPTS]]
        difference = self.engine.verify(learner_logprobs, prompts, self.tokenizer.eos_id)
        tolerance = self._verify_tolerance()
        if difference > tolerance:
            raise RuntimeError(
                f"after the weight update the engine's log-probs differ from the learner's by {difference:.2e} nats "
                f"per token, more than rollout.verify_tolerance = {tolerance:.0e}: "
                "the engine does not hold the learner's weights"
            )

    def _verify_tolerance(self) -> float:
        dtype = self.config.model.dtype
        if self.config.rollout.verify_tolerance is not None:
            return self.config.rollout.verify_tolerance
        if dtype == "float32" and on_gpu():
            return FLOAT32_TOLERANCE_ON_GPU
        return VERIFY_TOLERANCE[dtype]

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self.verifier.close()
        if "engine" in self.__dict__:
            self.engine.close_after(error)
