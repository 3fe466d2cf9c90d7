"""Requests inside one vLLM engine: admitted in batches, worked on together, taken batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pctrain.rollout.sharing import EngineGroups
from pctrain.rollout.vllm_setup import guest

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


@dataclass(frozen=True)
class Request:
    """One sample to draw. `prompt_ids`: token ids, at least one; `seed`: from `sampling_seed`, of this very sample.

    `max_response`: new tokens at most, where it is less than that of the call (a rollout that goes on from a prefix).
    """

    prompt_ids: Sequence[int]
    seed: int
    max_response: int | None = None


@dataclass(frozen=True)
class Completion:
    """`token_ids` ends with EOS where `finish` is "stop". `logprobs[i]` is the log-prob of token_ids[i] at the sampling temperature."""

    token_ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float] | None


@dataclass(frozen=True)
class Sampling:
    """What the requests of a call share. `max_response`: new tokens at most, EOS included."""

    temperature: float
    max_response: int
    logprobs: bool = False
    top_p: float = 1.0

    def parameters(self, request: Request, eos_id: int) -> SamplingParams:
        from vllm import SamplingParams

        # flat_logprobs: lists instead of a dict and an object a token. skip_clone: they are made for this one call.
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
    """Of one engine; its tensor parallel ranks must make the same calls. Every step of vLLM is made here."""

    def __init__(self, llm: LLM, groups: EngineGroups, eos_id: int):
        self._llm, self._groups, self._eos_id = llm, groups, eos_id
        self._open: set[int] = set()
        self._finished: dict[int, Completion] = {}

    @property
    def unfinished(self) -> int:
        return len(self._open)

    def admit(self, requests: Sequence[Request], sampling: Sampling) -> range:
        """The numbers under which their completions are to be asked for."""
        if not requests:
            return range(0)
        with guest(self._groups):
            ids = self._llm.enqueue(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
                [sampling.parameters(request, self._eos_id) for request in requests],
                use_tqdm=False,
            )
        first = int(
            ids[0].partition("-")[0]
        )  # vLLM counts its requests, and adds a random word to a number that it gives itself
        numbers = range(first, first + len(ids))
        self._open.update(numbers)
        return numbers

    def run(self, until: Callable[[], bool]) -> None:
        """Makes steps until `until()`, which is asked before each."""
        with guest(self._groups):
            while not until():
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        self._finished[int(output.request_id)] = _completion(output.outputs[0])
                        self._open.remove(int(output.request_id))

    def finished(self, numbers: range) -> bool:
        return all(number in self._finished for number in numbers)

    def take(self, numbers: range) -> list[Completion]:
        return [self._finished.pop(number) for number in numbers]


def _completion(output) -> Completion:
    """From a vllm.CompletionOutput."""
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}")
    tokens = list(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        # logprobs=0 asks for the sampled token's alone: one entry a token, in their order.
        if output.logprobs.token_ids != tokens:
            raise RuntimeError("vLLM returned log-probs of other tokens than the sampled ones")
        logprobs = list(output.logprobs.logprobs)
    return Completion(tokens, output.finish_reason, logprobs)
