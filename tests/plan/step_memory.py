"""The peak of host memory of real steps, on a rank: the program that tests/plan/test_plan_memory.py starts.

    python step_memory.py CONFIG.json     {"options": [--section.key=value, ...], "kind": "sft" | "rl", "rows": n,
    "length": tokens, "save": folder or null}

Two steps of `rows` sequences of `length` tokens each; of RL with an engine that samples and is given the weights in
between. Then a checkpoint, if it is asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.helpers.peak_memory import status


def main() -> int:
    asked = json.loads(Path(sys.argv[1]).read_text())
    import numpy as np
    import torch

    from pctrain.config.load import read
    from pctrain.core import Learner
    from pctrain.data.rows import make_row
    from pctrain.sft.loss import cross_entropy
    from pctrain.tools import convert  # noqa: F401  megatron-core and what writes files belong to the base

    torch.set_num_threads(1)
    config, sampling = read(None, asked["options"]), asked["kind"] == "rl"
    if sampling:
        import vllm.model_executor.models.llama
        import vllm.v1.engine.llm_engine
        import vllm.v1.executor.uniproc_executor
        import vllm.v1.worker.cpu_worker  # noqa: F401

        from pctrain.rollout import Request, RolloutEngine
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    kind = getattr(config, asked["kind"])
    learner = Learner(config.model, config.parallel, optimizer_config=kind.optimizer, total_steps=10, seed=0)
    engine = None
    if sampling:
        if config.rl.algorithm.kl_coef:
            learner.keep_reference()
        engine = RolloutEngine(
            config.model.path, config.rollout, dtype=config.model.dtype, context=learner.hf.context, eos_id=2
        )
    random = np.random.default_rng(0)
    tokens = random.integers(3, 260, (asked["rows"], asked["length"])).tolist()
    rows = [make_row(of_row[:4], of_row[4:]) for of_row in tokens]
    assert {len(row) for row in rows} == {asked["length"]}
    for _ in range(2):
        if engine is not None:
            engine.load_weights(learner.hf_weights())
            requests = [Request(row.tokens[:8].tolist(), seed) for seed, row in enumerate(rows)]
            engine.generate(requests, temperature=1.0, max_response=16, logprobs=True)
            engine.sleep()
        learner.train_step(learner.pack(rows, kind.token_budget), cross_entropy, want_entropy=sampling)
    if asked["save"]:
        learner.save(Path(asked["save"]))
        learner.poll_save(wait=True)
    peak = status("VmHWM")
    print(json.dumps({"base": base, "peak": peak}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
