"""The rollout engine: requests in, completions out, weights swapped in place before each RL step."""

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
from pctrain.common.errors import UserError
from pctrain.config.tree import RolloutConfig
from pctrain.rollout.queue import Completion, Request, RequestQueue, Sampling
from pctrain.rollout.seeds import sampling_seed
from pctrain.rollout.sharing import EngineGroups
from pctrain.rollout.vllm_setup import guest, start_llm, stop_llm
from pctrain.rollout.weight_stream import CheckedStream, expected_weights

VERIFY_TOKENS = 8  # new tokens per prompt of a verification
BATCHES_AHEAD = 4  # in an engine at a time: one response ten times as long as the others must not stop it, nor hold back all the rest


@dataclass(frozen=True)
class Swap:
    """One weight swap on this rank: wall-clock seconds (the learner's gathering of the weights included) and bytes received."""

    seconds: float
    bytes: int


class RolloutEngine:
    """One vLLM engine per group of `rollout.tensor` neighbouring ranks, in the learner's processes.

    hf_dir: Hugging Face directory of the model (config.json, safetensors); the engine starts with its weights.
    dtype: "float32" or "bfloat16". context: longest prompt + response, tokens. eos_id: the one token that ends a response.
    Every method is collective: all ranks call it with the same arguments.
    """

    def __init__(self, hf_dir: str | Path, rollout: RolloutConfig, *, dtype: str, context: int, eos_id: int):
        self._rollout = rollout
        self._context = context
        self._expected = expected_weights(Path(hf_dir))
        self._groups = EngineGroups(rollout.tensor)
        self._llm = start_llm(Path(hf_dir), rollout, self._groups, dtype=dtype, context=context)
        self._queue = RequestQueue(self._llm, self._groups, eos_id)
        self._usable = True  # weights whole and in memory

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]]) -> Swap:
        """Replaces every weight by the stream's (hf_name, full tensor), each in a storage of its own.

        With tied embeddings lm_head.weight comes too, after the embedding.
        UserError where a name is missing, unexpected or of another shape: the engine then refuses to sample until a swap succeeds.
        """
        begin = time.perf_counter()
        checked = CheckedStream(stream, self._expected)
        self.sleep()
        with guest(self._groups):
            if on_gpu():
                torch.cuda.empty_cache()  # what the learner's allocator keeps of the last update is memory that vLLM maps now
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checked})
            checked.finish()
            if on_gpu() and not self._llm.wake_up(tags=["kv_cache"]):
                raise RuntimeError("vLLM is not fully awake after the weight swap")
            # Prompts cached under the old weights would be continued under the new ones.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache after the weight swap")
        self._usable = True
        return Swap(time.perf_counter() - begin, checked.bytes)

    def sleep(self) -> None:
        """After the last rollout of a step: gives the engine's GPU memory (weights and KV cache) to the learner until `load_weights`.

        Where there is no GPU nothing is freed, but sampling before the next swap is refused all the same.
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
        """One completion per request, in order, on every rank. The requests are shared out over the engines.

        temperature: 0 is greedy. top_p: below 1 for evaluation alone; what is trained on (`logprobs`) comes from the whole policy.
        max_response: new tokens at most, EOS included (fewer where the context ends).
        What is sampled depends on weights, prompt, seed and temperature; not on batch, rank, or whether log-probs are asked for.
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
        """`generate` for batch after batch. While the last responses of one are written, those of the next ones begin.

        It has to be taken to its end: the engine refuses all else while requests of it are open.
        """
        if logprobs and top_p < 1:
            raise ValueError(
                f"top_p = {top_p}: training rollouts are sampled from the whole policy, as the learner's log-probs are its"
            )
        self._refuse_unusable()
        queue, sampling = self._queue, Sampling(temperature, max_response, logprobs, top_p)
        coming = iter(batches)
        admitted: deque[tuple[int, range]] = deque()  # (requests over all engines, this engine's numbers) of each batch
        more = True

        def room() -> bool:
            return more and len(admitted) < BATCHES_AHEAD and queue.unfinished < self._rollout.max_sequences

        while more or admitted:
            while room():
                batch = next(coming, None)
                more = batch is not None
                if more:
                    self._check(batch)
                    admitted.append((len(batch), queue.admit(self._groups.share(batch), sampling)))
            if admitted:
                total, numbers = admitted[0]
                queue.run(until=lambda numbers=numbers: queue.finished(numbers) or room())
                if queue.finished(numbers):
                    admitted.popleft()
                    yield self._groups.unshare(self._groups.gather(queue.take(numbers)), total)

    def verify(
        self,
        learner_logprobs: Callable[[list[list[int]]], Sequence[np.ndarray]],
        prompts: Sequence[Sequence[int]],
        eos_id: int,
    ) -> float:
        """Mean |log-prob of the engine - log-prob of the learner| over some sampled tokens; every engine is checked on every prompt.

        Not the largest: an unlikely token of a confident model differs by 100 times the mean (2.6e-4 and 2e-7 nats, measured), weights that
        are an update behind differ at every token.
        Samples a few tokens after each prompt at `rollout.temperature`, and after one prompt longer than a KV-cache block (made of
        `prompts`, joined by eos_id, as far as the context allows: a stale block of the cache shows only there).
        learner_logprobs(rows of token ids) -> per row float [L], entry i the log-prob of token i at `rollout.temperature`; called once
        on all ranks with the same rows. A log-prob that is not a number counts as infinity.
        """
        prompts = [list(prompt)[: self._context - 1] for prompt in prompts]
        prompts.append(self._long_prompt(prompts, eos_id))
        requests = [Request(prompt, sampling_seed(0, "verify", 0, index, 0)) for index, prompt in enumerate(prompts)]
        self._refuse_unusable()
        numbers = self._queue.admit(requests, Sampling(self._rollout.temperature, VERIFY_TOKENS, logprobs=True))
        self._queue.run(until=lambda: self._queue.finished(numbers))
        by_engine = self._groups.gather(self._queue.take(numbers))
        checks = [
            (prompt, completion)
            for completions in by_engine
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        learner = learner_logprobs([prompt + completion.token_ids for prompt, completion in checks])
        differences = [
            np.abs(np.asarray(row, dtype=np.float64)[len(prompt) :] - np.asarray(completion.logprobs))
            for (prompt, completion), row in zip(checks, learner, strict=True)
        ]
        return float(np.nan_to_num(np.concatenate(differences), nan=math.inf).mean())

    def close(self) -> None:
        """Ends the engine. The learner's process groups stay as they are."""
        if self._llm is not None:
            stop_llm(self._llm, self._groups)
            self._groups.close()
            self._llm = None
            self._usable = False

    def _check(self, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            if not 0 < len(request.prompt_ids) < self._context:
                raise UserError(
                    f"rollout request {index}: a prompt of {len(request.prompt_ids)} tokens; "
                    f"expected 1 to {self._context - 1}, so that a response fits the context of {self._context}: "
                    "shorten the prompt or enlarge the context"
                )
            if not isinstance(request.seed, int):
                raise TypeError(
                    f"rollout request {index}: seed {request.seed!r}; every request needs an int of its own"
                )

    def _refuse_unusable(self) -> None:
        if not self._usable:
            raise RuntimeError(
                "the rollout engine has no weights (asleep, closed, or a swap failed): call load_weights first"
            )
        self._refuse_leftovers()

    def _refuse_leftovers(self) -> None:
        if self._queue.unfinished:
            raise RuntimeError(
                "an earlier call into vLLM left requests behind: it failed half-way, or its batches were not taken to the "
                "end: restart the run"
            )

    def _long_prompt(self, prompts: list[list[int]], eos_id: int) -> list[int]:
        block = self._llm.llm_engine.vllm_config.cache_config.block_size
        length = min(block + block // 4, max(1, self._context - VERIFY_TOKENS))
        joined: list[int] = []
        while len(joined) < length:
            for prompt in prompts:
                joined += [*prompt, eos_id]
        return joined[:length]
