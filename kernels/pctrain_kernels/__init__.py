"""Output head of a language model fused with what is computed from its logits; the logits of a batch never exist at once.

`linear_logprob_entropy`: log-probability of the target and entropy of every row, recomputed in backward (four matrix products).
`linear_token_loss`: a sum over tokens of any per-token loss of those two, gradients made in the forward pass (three matrix products).
Both are vocabulary parallel and sequence parallel over a `torch.distributed` group. `reference` holds their definition.
"""

from pctrain_kernels.linear_logprob import linear_logprob_entropy
from pctrain_kernels.linear_token_loss import TokenLoss, linear_token_loss

__all__ = ["TokenLoss", "linear_logprob_entropy", "linear_token_loss"]
