"""Requests inside one vLLM engine: admitted in batches, worked on together, taken batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pctrain.rollout.sharing import EngineGroups
from pctrain.rollout.vllm_setup import guest

if TYPE_CHECKING:  # importing vLLM takes seconds
    from vllm import LLM, CompletionOutput, SamplingParams


@dataclass(frozen=True)
class Request:
    """One sample to draw: token ids of the prompt (at least one) and the seed from `sampling_seed` of this very sample.

    `max_response` limits the new tokens if it is less than the call's limit, for a rollout that continues a prefix.
    """

    prompt_ids: Sequence[int]
    seed: int
    max_response: int | None = None


@dataclass(frozen=True)
class Completion:
    """The sample that answers a request.

    `token_ids` ends with EOS if `finish` is "stop". `logprobs[i]` is the log-prob of token_ids[i] at the sampling
    temperature.
    """

    token_ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float] | None


@dataclass(frozen=True)
class Sampling:
    """The options that the requests of a call share. `max_response` is the most new tokens, EOS included."""

    temperature: float
    max_response: int
    logprobs: bool = False
    top_p: float = 1.0

    def parameters(self, request: Request, eos_id: int) -> SamplingParams:
        """Return vLLM's parameters for one request."""
        from vllm import SamplingParams

        # flat_logprobs: lists instead of a dict and an object per token. skip_clone: they are made for this one call.
        # ignore_eos: vLLM adds the end-of-sequence tokens of the model's generation_config.json to those given here.
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=min(self.max_response, request.max_response or self.max_response),
            seed=request.seed,
            stop_token_ids=[eos_id],
            ignore_eos=True,
            logprobs=0 if self.logprobs else None,
            flat_logprobs=self.logprobs,
            detokenize=False,
            skip_clone=True,
        )


class RequestQueue:
    """The requests of one engine. Its tensor parallel ranks must make the same calls; only `run` steps vLLM."""

    def __init__(self, llm: LLM, groups: EngineGroups, eos_id: int):
        self._llm = llm
        self._groups = groups
        self._eos_id = eos_id
        self._open: set[int] = set()
        self._finished: dict[int, Completion] = {}

    @property
    def unfinished(self) -> int:
        """The number of requests that are admitted and not finished."""
        return len(self._open)

    def admit(self, requests: Sequence[Request], sampling: Sampling) -> range:
        """Hand requests to vLLM, and return the numbers under which their completions can be taken."""
        if not requests:
            return range(0)
        with guest(self._groups):
            ids = self._llm.enqueue(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
                [sampling.parameters(request, self._eos_id) for request in requests],
                use_tqdm=False,
            )
        # vLLM numbers its requests, and appends a random word to the number.
        first = int(ids[0].partition("-")[0])
        numbers = range(first, first + len(ids))
        self._open.update(numbers)
        return numbers

    def run(self, until: Callable[[], bool]) -> None:
        """Step vLLM until `until()` is true; it is evaluated before each step.

        Under async scheduling, vLLM's default on a GPU, a step may return nothing, and after the last response one
        more step may be in flight. vLLM drops its output at the next call, also after a weight update.
        """
        with guest(self._groups):
            while not until():
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        self._finished[int(output.request_id)] = _completion(output.outputs[0])
                        self._open.remove(int(output.request_id))

    def finished(self, numbers: range) -> bool:
        """Return whether all these requests are finished."""
        return all(number in self._finished for number in numbers)

    def take(self, numbers: range) -> list[Completion]:
        """Remove and return the completions of finished requests."""
        return [self._finished.pop(number) for number in numbers]


def _completion(output: CompletionOutput) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}; expected 'stop' or 'length'")
    tokens = list(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        # logprobs=0 asks for the sampled token's log-prob alone: one entry per token, in their order.
        if output.logprobs.token_ids != tokens:
            raise RuntimeError("vLLM returned log-probs of other tokens than the sampled ones")
        logprobs = list(output.logprobs.logprobs)
    return Completion(tokens, output.finish_reason, logprobs)
