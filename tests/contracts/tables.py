"""Classes of variables and attributes that the code does not name.

An entry that nothing uses is a fault (tests/contracts/test_calls.py).
"""

import torch
import torch.nn.attention.varlen
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from vllm import LLM, RequestOutput
from vllm.config import VllmConfig
from vllm.v1.engine.core_client import InprocClient

from tests.contracts.calls import Many, Tables, Unknown

TABLES = Tables(
    variables={
        "pctrain/core/layers/varlen_attention.py:_varlen()": torch.nn.attention.varlen,
        "pctrain/distributed/waits.py:after": torch.cuda.Event,
        "pctrain/distributed/waits.py:before": torch.cuda.Event,
        "pctrain/rollout/engine.py:self._llm": LLM,
        "pctrain/rollout/queue.py:output": RequestOutput,
    },
    attributes={  # Unknown: a value of plain Python or torch, which is not followed
        "CompletionOutput.logprobs": Unknown,  # FlatLogprobs: test_vllm.py
        "DistributedOptimizer.optimizer": Unknown,
        "GPTModel.config": TransformerConfig,
        "GPTModel.output_layer": Unknown,
        "LLMEngine.engine_core": InprocClient,
        "LLMEngine.vllm_config": VllmConfig,
        "MegatronOptimizer.chained_optimizers": Many(DistributedOptimizer),
        "TopKRouter.config": TransformerConfig,
    },
    absent=(
        "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",  # with Apex
        "megatron.core.transformer.moe.moe_utils.te_general_gemm",  # with Transformer Engine
    ),
)
