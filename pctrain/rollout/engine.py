"""The rollout engine: requests in, completions out, weights updated in place before each RL step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pctrain.common.device import on_gpu
from pctrain.common.errors import ToBeContinued, UserError
from pctrain.config.tree import RolloutConfig
from pctrain.distributed import parallel
from pctrain.rollout.queue import Completion, Request, RequestQueue, Sampling
from pctrain.rollout.seeds import sampling_seed
from pctrain.rollout.sharing import EngineGroups
from pctrain.rollout.vllm_setup import guest, start_llm, stop_llm
from pctrain.rollout.weight_stream import CheckedStream, expected_weights

VERIFY_TOKENS = 8  # new tokens per prompt of a verification
# Batches in the engine at once. A response ten times as long as the others must not idle the engine, and one batch
# must not hold back all later ones.
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class WeightUpdate:
    """Cost of one weight update on this rank: seconds, including the gathering of the weights, and bytes received."""

    seconds: float
    bytes: int


class RolloutEngine:
    """One vLLM engine per group of `rollout.tensor` neighboring ranks, in the learner's processes.

    Every method is collective: all ranks call it with the same arguments.
    """

    def __init__(self, hf_dir: str | Path, rollout: RolloutConfig, *, dtype: str, context: int, eos_id: int):
        """Start the engine with the weights of `hf_dir`.

        Args:
            hf_dir: Hugging Face directory of the model (config.json, safetensors).
            rollout: sizes of the engine, and the sampling temperature of its verifications.
            dtype: "float32" or "bfloat16".
            context: longest prompt plus response, in tokens.
            eos_id: the one token that ends a response.
        """
        self._rollout = rollout
        self._context = context
        self._expected = expected_weights(Path(hf_dir))
        self._groups = EngineGroups(rollout.tensor)
        self._llm = start_llm(Path(hf_dir), rollout, self._groups, dtype=dtype, context=context)
        self._queue = RequestQueue(self._llm, self._groups, eos_id)
        self._usable = True  # the weights are complete and in memory

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]]) -> WeightUpdate:
        """Replace every weight with the stream's (Hugging Face name, full tensor), each tensor in its own storage.

        With tied embeddings the stream must contain lm_head.weight too, after the embedding. UserError if a name is
        missing, unexpected or has another shape; the engine then refuses to sample until a weight update succeeds.
        """
        began = time.perf_counter()
        checked = CheckedStream(stream, self._expected)
        self.sleep()
        with guest(self._groups):
            self._wake("weights")
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checked})
            checked.finish()
            self._wake("kv_cache")
            if self._llm.llm_engine.is_sleeping():
                raise RuntimeError("vLLM is not fully awake after the weight update")
            # Prompts cached under the old weights would be continued under the new ones.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache after the weight update")
        self._usable = True
        return WeightUpdate(time.perf_counter() - began, checked.bytes)

    def sleep(self) -> None:
        """Give the engine's GPU memory (weights and KV cache) to the learner until the next `load_weights`.

        Without a GPU nothing is freed, but sampling before the next weight update is refused all the same.
        """
        self._refuse_leftovers()
        if on_gpu() and self._usable:
            with guest(self._groups):
                self._llm.sleep(level=2)
        self._usable = False

    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        max_response: int,
        logprobs: bool = False,
        top_p: float = 1.0,
    ) -> list[Completion]:
        """Return one completion per request, in order, on every rank. The engines share the requests.

        The samples depend on weights, prompt, seed and temperature, and not on batch, rank, or `logprobs`.

        Args:
            requests: prompts with their seeds.
            temperature: 0 is greedy.
            max_response: most new tokens, EOS included (fewer if the context ends first).
            logprobs: return the log-prob of every sampled token, as training needs.
            top_p: below 1 for evaluation only. Training samples (`logprobs`) come from the full distribution.
        """
        [completions] = self.generate_batches(
            [requests], temperature=temperature, max_response=max_response, logprobs=logprobs, top_p=top_p
        )
        return completions

    def generate_batches(
        self,
        batches: Iterable[Sequence[Request]],
        *,
        temperature: float,
        max_response: int,
        logprobs: bool = False,
        top_p: float = 1.0,
    ) -> Iterator[list[Completion]]:
        """Yield the completions of batch after batch, as `generate` returns them.

        While the last responses of a batch are sampled, the next batches start. Iterate to the end: the engine
        refuses every other call while requests are open.
        """
        if logprobs and top_p < 1:
            raise ValueError(
                f"top_p = {top_p} with logprobs: training rollouts are sampled from the full distribution, the one the "
                "learner's log-probs describe. Use top_p = 1"
            )
        self._refuse_unusable()
        queue, sampling = self._queue, Sampling(temperature, max_response, logprobs, top_p)
        waiting = iter(batches)
        exhausted = False
        admitted: deque[tuple[int, range]] = deque()  # per batch: requests over all engines, this engine's numbers

        def has_room() -> bool:
            return not exhausted and len(admitted) < BATCHES_AHEAD and queue.unfinished < self._rollout.max_sequences

        while not exhausted or admitted:
            while has_room():
                batch = next(waiting, None)
                if batch is None:
                    exhausted = True
                    break
                self._check(batch)
                admitted.append((len(batch), queue.admit(self._groups.share(batch), sampling)))
            if admitted:
                total, numbers = admitted[0]
                queue.run(until=_either(queue, numbers, has_room))
                if queue.finished(numbers):
                    admitted.popleft()
                    yield self._groups.unshare(self._groups.gather(queue.take(numbers)), total)

    def verify(
        self,
        learner_logprobs: Callable[[list[list[int]]], Sequence[np.ndarray]],
        prompts: Sequence[Sequence[int]],
        eos_id: int,
    ) -> float:
        """Return the mean |log-prob of the engine - log-prob of the learner| over some sampled tokens.

        Every engine samples a few tokens after every prompt at `rollout.temperature`, and after one more prompt that is
        longer than a KV-cache block (`prompts` joined by `eos_id`, as far as the context allows), because a stale
        block of the cache shows only there.

        The result is the mean and not the largest difference: an unlikely token of a confident model differs by 100
        times the mean (2.6e-4 and 2e-7 nats were measured), whereas stale weights change every token.

        Args:
            learner_logprobs: maps rows of token ids to one float array [L] per row, in which entry i is the log-prob of
                token i at `rollout.temperature`. It is called once, on all ranks, with the same rows. A log-prob that
                is not a number counts as infinity.
            prompts: token ids.
            eos_id: the token that joins the prompts.
        """
        short_prompts = [list(prompt)[: self._context - 1] for prompt in prompts]
        all_prompts = [*short_prompts, self._long_prompt(short_prompts, eos_id)]
        requests = [Request(ids, sampling_seed(0, "verify", 0, index, 0)) for index, ids in enumerate(all_prompts)]
        self._refuse_unusable()
        numbers = self._queue.admit(requests, Sampling(self._rollout.temperature, VERIFY_TOKENS, logprobs=True))
        self._queue.run(until=lambda: self._queue.finished(numbers))
        by_engine = self._groups.gather(self._queue.take(numbers))
        checks = [
            (prompt, completion)
            for completions in by_engine
            for prompt, completion in zip(all_prompts, completions, strict=True)
        ]
        learner = learner_logprobs([prompt + completion.token_ids for prompt, completion in checks])
        differences = [
            np.abs(np.asarray(row, dtype=np.float64)[len(prompt) :] - np.asarray(completion.logprobs))
            for (prompt, completion), row in zip(checks, learner, strict=True)
        ]
        return float(np.nan_to_num(np.concatenate(differences), nan=math.inf).mean())

    def close(self) -> None:
        """Stop the engine. The learner's process groups stay as they are."""
        if self._llm is not None:
            stop_llm(self._llm, self._groups)
            self._groups.close()
            self._llm = None
            self._usable = False

    def close_after(self, error: BaseException | None) -> None:
        """Stop the engine unless `error` may have hit this rank alone.

        Closing is collective, and after a failure of one rank the others are elsewhere. UserError and ToBeContinued
        are raised on all ranks together.
        """
        raised_alone = isinstance(error, Exception) and not isinstance(error, (UserError, ToBeContinued))
        if not raised_alone or parallel.world_size() == 1:
            self.close()

    def _wake(self, tag: str) -> None:
        """Map the engine's weights or KV cache again. Without a GPU they never slept."""
        if on_gpu():
            torch.cuda.empty_cache()  # vLLM cannot map what the learner's allocator keeps: packs, the weight stream
            self._llm.wake_up(tags=[tag])

    def _check(self, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            if not 0 < len(request.prompt_ids) < self._context:
                raise UserError(
                    f"rollout request {index}: the prompt has {len(request.prompt_ids)} tokens. "
                    f"Expected 1 to {self._context - 1}, so that a response fits in the context of {self._context}. "
                    "Shorten the prompt or enlarge the context"
                )
            if not isinstance(request.seed, int):
                raise TypeError(f"rollout request {index}: seed {request.seed!r}: expected an int for every request")

    def _refuse_unusable(self) -> None:
        if not self._usable:
            raise RuntimeError(
                "the rollout engine has no weights (it is asleep or closed, or a weight update failed): call "
                "load_weights first"
            )
        self._refuse_leftovers()

    def _refuse_leftovers(self) -> None:
        if self._queue.unfinished:
            raise RuntimeError(
                "an earlier call into vLLM left requests behind: it failed midway, or its batches were not consumed to "
                "the end. Restart the run"
            )

    def _long_prompt(self, prompts: list[list[int]], eos_id: int) -> list[int]:
        block = self._llm.llm_engine.vllm_config.cache_config.block_size
        length = min(block + block // 4, max(1, self._context - VERIFY_TOKENS))
        joined: list[int] = []
        while len(joined) < length:
            for prompt in prompts:
                joined += [*prompt, eos_id]
        return joined[:length]


def _either(queue: RequestQueue, numbers: range, has_room: Callable[[], bool]) -> Callable[[], bool]:
    """Return a condition: these requests are finished, or there is room for another batch."""
    return lambda: queue.finished(numbers) or has_room()
