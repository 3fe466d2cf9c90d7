"""Fused log-probability, entropy and losses of a language model's output, vocabulary parallel over a process group.

From given logits: `vocab_parallel_logprob_entropy` and `vocab_parallel_cross_entropy`.

From hidden states and the output head, without the logits of a batch ever existing at once: `linear_logprob_entropy`
(recomputed in backward: four matrix products) and `linear_token_loss` (a sum over tokens of any per-token loss, with
gradients made in the forward pass: three). `linear_cross_entropy` and `linear_policy_loss` are the latter with the
losses of this package; `policy_loss` is the loss of one token.

`reference` has the definitions in plain PyTorch.
"""

from pctrain_kernels.linear_logprob import linear_logprob_entropy
from pctrain_kernels.linear_losses import linear_cross_entropy, linear_policy_loss
from pctrain_kernels.linear_token_loss import TokenLoss, linear_token_loss
from pctrain_kernels.logits import vocab_parallel_cross_entropy, vocab_parallel_logprob_entropy
from pctrain_kernels.policy import policy_loss

__all__ = [
    "TokenLoss",
    "linear_cross_entropy",
    "linear_logprob_entropy",
    "linear_policy_loss",
    "linear_token_loss",
    "policy_loss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logprob_entropy",
]
