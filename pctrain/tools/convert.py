"""`pctrain convert`: Hugging Face directory -> checkpoint of weights, and back, at any layout."""

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

# fp32 on both sides, another order of sums: 1e-6 on small models, below 1e-4 on large ones. A wrong layout is off by 0.1 and more.
TOLERANCE = 2e-4
_SEQUENCES, _LENGTH = 4, 64


def hf_to_mcore(config: Config, source: Path, out: Path, verify: bool) -> None:
    """Writes checkpoint folder `out` (named step-N) with the weights of the Hugging Face directory `source`; `model.checkpoint` takes it.

    Collective, at `config.parallel`; the checkpoint loads at any other layout. The weights are kept in `model.dtype`.
    """
    checkpoint_step(out)  # refuses another name
    parallel.initialize(config.parallel, config.run.seed)
    parallel.from_rank_zero(lambda: _refuse_existing(out))
    learner = _core(config, source)
    temporary = parallel.from_rank_zero(lambda: checkpoints.begin(out))
    checkpoint.save_weights(temporary, learner.chunks)
    parallel.barrier()
    parallel.from_rank_zero(lambda: _commit(temporary, out, learner, source))
    _say(f"{out}: weights of {source} ({learner.hf.architecture}, {config.model.dtype})")
    _say(f"use it by --model.path={source} --model.checkpoint={out}")
    if verify:
        checkpoint.load(out, learner.chunks)
        _verify(learner, source)


def mcore_to_hf(config: ResolvedConfig, source: Path, out: Path, verify: bool) -> None:
    """Writes the weights of checkpoint `source` as Hugging Face directory `out`, in the dtypes of `model.path`, whose config and tokenizer
    go with them.

    Collective, at `config.parallel`, whatever the layout that the checkpoint was written at.
    """
    parallel.initialize(config.parallel, config.run.seed)
    parallel.from_rank_zero(lambda: (_refuse_existing(out), _refuse_incomplete(source)))
    learner = _core(config, config.model.path, source)
    with weight_files.HFReader(config.model.path) as reader:
        dtypes = {name: reader.dtype(name) for unit in weights.units(learner.hf, te=False) for name in unit.hf}
    learner.export(out, dtypes)
    names = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    _say(f"{out}: weights of {source} ({learner.hf.architecture}) in {names}, as {config.model.path} has them")
    if verify:
        weights.round_to(learner.modules, learner.hf, learner.spec == "te", dtypes)
        _verify(learner, out)


def _core(config: Config, hf_dir: Path, source: Path | None = None) -> Learner:
    model = config.model.resolved(hf_dir, source)
    return Learner(model, config.parallel, optimizer_config=None, total_steps=1, seed=config.run.seed)


def _verify(learner: Learner, hf_dir: Path) -> None:
    """Log-probs of random sequences against transformers on the same directory, both in float32. Raises UserError above the tolerance."""
    rng, tensor = np.random.default_rng(0), parallel_state.get_tensor_model_parallel_world_size()
    length = min(_LENGTH, learner.hf.context)
    rows = [make_row(ids[:1], ids[1:]) for ids in rng.integers(0, learner.hf.vocab, (_SEQUENCES, length)).tolist()]
    ours = learner.logprobs(rows, -(-_SEQUENCES * _LENGTH // tensor) * tensor)
    theirs = parallel.from_rank_zero(lambda: _transformers_logprobs(hf_dir, [row.tokens for row in rows]))
    worst = float(np.max(np.abs(np.concatenate([a[1:] for a in ours]) - np.concatenate(theirs))))
    _say(
        f"{_SEQUENCES * (length - 1)} log-probs against transformers: largest difference {worst:.2e} (allowed: {TOLERANCE:.0e})"
    )
    if not worst <= TOLERANCE:  # a NaN is refused too
        raise UserError(
            f"{hf_dir}: its log-probs differ from transformers' by {worst:.2e}, above {TOLERANCE:.0e}; do not use the result"
        )


def _transformers_logprobs(hf_dir: Path, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Log-prob of every token but the first, float32 [L - 1] a sequence, by transformers on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    found = []
    for tokens in sequences:
        ids = torch.as_tensor(tokens)[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
        found.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())
    return found


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; name a folder that is still to be made")


def _refuse_incomplete(source: Path) -> None:
    fault = checkpoint_fault(source) if source.is_dir() else f"{source} is not a folder"
    if fault is not None:
        raise UserError(f"checkpoint {source}: {fault}; name a complete one, such as RUN/checkpoints/step-100")


def _commit(temporary: Path, out: Path, learner: Learner, source: Path) -> None:
    """A start has cost no compute of ours yet: its ledger is empty."""
    (temporary / STATE).write_text(state_text({"ledger": Ledger(learner.hf.shape).state_dict()}) + "\n")
    checkpoints.commit(temporary, out, {"kind": "weights", "source": str(source)})


def _say(line: str) -> None:
    if parallel.rank() == 0:
        print(line, flush=True)
