"""What the sum of token losses of one update is divided by (`rl.normaliser`).

token      the number of trained tokens of all responses (PAPER.md 4; DAPO, arXiv 2503.14476): every token counts alike
sequence   the mean over responses of each one's token mean (GRPO, arXiv 2402.03300): weights 1 / length
fixed      responses x max_response (Dr. GRPO, arXiv 2503.20783): lengths of other responses do not matter
published  max_response (code of LUFFY, Unify-Post-Training and prefix_rft, which does not divide by the number of responses); an
           SFT term by the number of its own tokens. (That code takes this mean by micro-batch, so the ratio of the two depends on
           packing; here it is taken over the update.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pctrain.data.rows import Row


def normalise(rows: list[Row], normaliser: str, max_response: int) -> tuple[list[Row], float | None]:
    """(rows, denominator) for `core.pack`, of the rows of one update; a denominator of None is the sum of their weights.

    The stream `sft_weight`, where rows have it, is the coefficient of an SFT term.
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
