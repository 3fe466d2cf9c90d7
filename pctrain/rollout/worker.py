"""The engine, the verifier and the test problems together: what turns a core's weights into a score."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from pctrain.config.tree import Config
from pctrain.core import Learner
from pctrain.data.encode import Encoder
from pctrain.data.problems import Problem, read_problems
from pctrain.data.rows import make_row
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate.accuracy import Score, evaluate
from pctrain.evaluate.engine import may_close
from pctrain.hf.config import HFConfig
from pctrain.reward import VerifierPool
from pctrain.rollout import RolloutEngine, Swap

# bfloat16 keeps 8 bits, and engine and learner round at different places: 0.14 was the largest difference of a token on a small model.
BF16_TOLERANCE = 0.1


class RolloutWorker:
    """One rollout engine and one verifier pool for every stage of a process; a context manager.

    The engine starts at its first use: a run that never samples, or that had finished before, never pays for it. Collective.
    """

    def __init__(self, config: Config):
        self.config = config
        self.hf = HFConfig.read(config.model.path)
        self.encoder = Encoder(config.model.path, config.data, self.hf.context)
        self.tokenizer = self.encoder.tokenizer
        self.verifier = VerifierPool(config.reward)
        self._swaps = 0
        self._training: dict[bool, tuple[list[Problem], list[str]]] = {}

    @cached_property
    def engine(self) -> RolloutEngine:
        config = self.config
        return RolloutEngine(
            config.model.path, config.rollout, dtype=config.model.dtype, context=self.context, eos_id=self.tokenizer.eos_id
        )

    @property
    def context(self) -> int:
        """Of the engine: its longest prompt and response, tokens."""
        return self.config.longest_rollout(self.hf.context)

    @cached_property
    def problems(self) -> list[Problem]:
        """The test problems, `data.test`. One that is too long is an error: without it the score would be another one."""
        return self._read_problems(self.config.data.test, self._prompt_limit())

    def training_problems(self, expert: bool) -> tuple[list[Problem], list[str]]:
        """`data.rl`, and what is wrong with those of it that are left out (`data.overlong`).

        `expert`: with the experts' trajectories, of at most `rollout.max_response` tokens.
        """
        if expert in self._training:  # the next stage of a study
            return self._training[expert]
        longest, left_out = self.config.rollout.max_response, []
        pack = (
            self.config.rl.token_budget - longest,
            "rl.token_budget less rollout.max_response",
        )  # whatever is sampled fits into one
        problems = self._read_problems(
            self.config.data.rl,
            min(self._prompt_limit(), pack),
            expert=longest if expert else None,
            left_out=None if self.encoder.stops("overlong") else left_out,
        )
        self._training[expert] = problems, left_out
        return problems, left_out

    def _prompt_limit(self) -> tuple[int, str]:
        """Tokens, and what sets them."""
        room = self.context - self.config.longest_response()
        return (
            room,
            "rollout.max_prompt" if room == self.config.rollout.max_prompt else "the context less the longest response",
        )

    def _read_problems(self, path: Path, limit: tuple[int, str], **options: Any) -> list[Problem]:
        room, name = limit
        fields = self.config.data.fields
        return parallel.agree(lambda: read_problems(path, fields, self.encoder, room=room, room_name=name, **options))

    @watchdog.phase("swap")
    def load(self, learner: Learner) -> Swap:
        """Swaps the core's weights into the engine; the first swap, and every `rollout.verify_every`-th after it, is verified by
        log-probs of both on the same tokens.

        Raises RuntimeError where they differ in the mean by more than `rollout.verify_tolerance` (float32) or BF16_TOLERANCE.
        """
        swap = self.engine.load_weights(learner.hf_weights())
        if self._swaps % self.config.rollout.verify_every == 0:
            self._verify(learner)
        self._swaps += 1
        return swap

    def _verify(self, learner: Learner) -> None:
        rollout = self.config.rollout
        budget = max(self.config.rl.token_budget, self.config.sft.token_budget)

        def learner_logprobs(token_rows):
            return learner.logprobs(
                [make_row(tokens[:1], tokens[1:]) for tokens in token_rows], budget, temperature=rollout.temperature
            )

        found = self.engine.verify(
            learner_logprobs, [problem.prompt_ids for problem in self.problems[:4]], self.tokenizer.eos_id
        )
        tolerance = rollout.verify_tolerance if self.config.model.dtype == "float32" else BF16_TOLERANCE
        if found > tolerance:
            raise RuntimeError(
                f"after the weight swap the engine's log-probs differ from the learner's by {found:.2e} a token, more than "
                f"{tolerance:.0e}: the engine does not hold the learner's weights"
            )

    @watchdog.phase("evaluation")
    def score(self, learner: Learner) -> Score:
        """The accuracy of the core's weights on the test problems."""
        self.load(learner)
        score = evaluate(self.engine, self.verifier, self.tokenizer, self.problems, self.config)
        self.engine.sleep()
        return score

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self.verifier.close()
        if "engine" in self.__dict__ and may_close(error):
            self.engine.close()
