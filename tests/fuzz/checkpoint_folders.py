"""The run, the tokens and the model that the target `checkpoints` changes."""

from __future__ import annotations

import os
from pathlib import Path

from pctrain.config.load import read
from pctrain.config.tree import ArchitectureConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig

RUN_OPTIONS = [
    "--run.dir=run",
    "--run.tensorboard=false",
    "--model.path=model",
    "--data.train=a.jsonl",
    "--data.validation=a.jsonl",
]
ARCHITECTURE = ArchitectureConfig(layers=1, hidden=16, heads=2, kv_heads=2, ffn=16, context=64)
LEDGER = {
    "joint": 0.0,
    "totals": {
        "sft_update": {
            "sequences": 4,
            "tokens": 80,
            "paper_flops": 2e9,
            "exact_flops": 3e9,
            "seconds": 0.5,
            "device_seconds": 0.5,
        }
    },
}
STATE = {
    "step": 2,
    "ledger": LEDGER,
    "skipped_in_a_row": 0,
    "recent_losses": [2.0, 1.5],
    "validations": [[0, 0.0, 3.0, 0.1, False], [2, 2e-9, 2.0, 0.1, True]],
    "prompts": {"position": 3, "carried": [0, 1]},
}
ROLLOUT = {
    "id": "p:1",
    "group": 0,
    "prompt": "1+1=",
    "response": "2",
    "answer": "2",
    "reward": 1.0,
    "cause": "right",
    "advantage": 0.5,
    "tokens": 3,
    "finish": "stop",
    "kept": True,
    "why": "",
    "prefix": "so",
}
METRICS = [
    {"step": 0, "kind": "val", "eflops_sft": 0.0, "eflops_rl": 0.0, "val_loss": 3.0, "val_loss_se": 0.1},
    {"step": 1, "kind": "train", "eflops_sft": 1e-9, "eflops_rl": 0.0, "loss": 2.5},
    {"step": 2, "kind": "val", "eflops_sft": 2e-9, "eflops_rl": 0.0, "val_loss": 2.0, "val_loss_se": 0.1},
    {"step": 2, "kind": "eval", "eflops_sft": 2e-9, "eflops_rl": 0.0, "score": 50.0, "score_se": 1.0},
]


def make(folder: Path) -> None:
    """A run with two checkpoints, tokens, a model."""
    from pctrain.core import session
    from pctrain.data.build import TokenJob, build, folder_of
    from pctrain.data.rows import make_row
    from pctrain.data.scratch_model import make_hf_dir
    from pctrain.distributed import parallel
    from pctrain.run.folder import RunFolder
    from pctrain.sft.loss import cross_entropy

    run, store, model = (folder / "bases" / name for name in ("run", "store", "model"))
    run.mkdir(parents=True)
    store.mkdir()
    os.chdir(run)
    (run / "a.jsonl").write_text('{"prompt": "1+2=", "response": "3", "answer": "3"}\n' * 4)
    make_hf_dir(run / "model", ARCHITECTURE, ["12+3=15 so \\boxed{15}", "7-1=6, then"], vocab_size=300, seed=1)
    make_hf_dir(model / "model", ARCHITECTURE, ["12+3=15 so \\boxed{15}", "7-1=6, then"], vocab_size=300, seed=1)
    settings = config()
    parallel.initialize(settings.parallel, 0)
    learner = make_core(run / "model")
    learner.train_step(learner.pack([make_row([5, 6, 7], [8, 9, 2])], 64), cross_entropy, want_entropy=False)
    with RunFolder.open(settings, "sft", [Path("a.jsonl")]) as opened:
        for row in METRICS:
            opened.record(
                row["step"], row["kind"], {key: value for key, value in row.items() if key not in ("step", "kind")}
            )
        opened.record_ledger([{"step": 1, "phase": "sft_update", "tokens": 80}])
        opened.say("step 1 loss 2")
        for step in (1, 2):
            session.save(opened, step, learner, {**STATE, "step": step})
        opened.write_rollouts(2, [ROLLOUT])
    job = TokenJob(
        (Path("a.jsonl"),), Path("model"), settings.data.model_copy(update={"template": "none", "workers": 1}), 64
    )
    cache = folder_of(Path("cache"), job)
    for _ in build(job, cache):
        pass
    cache.rename(store / "tokens")


def config() -> Config:
    return read(None, RUN_OPTIONS)


def make_core(model: Path):
    from pctrain.core import Learner

    return Learner(
        ModelConfig(path=model), ParallelConfig(), optimizer_config=OptimizerConfig(), total_steps=10, seed=0
    )
