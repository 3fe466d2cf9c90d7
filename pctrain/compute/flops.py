"""Training compute, counted twice: by the formulas of arXiv 2512.11470, appendix E, and exactly.

The formulas give the x of every fit.

"FLOPs" are floating point operations here (a multiply-add is two). One EFLOP is 1e18. `S` is the mean length of a
sequence, prompt and response together, in tokens. All functions return floats.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from pctrain.compute.model_shape import ModelShape

EFLOP = 1e18
Recompute = Literal["none", "selective", "full"]

# A backward pass costs two forward passes: one for the gradients of the inputs, one for those of the weights.
TRAINING_UNITS = 3.0


def paper_forward_per_token(shape: ModelShape, mean_length: float) -> float:
    """f(S) = 2 [L (3 H F + 2 H (H + D_kv)) + 2 V H] + 4 S L H: the forward FLOPs of one token in the paper's count.

    As published, 2 V H counts embedding and head alike, attention is not halved for causality, and the query width is
    taken as H.
    """
    s = shape
    linear = s.layers * (3 * s.hidden * s.ffn + 2 * s.hidden * (s.hidden + s.kv_width)) + 2 * s.vocab * s.hidden
    return 2.0 * linear + 4.0 * mean_length * s.layers * s.hidden


def paper_sft(shape: ModelShape, *, steps: float, batch: float, mean_length: float) -> float:
    """Return the FLOPs of `steps` SFT steps of `batch` sequences: 3 B S f per step."""
    return steps * TRAINING_UNITS * batch * mean_length * paper_forward_per_token(shape, mean_length)


def paper_grpo_step(shape: ModelShape, *, batch: float, group: float, mean_length: float) -> float:
    """Return the FLOPs of a GRPO step, `batch` prompts x `group` rollouts: 4 B G S f (1 to sample, 3 to train)."""
    return (1.0 + TRAINING_UNITS) * batch * group * mean_length * paper_forward_per_token(shape, mean_length)


def paper_dapo_step(
    shape: ModelShape, *, rounds: float, batch_generated: float, batch_trained: float, group: float, mean_length: float
) -> float:
    """Return the FLOPs of a DAPO step: (K B_gen + 3 B_train) G S f.

    K sampling rounds generate B_gen prompts each; B_train prompts are trained on.
    """
    prompts = rounds * batch_generated + TRAINING_UNITS * batch_trained
    return prompts * group * mean_length * paper_forward_per_token(shape, mean_length)


def paper_luffy_step(
    shape: ModelShape, *, batch: float, group: float, length: float, experts: float, expert_length: float
) -> float:
    """Return the FLOPs of a LUFFY or SRFT step: 4 [B G S_on + B N S_off] f.

    A prompt has G rollouts and N expert trajectories.

    Rollouts and expert trajectories differ in length, so their tokens cost f(S_on) and f(S_off).
    """
    on_policy = paper_forward_per_token(shape, length) * length
    off_policy = paper_forward_per_token(shape, expert_length) * expert_length
    return (1.0 + TRAINING_UNITS) * batch * (group * on_policy + experts * off_policy)


def exact_forward(shape: ModelShape, lengths: ArrayLike) -> float:
    """Return the forward FLOPs of sequences of `lengths` [n] tokens, with each matrix product counted once.

    Position i of a sequence attends to i keys, so scores and values of a sequence cost 2 * 2 * S (S + 1) / 2 * query
    width per layer. The embedding is a look-up and free. Every token passes the head. Norms, softmax and activations
    (below 1%) are left out.
    """
    tokens = float(np.sum(lengths, dtype=np.float64))
    return tokens * 2.0 * (shape.layers * shape.layer_weights + shape.vocab * shape.hidden) + _attention(shape, lengths)


def exact_training(shape: ModelShape, lengths: ArrayLike, recompute: Recompute = "none") -> float:
    """Return the FLOPs of forward and backward passes over `lengths` [n] tokens, recomputation included.

    `recompute` is `parallel.recompute`: `full` recomputes all layers but not the head;
    `selective` recomputes scores and values, inside attention.
    """
    again = 0.0
    if recompute == "full":
        tokens = float(np.sum(lengths, dtype=np.float64))
        again = 2.0 * tokens * shape.layers * shape.layer_weights + _attention(shape, lengths)
    elif recompute == "selective":
        again = _attention(shape, lengths)
    return TRAINING_UNITS * exact_forward(shape, lengths) + again


def _attention(shape: ModelShape, lengths: ArrayLike) -> float:
    """Return the forward FLOPs of scores and values in all layers, under the causal mask."""
    lengths = np.asarray(lengths, dtype=np.float64)
    return 2.0 * shape.layers * shape.query_width * float((lengths * (lengths + 1.0)).sum())
