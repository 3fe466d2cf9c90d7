"""Any checkpoint of an SFT run exports to Hugging Face format; transformers and vLLM load it with equal log-probs."""

import numpy as np

from tests.helpers import tiny


def _both(exported):
    """Return the largest log-prob difference between transformers and an engine started from the directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pctrain.config.tree import RolloutConfig
    from pctrain.rollout import RolloutEngine

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32),
        AutoTokenizer.from_pretrained(exported),
    )

    @torch.no_grad()
    def by_transformers(rows):
        found = []
        for row in rows:
            ids = torch.tensor([row])
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
            found.append(np.concatenate([[0.0], logprobs]))
        return found

    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("1+2=", "9-4+3=")]
    engine = RolloutEngine(
        exported, RolloutConfig(kv_cache_mb=64), dtype="float32", context=160, eos_id=tokenizer.eos_token_id
    )
    try:
        return engine.verify(by_transformers, prompts, tokenizer.eos_token_id)
    finally:
        engine.close()


def test_a_checkpoint_in_the_middle(ranks, sft_run, tmp_path):
    exported = tmp_path / "exported"
    command = (
        "convert",
        "mcore-to-hf",
        str(sft_run / "checkpoints" / "step-60"),
        str(exported),
        f"--model.path={sft_run}/model",
    )
    [(status, errors)] = ranks.run(tiny.cli, *command, world=1)
    assert status == 0, errors
    assert ranks.run(_both, exported, world=1, deadline=200)[0] < 1e-4  # fp32, two implementations
    assert (exported / "model.safetensors").read_bytes() != (sft_run / "hf" / "model.safetensors").read_bytes()
