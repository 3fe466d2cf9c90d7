"""Every call and attribute of vLLM, megatron-core and torch in this project exists and takes its arguments."""

from collections import Counter
from pathlib import Path

import pytest

from tests.contracts.calls import Uses, uses_of
from tests.contracts.tables import TABLES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def uses() -> list[Uses]:
    return list(uses_of({ROOT / folder: ROOT for folder in ("pctrain", "kernels", "launch")}, TABLES))


def test_every_use_fits_the_installed_packages(uses):
    faults = [fault for module in uses for fault in module.report.faults]
    assert not faults, "\n".join(faults)


def test_the_uses_are_found(uses):
    """The calls that only a GPU makes are among those that were bound."""
    bound = Counter(name for module in uses for name in module.report.bound)
    packages = Counter(name.partition(".")[0] for name in bound)
    assert packages["vllm"] >= 12 and packages["megatron"] >= 50 and packages["torch"] >= 80
    for name in (
        "vllm.entrypoints.llm.LLM.sleep",
        "vllm.entrypoints.llm.LLM.wake_up",
        "vllm.v1.engine.llm_engine.LLMEngine.is_sleeping",
        "vllm.v1.engine.core_client.InprocClient.shutdown",
        "vllm.sampling_params.SamplingParams",
        "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec",
        "megatron.core.transformer.transformer_config.TransformerConfig",
        "megatron.core.dist_checkpointing.strategies.async_utils.AsyncCallsQueue.schedule_async_request",
        "torch.nn.attention.varlen.varlen_attn",
        "torch.cuda.streams.Event",
        "torch.cuda.streams.Event.elapsed_time",
        "torch.cuda.memory.empty_cache",
        "torch.distributed.distributed_c10d.all_gather_into_tensor",
    ):
        assert bound[name], f"{name} was not found in the code"


def test_the_tables_have_no_entry_too_many(uses):
    seen = {name for module in uses for name in module.report.seen}
    entries = {*TABLES.variables, *TABLES.attributes, *TABLES.absent}
    assert not entries - seen, f"nothing uses {sorted(entries - seen)}"


FAULTY = {
    "import torch.cuda.gone": "module 'torch.cuda' has no attribute 'gone'",
    "import torch\ntorch.cuda.Event(timing=True)": "unexpected keyword argument 'timing'",
    "from vllm import LLM\ndef f(llm: LLM):\n    llm.wake(tags=[])": "LLM has no attribute 'wake'",
    "from vllm import LLM\ndef f(llm: LLM):\n    llm.sleep(lvl=2)": "unexpected keyword argument 'lvl'",
    "from vllm import LLM\ndef f(llm: LLM):\n    llm.llm_engine.awake()": "LLMEngine has no attribute 'awake'",
    "from vllm import LLM\nclass A:\n    def __init__(self, llm: LLM):\n        self._llm = llm\n"
    "    def f(self):\n        self._llm.sleep(lvl=2)": "unexpected keyword argument 'lvl'",
    "from vllm import LLM\ndef f(llm: LLM):\n    llm.llm_engine.renderer.tokenizer": "add it to ATTRIBUTE_TYPES",
    "from megatron.core import parallel_state\nparallel_state.get_group()": "has no attribute 'get_group'",
    "from megatron.core.tensor_parallel import mappings\ndef f():\n    def gather(input_):\n        pass\n"
    "    mappings._gather_along_first_dim = gather": "gather does not take ['group', 'output_split_sizes'",
    "from megatron.core.transformer.dot_product_attention import DotProductAttention\n"
    "class A(DotProductAttention):\n    def forward(self, query): ...": "forward does not take ['key', 'value'",
    "from megatron.core.transformer.dot_product_attention import DotProductAttention\n"
    "class A(DotProductAttention):\n    def f(self):\n        return self.scales": "no attribute 'scales'",
}


@pytest.mark.parametrize("code", FAULTY, ids=range(len(FAULTY)))
def test_faults_are_found(code, tmp_path):
    (tmp_path / "faulty.py").write_text(code)
    [module] = uses_of({tmp_path: tmp_path}, TABLES)
    assert any(FAULTY[code] in fault for fault in module.report.faults), module.report.faults
