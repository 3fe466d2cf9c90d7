"""Log-probability, entropy and losses of a language model's output, fused, vocabulary parallel over a `torch.distributed` group.

Of given logits: `vocab_parallel_logprob_entropy`, `vocab_parallel_cross_entropy`.
Of hidden states and the output head, where the logits of a batch never exist at once: `linear_logprob_entropy` (recomputed in backward:
four matrix products), `linear_token_loss` (a sum over tokens of any per-token loss, gradients made in the forward pass: three), and that
with the losses that come along, `linear_cross_entropy` and `linear_policy_loss`. `policy_loss` is the latter's function of one token.
`reference` holds the definitions.
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
