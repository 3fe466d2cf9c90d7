"""`pctrain convert`: a Hugging Face directory to a checkpoint of weights, and back, at any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from pctrain.common.errors import UserError
from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config, ResolvedConfig
from pctrain.core import Learner, checkpoint, weights
from pctrain.data.rows import make_row
from pctrain.distributed import parallel
from pctrain.hf import weight_files
from pctrain.run import checkpoints
from pctrain.run.checkpoint_state import STATE, state_text
from pctrain.run.checkpoints import checkpoint_fault, checkpoint_step

# Both sides are in float32 and differ in the order of sums: 1e-6 on small models, below 1e-4 on large ones. A wrong
# layout is off by 0.1 and more.
TOLERANCE = 2e-4
_SEQUENCES, _LENGTH = 4, 64


def hf_to_mcore(config: Config, source: Path, out: Path, verify: bool) -> None:
    """Write checkpoint folder `out` (named step-N), for `model.checkpoint`, from a Hugging Face directory.

    Collective, at `config.parallel`; the checkpoint loads at any other layout. The weights are kept in `model.dtype`.
    """
    checkpoint_step(out)  # refuses another name
    parallel.initialize(config.parallel, config.run.seed)
    parallel.from_rank_zero(lambda: _refuse_existing(out))
    learner = _learner(config, source)
    temporary = parallel.from_rank_zero(lambda: checkpoints.begin(out))
    checkpoint.save_weights(temporary, learner.chunks)
    parallel.barrier()
    parallel.from_rank_zero(lambda: _commit(temporary, out, learner, source))
    _print(f"{out}: wrote the weights of {source} ({learner.hf.architecture}, {config.model.dtype})")
    _print(f"use them with --model.path={source} --model.checkpoint={out}")
    if verify:
        checkpoint.load_weights(out, learner.chunks)
        _verify(learner, source)


def mcore_to_hf(config: ResolvedConfig, source: Path, out: Path, verify: bool) -> None:
    """Write the weights of checkpoint `source` as Hugging Face directory `out`.

    Config, tokenizer and dtypes are those of `model.path`. Collective, at `config.parallel`, whatever the layout at
    which the checkpoint was written.
    """
    hf_dir = config.model.path
    parallel.initialize(config.parallel, config.run.seed)
    parallel.from_rank_zero(lambda: _refuse_existing(out))
    parallel.from_rank_zero(lambda: _refuse_incomplete(source))
    learner = _learner(config, hf_dir, source)
    with weight_files.HFReader(hf_dir) as reader:
        dtypes = {name: reader.dtype(name) for unit in weights.units(learner.hf, te=False) for name in unit.hf}
    learner.export(out, dtypes)
    names = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    _print(f"{out}: wrote the weights of {source} ({learner.hf.architecture}) in {names}, the dtype of {hf_dir}")
    if verify:
        weights.round_to(learner.modules, learner.hf, learner.spec == "te", dtypes)
        _verify(learner, out)


def _learner(config: Config, hf_dir: Path, source: Path | None = None) -> Learner:
    model = config.model.resolved(hf_dir, source)
    return Learner(model, config.parallel, optimizer_config=None, total_steps=1, seed=config.run.seed)


def _verify(learner: Learner, hf_dir: Path) -> None:
    """Compare log-probs of random sequences with those of transformers on the same directory, both in float32.

    Raises UserError if the largest difference exceeds the tolerance.
    """
    rng, tensor = np.random.default_rng(0), parallel_state.get_tensor_model_parallel_world_size()
    length = min(_LENGTH, learner.hf.context)
    rows = [make_row(ids[:1], ids[1:]) for ids in rng.integers(0, learner.hf.vocab, (_SEQUENCES, length)).tolist()]
    learner_logprobs = learner.logprobs(rows, -(-_SEQUENCES * _LENGTH // tensor) * tensor)
    reference = parallel.from_rank_zero(lambda: _transformers_logprobs(hf_dir, [row.tokens for row in rows]))
    predicted = np.concatenate([logprobs[1:] for logprobs in learner_logprobs])
    worst = float(np.max(np.abs(predicted - np.concatenate(reference))))
    _print(
        f"compared {_SEQUENCES * (length - 1)} log-probs with those of transformers: "
        f"largest difference {worst:.2e}, at most {TOLERANCE:.0e} allowed"
    )
    if not worst <= TOLERANCE:  # a NaN is refused too
        raise UserError(
            f"{hf_dir}: log-probs differ from those of transformers by {worst:.2e}, expected at most {TOLERANCE:.0e}; "
            "do not use the result"
        )


def _transformers_logprobs(hf_dir: Path, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Return the log-prob of every token but the first, float32 [L - 1] per sequence, by transformers on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    by_sequence = []
    for tokens in sequences:
        ids = torch.as_tensor(tokens)[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
        by_sequence.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())
    return by_sequence


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; name a folder that does not exist yet")


def _refuse_incomplete(source: Path) -> None:
    fault = checkpoint_fault(source) if source.is_dir() else f"{source} is not a folder"
    if fault is not None:
        raise UserError(f"checkpoint {source}: {fault}; name a complete checkpoint, such as RUN/checkpoints/step-100")


def _commit(temporary: Path, out: Path, learner: Learner, source: Path) -> None:
    """Complete the checkpoint. Its ledger is empty: no compute of ours went into these weights yet."""
    (temporary / STATE).write_text(state_text({"ledger": Ledger(learner.hf.shape).state_dict()}) + "\n")
    checkpoints.commit(temporary, out, {"kind": "weights", "source": str(source)})


def _print(line: str) -> None:
    if parallel.rank() == 0:
        print(line, flush=True)
