"""`pctrain eval MODEL...`: models on benchmarks, with one engine for all of them and every sample kept.

OUT/results.json, results.csv, scores.png, curves.json (of RL runs)
OUT/MODEL/BENCHMARK/samples.jsonl, disagreements.jsonl, settings.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.common.progress import Bar, make_console, progress
from pctrain.config.tree import Config
from pctrain.core import session
from pctrain.data.encode import Encoder
from pctrain.distributed import gpu_environment, parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate import results
from pctrain.evaluate.benchmarks import Benchmark, read_benchmarks
from pctrain.evaluate.disagreements import write_disagreements
from pctrain.evaluate.engine import SharedEngine, common_architecture
from pctrain.evaluate.samples import Prompts, SampleFile, Verifiers, draw, encode
from pctrain.evaluate.summary import Scores, read_scores
from pctrain.evaluate.targets import Target
from pctrain.files.durable import fingerprint
from pctrain.files.lock import holder, try_lock
from pctrain.hf.config import HFConfig
from pctrain.hf.directory import content_digests, model_files
from pctrain.run import checkpoints

MAX_RESPONSE = 8192  # that of arXiv 2512.11470; used if eval.max_response is not set
LOCK = ".eval.lock"  # its presence marks a folder of results


def main(config: Config, targets: list[Target], out: Path) -> None:
    """Run `pctrain eval`. Models, benchmarks and prompts are checked before the engine starts. Collective."""
    began = time.monotonic()
    _join(config, targets)
    hf = parallel.agree(lambda: common_architecture(targets))
    benchmarks = parallel.agree(lambda: read_benchmarks(config))
    models = parallel.agree(lambda: _make_readers(targets, benchmarks, config, hf))
    max_response = config.eval.max_response or MAX_RESPONSE
    longest = max(len(ids) for model in models for prompts in model.prompts for ids in prompts.ids)
    context = min(hf.context, longest + max_response)
    with (
        _locked(out),
        watchdog.watch(out, config.parallel.timeout, parallel.rank(), parallel.world_size(), session.this_start()),
        Verifiers(config.reward) as verifiers,
        SharedEngine(config, hf, context, models[0].eos_id) as engine,
    ):
        if longest + max_response > hf.context:
            _say(
                f"the context of {hf.context} tokens holds the longest problem ({longest}) and {hf.context - longest} "
                f"tokens of an answer, not {max_response}: answers are cut where the context ends"
            )
        _start_verifiers(benchmarks, verifiers, config)
        _sample(models, engine, verifiers, config, max_response, out)
        for model in models:
            for benchmark in benchmarks:
                write_disagreements(out / model.target.name / benchmark.name, verifiers, config.eval.judge)
        parallel.from_rank_zero(lambda: _write_results(targets, benchmarks, config, max_response, out, began))


def _join(config: Config, targets: Sequence[Target]) -> None:
    """Join the ranks. megatron-core takes seconds to import, so it is left out for Hugging Face directories."""
    gpu_environment.prepare(deterministic=config.model.deterministic)
    if any(target.checkpoint is not None for target in targets):
        parallel.initialize(config.parallel, config.run.seed)
    else:
        parallel.join(config.parallel.timeout)


# ---- before the first sample ---------------------------------------------------------------------------------------


class _Reader:
    """A model's tokenizer and template, and the benchmarks as the model reads them."""

    def __init__(self, target: Target, benchmarks: Sequence[Benchmark], config: Config, hf: HFConfig) -> None:
        """Encode all benchmarks. Raises UserError for a prompt that does not fit, or an EOS token that is not clear."""
        self.target = target
        self.encoder = Encoder(target.hf_dir, config.data, hf.context)
        self.eos_id = self.encoder.tokenizer.eos_id
        model_eos_ids = self.encoder.tokenizer.model_eos_ids
        if model_eos_ids and self.eos_id not in model_eos_ids:
            raise UserError(
                f"{target.hf_dir}: its tokenizer ends a text with token {self.eos_id}, its config.json with "
                f"{', '.join(map(str, model_eos_ids))} (eos_token_id): an answer would not end; fix one of them"
            )
        self.prompts = [encode(benchmark, self.encoder, hf.context) for benchmark in benchmarks]

    def settings(self, prompts: Prompts, weights: dict[str, str], config: Config, max_response: int) -> dict[str, Any]:
        """Return everything that decides the samples. `weights` has the digests of the model's files."""
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


def _make_readers(
    targets: Sequence[Target], benchmarks: Sequence[Benchmark], config: Config, hf: HFConfig
) -> list[_Reader]:
    """Return the reader of each model. Raises UserError if they end a text with different tokens."""
    readers = [_Reader(target, benchmarks, config, hf) for target in targets]
    first = readers[0]
    for other in readers[1:]:
        if other.eos_id != first.eos_id:
            raise UserError(
                f"{first.target.path} and {other.target.path} end a text with different tokens ({first.eos_id} and "
                f"{other.eos_id}): one engine cannot serve both; evaluate them in two calls"
            )
    return readers


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder on rank 0: two calls in one folder would write into each other's samples."""
    release = parallel.agree(lambda: _lock(out) if parallel.rank() == 0 else None)
    try:
        yield
    finally:
        if release is not None:
            release()


def _lock(out: Path) -> Callable[[], None]:
    is_foreign_folder = out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists()
    if out.is_file() or is_foreign_folder:
        raise UserError(f"--out {out} holds something else than results of pctrain eval; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        release = try_lock(out / LOCK)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name a place you may write to") from None
    if release is None:
        raise UserError(f"--out {out} is in use by {holder(out / LOCK)}; wait for it to end, or name another --out")
    return release


def _start_verifiers(benchmarks: Sequence[Benchmark], verifiers: Verifiers, config: Config) -> None:
    """Start all verifiers: one that cannot be imported must fail now rather than after hours of sampling."""
    for benchmark in benchmarks:
        has_own = config.eval.benchmarks[benchmark.name].verifier
        key = f"eval.benchmarks.{benchmark.name}.verifier" if has_own else "reward.verifier"
        parallel.agree(partial(verifiers.start, key, benchmark.verifier))
    judge = config.eval.judge
    if judge is not None:
        parallel.agree(lambda: verifiers.start("eval.judge", judge))


# ---- the samples ---------------------------------------------------------------------------------------------------


def _sample(
    models: Sequence[_Reader], engine: SharedEngine, verifiers: Verifiers, config: Config, max_response: int, out: Path
) -> None:
    """Draw the samples that are missing. A model whose samples are all there is not loaded."""
    work: list[tuple[_Reader, Prompts, SampleFile]] = []
    for model in models:
        settings = parallel.from_rank_zero(partial(_settings, model, config, max_response))
        for prompts, of_benchmark in zip(model.prompts, settings, strict=True):
            folder = out / model.target.name / prompts.benchmark.name
            work.append((model, prompts, SampleFile(folder, of_benchmark)))
    total = sum(prompts.samples for _, prompts, _ in work)
    done = sum(file.done for *_, file in work)
    with progress("evaluation", total=total, start=done, unit="sample", rank=parallel.rank()) as bar:
        for model, prompts, file in work:
            bar.advance(0, model=model.target.name, benchmark=prompts.benchmark.name)
            if not file.complete:
                _fill(file, model, prompts, engine, verifiers, config, max_response, bar)


def _fill(
    file: SampleFile,
    model: _Reader,
    prompts: Prompts,
    engine: SharedEngine,
    verifiers: Verifiers,
    config: Config,
    max_response: int,
    bar: Bar,
) -> None:
    """Complete one file. It may have all samples already, if a call was killed before the file got its name."""
    lines: Iterator[list[dict[str, Any]]] = iter(())
    if file.done < prompts.samples:
        decode = model.encoder.tokenizer.decode
        lines = draw(prompts, file.done, engine.load(model.target), verifiers, decode, config, max_response)
    file.fill(lines, bar)


def _settings(model: _Reader, config: Config, max_response: int) -> list[dict[str, Any]]:
    """Return the settings for each benchmark. On rank 0: it reads the model's weights for their digests.

    A checkpoint's digests are in its manifest.
    """
    target = model.target
    if target.checkpoint is None:
        weights = content_digests(target.hf_dir)
    else:
        files = checkpoints.read_manifest(target.checkpoint)["files"]
        weights = {name: entry["sha256"] for name, entry in files.items()}
        weights |= {file.name: fingerprint(file) for file in model_files(target.hf_dir)}
    return [model.settings(prompts, weights, config, max_response) for prompts in model.prompts]


# ---- the end -------------------------------------------------------------------------------------------------------


def _write_results(
    targets: list[Target], benchmarks: Sequence[Benchmark], config: Config, max_response: int, out: Path, began: float
) -> None:
    judged = config.eval.judge is not None
    scores: dict[str, dict[str, Scores]] = {}
    for target in targets:
        folder = out / target.name
        scores[target.name] = {b.name: read_scores(folder / b.name, b.samples, judged=judged) for b in benchmarks}
    all_results = results.Results(targets, scores, results.shared_settings(config, benchmarks, max_response))
    messages = results.write(all_results, out)
    results.show(all_results, messages, out, time.monotonic() - began)


def _say(line: str) -> None:
    if parallel.rank() == 0:
        make_console().print(line, markup=False, highlight=False, soft_wrap=True)
