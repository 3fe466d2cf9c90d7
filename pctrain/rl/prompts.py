"""The order in which prompts are sampled."""

from __future__ import annotations

from pctrain.common.errors import UserError
from pctrain.data.problems import Problem
from pctrain.data.sampler import ShuffledSampler


class PromptStream:
    """Problems in a seeded order, epoch after epoch. Its state is the position and the prompts carried over."""

    def __init__(self, problems: list[Problem], seed: int):
        self.problems = problems
        self._order = ShuffledSampler([len(problems)], 1, seed)
        self.position = 0
        self.carried: list[int] = []  # indices of prompts that the previous step sampled beyond its batch

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems, carried prompts first."""
        indices = self.carried[:count]
        self.carried = self.carried[count:]
        while len(indices) < count:
            indices += self._order.indices(self.position)
            self.position += 1
        return [self.problems[i] for i in indices]

    def carry(self, problems: list[Problem]) -> None:
        """Put problems first in line for the next step."""
        self.carried += [problem.index for problem in problems]

    def state_dict(self) -> dict:
        """Return what a checkpoint stores."""
        return {"position": self.position, "carried": list(self.carried)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint's state. UserError if it belongs to another, larger set of problems."""
        largest = max(state["carried"], default=0)
        if largest >= len(self.problems):
            raise UserError(
                f"the saved state carries problem {largest}, but data.rl has only {len(self.problems)} problems: the "
                "state belongs to another set. Set data.rl to the set that the run started with"
            )
        self.position = state["position"]
        self.carried = list(state["carried"])
