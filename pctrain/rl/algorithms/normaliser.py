"""The denominator of an update: what the sum of its token losses is divided by (`rl.algorithm.normaliser`).

token      the number of trained tokens of all responses (arXiv 2512.11470; DAPO, arXiv 2503.14476): every token counts
           the same
sequence   the mean over responses of each response's token mean (GRPO, arXiv 2402.03300): weights 1 / length
fixed      responses x max_response (Dr. GRPO, arXiv 2503.20783): the lengths of other responses do not matter
published  max_response, as in the code of LUFFY, Unify-Post-Training and prefix_rft, which does not divide by the
           number of responses; an SFT term is divided by the number of SFT tokens. (That code takes this mean
           per micro-batch, so the ratio of the two depends on packing. Here it is taken over the update.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pctrain.data.rows import Row


def normalise(rows: Sequence[Row], normaliser: str, max_response: int) -> tuple[Sequence[Row], float | None]:
    """Return (rows, denominator) of one update for `Learner.pack`; a denominator of None is the sum of the weights.

    The stream `sft_weight`, if the rows have it, is the coefficient of an SFT term.
    """
    if normaliser == "sequence":
        return [replace(row, weights=row.weights / max(1.0, row.weights.sum())) for row in rows], None
    if normaliser == "fixed":
        return rows, float(len(rows) * max_response)
    if normaliser == "published":
        if "sft_weight" in rows[0].streams:
            tokens = sum(int(np.count_nonzero(row.streams["sft_weight"] * row.weights)) for row in rows)
            scale = np.float32(max_response / max(1, tokens))
            rows = [
                replace(row, streams={**row.streams, "sft_weight": row.streams["sft_weight"] * scale}) for row in rows
            ]
        return rows, float(max_response)
    return rows, None
