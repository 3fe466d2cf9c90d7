"""`pctrain eval MODEL...`: models on benchmarks, one engine for all of them, every sample kept.

OUT/results.json, results.csv, scores.png, curves.json (of RL runs)
OUT/MODEL/BENCHMARK/samples.jsonl, disagreements.jsonl, settings.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console, progress
from pctrain.config.tree import Config
from pctrain.core import session
from pctrain.data.encode import Encoder
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate import results
from pctrain.evaluate.benchmarks import Benchmark, read_benchmarks
from pctrain.evaluate.disagreements import write_disagreements
from pctrain.evaluate.engine import Engine, common_architecture
from pctrain.evaluate.samples import Prompts, SampleFile, Verifiers, draw, encode
from pctrain.evaluate.summary import Scores, read_scores
from pctrain.evaluate.targets import Target
from pctrain.files.durable import fingerprint
from pctrain.files.lock import holder, try_lock
from pctrain.hf.config import HFConfig
from pctrain.hf.directory import content_digests, model_files
from pctrain.run import checkpoints

MAX_RESPONSE = 8192  # the paper's; where eval.max_response says nothing
LOCK = ".eval.lock"  # its presence says whose folder it is


def main(config: Config, targets: list[Target], out: Path) -> None:
    """Collective. Models, benchmarks, prompts and functions are all looked at before the engine starts."""
    began = time.monotonic()
    if any(target.checkpoint is not None for target in targets):
        parallel.initialize(config.parallel, config.run.seed)
    else:  # megatron-core takes seconds, and Hugging Face directories do not need it
        parallel.join(config.parallel.timeout)
    hf = parallel.agree(lambda: common_architecture(targets))
    benchmarks = parallel.agree(lambda: read_benchmarks(config))
    models = parallel.agree(lambda: _readers(targets, benchmarks, config, hf))
    eos_id = models[0].encoder.tokenizer.eos_id
    wanted = config.eval.max_response or MAX_RESPONSE
    longest = max(len(ids) for model in models for prompts in model.prompts for ids in prompts.ids)
    with (
        _held(out),
        watchdog.watch(out, config.parallel.timeout, parallel.rank(), parallel.world_size(), session.this_start()),
        Verifiers(config.reward) as verifiers,
        Engine(config, hf, min(hf.context, longest + wanted), eos_id) as engine,
    ):
        if longest + wanted > hf.context:
            _say(
                f"the context of {hf.context} tokens holds the longest problem ({longest}) and {hf.context - longest} tokens of an "
                f"answer, not {wanted}: answers are cut where the context ends"
            )
        _start_functions(benchmarks, verifiers, config)
        _sample(models, engine, verifiers, config, wanted, out)
        for model in models:
            for benchmark in benchmarks:
                write_disagreements(out / model.target.name / benchmark.name, verifiers, config.eval.judge)
        parallel.from_rank_zero(lambda: _conclude(targets, benchmarks, config, wanted, out, began))


# ---- before the first sample -----------------------------------------------------------------------------------------------


class _Reader:
    """A model's tokenizer and template, and the benchmarks as it reads them."""

    def __init__(self, target: Target, benchmarks: Sequence[Benchmark], config: Config, hf: HFConfig):
        self.target = target
        self.encoder = Encoder(target.hf_dir, config.data, hf.context)
        tokenizer = self.encoder.tokenizer
        if tokenizer.model_eos_ids and tokenizer.eos_id not in tokenizer.model_eos_ids:
            raise UserError(
                f"{target.hf_dir}: its tokenizer ends a text with token {tokenizer.eos_id}, its config.json with "
                f"{', '.join(map(str, tokenizer.model_eos_ids))} (eos_token_id): an answer would not end; fix one of them"
            )
        self.prompts = [encode(benchmark, self.encoder, hf.context) for benchmark in benchmarks]

    def settings(self, prompts: Prompts, weights: dict[str, str], config: Config, max_response: int) -> dict[str, Any]:
        """All that decides the samples."""
        benchmark, template = prompts.benchmark, self.encoder.template
        return {
            "model": weights,
            "template": template and template.digest,
            "benchmark": benchmark.content,
            "fields": config.eval.benchmarks[benchmark.name].fields.model_dump(exclude_none=True),
            "instruction": benchmark.instruction,
            "verifier": benchmark.verifier,
            "levenshtein": config.reward.levenshtein,
            "samples": benchmark.samples,
            "seed": config.run.seed,
            "temperature": config.eval.temperature,
            "top_p": config.eval.top_p,
            "max_response": max_response,
            "dtype": config.model.dtype,
        }


def _readers(targets: Sequence[Target], benchmarks: Sequence[Benchmark], config: Config, hf: HFConfig) -> list[_Reader]:
    readers = [_Reader(target, benchmarks, config, hf) for target in targets]
    first, *others = readers
    for other in others:
        if other.encoder.tokenizer.eos_id != first.encoder.tokenizer.eos_id:
            raise UserError(
                f"{first.target.path} and {other.target.path} end a text with different tokens "
                f"({first.encoder.tokenizer.eos_id} and {other.encoder.tokenizer.eos_id}): one engine cannot serve both; "
                "evaluate them in two calls"
            )
    return readers


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Rank 0 holds the folder: two calls in one would write into each other's samples."""
    release = parallel.agree(lambda: _take(out) if parallel.rank() == 0 else None)
    try:
        yield
    finally:
        if release is not None:
            release()


def _take(out: Path) -> Callable[[], None]:
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists():
        raise UserError(f"--out {out} holds something else than results of pctrain eval; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        release = try_lock(out / LOCK)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name a place you may write to") from None
    if release is None:
        raise UserError(f"--out {out} is in use by {holder(out / LOCK)}; wait for it to end, or name another --out")
    return release


def _start_functions(benchmarks: Sequence[Benchmark], verifiers: Verifiers, config: Config) -> None:
    """A function that cannot be imported is told of now, not after hours of sampling."""
    for benchmark in benchmarks:
        key = (
            f"eval.benchmarks.{benchmark.name}.verifier"
            if config.eval.benchmarks[benchmark.name].verifier
            else "reward.verifier"
        )
        parallel.agree(lambda key=key, name=benchmark.verifier: verifiers.start(key, name))
    if config.eval.judge is not None:
        parallel.agree(lambda: verifiers.start("eval.judge", config.eval.judge))


# ---- the samples -----------------------------------------------------------------------------------------------------------


def _sample(
    models: Sequence[_Reader], engine: Engine, verifiers: Verifiers, config: Config, max_response: int, out: Path
) -> None:
    """All that is not there yet. A model whose samples are all there is not loaded."""
    files = []
    for model in models:
        settings = parallel.from_rank_zero(lambda model=model: _settings(model, config, max_response))
        files.append(
            [
                SampleFile(out / model.target.name / prompts.benchmark.name, of)
                for prompts, of in zip(model.prompts, settings, strict=True)
            ]
        )
    total = sum(prompts.samples for model in models for prompts in model.prompts)
    done = sum(file.done for of_model in files for file in of_model)
    with progress("evaluation", total=total, start=done, unit="sample", rank=parallel.rank()) as bar:
        for model, of_model in zip(models, files, strict=True):
            for prompts, file in zip(model.prompts, of_model, strict=True):
                bar.advance(0, model=model.target.name, benchmark=prompts.benchmark.name)
                if not file.complete:
                    held = engine.load(model.target) if file.done < prompts.samples else None
                    file.fill(
                        draw(prompts, file.done, held, verifiers, model.encoder.tokenizer.decode, config, max_response),
                        bar,
                    )


def _settings(model: _Reader, config: Config, max_response: int) -> list[dict[str, Any]]:
    """On rank 0: of each benchmark. Reads the model's weights for their checksums; a checkpoint's stand in its manifest."""
    target = model.target
    if target.checkpoint is None:
        weights = content_digests(target.hf_dir)
    else:
        files = checkpoints.read_manifest(target.checkpoint)["files"]
        weights = {
            **{name: entry["sha256"] for name, entry in files.items()},
            **{file.name: fingerprint(file) for file in model_files(target.hf_dir)},
        }
    return [model.settings(prompts, weights, config, max_response) for prompts in model.prompts]


# ---- the end ---------------------------------------------------------------------------------------------------------------


def _conclude(
    targets: list[Target], benchmarks: Sequence[Benchmark], config: Config, max_response: int, out: Path, began: float
) -> None:
    def scores_of(target: Target, benchmark: Benchmark) -> Scores:
        return read_scores(out / target.name / benchmark.name, benchmark.samples, judged=config.eval.judge is not None)

    scores = {
        target.name: {benchmark.name: scores_of(target, benchmark) for benchmark in benchmarks} for target in targets
    }
    found = results.Results(targets, scores, results.settings_of(config, benchmarks, max_response))
    said = results.write(found, out)
    results.show(found, said, out, time.monotonic() - began)


def _say(line: str) -> None:
    if parallel.rank() == 0:
        make_console().print(line, markup=False, highlight=False, soft_wrap=True)
