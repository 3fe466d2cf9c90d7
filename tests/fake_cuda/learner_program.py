"""The learner on a fake `cuda:0`, phase by phase: the program that test_learner.py starts in a new process.

    python -m tests.fake_cuda.learner_program ASKED.json

ASKED.json is a `reports.Asked`, and the last line that is printed is a `reports.Report`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fake_cuda.device import start
from tests.fake_cuda.reports import CPU_TENSOR, ITEM, Asked, Report

if TYPE_CHECKING:
    from pctrain.config.tree import Config
    from pctrain.core import Learner
    from pctrain.data.rows import Row
    from pctrain.rl.groups import Group
    from tests.fake_cuda.mode import FakeCuda


@dataclass
class Scene:
    """A learner on the fake device, which every phase works on."""

    asked: Asked
    mode: FakeCuda
    config: Config
    learner: Learner
    budget: int  # tokens of a micro-batch

    def lengths(self, packs: int) -> list[int]:
        """Return lengths of sequences that fill so many micro-batches on every data parallel rank: two in each."""
        from pctrain.distributed import parallel

        short = self.budget * 3 // 8
        return [self.budget - short, short - 5] * packs * parallel.data_parallel()[1]

    def rows(self, packs: int) -> list[Row]:
        """Return such sequences with random tokens."""
        import numpy as np

        from pctrain.data.rows import make_row

        random = np.random.default_rng(0)
        tokens = [random.integers(3, 260, length).tolist() for length in self.lengths(packs)]
        return [make_row(of_row[:4], of_row[4:]) for of_row in tokens]


def sft(scene: Scene) -> None:
    """Make an SFT step of one micro-batch, as a warm-up, and then of each asked number."""
    import torch

    from pctrain.sft.loss import cross_entropy

    def token_loss(logprob: Any, entropy: Any, streams: Any) -> Any:
        if scene.asked.fault == CPU_TENSOR:
            logprob = logprob * torch.ones(len(logprob))
        if scene.asked.fault == ITEM:
            logprob.mean().item()
        return cross_entropy(logprob, entropy, streams)

    for packs in (0, *scene.asked.packs):
        with scene.mode.in_phase(f"sft {packs}"):
            batch = scene.learner.pack(scene.rows(packs or 1), scene.budget)
            assert len(batch.packs) == (packs or 1)
            update = scene.learner.train_step(batch, token_loss, want_entropy=False)
        assert not update.skipped


def logprob(scene: Scene) -> None:
    """Make a pass without gradients over each asked number of micro-batches."""
    for packs in scene.asked.packs:
        rows = scene.rows(packs)
        with scene.mode.in_phase(f"logprob {packs}"), _other_ranks_answer(scene, [len(row) for row in rows]):
            values = scene.learner.logprobs(rows, scene.budget)
        assert [len(of_row) for of_row in values] == [len(row) for row in rows]


def rl(scene: Scene) -> None:
    """Make RL steps of GRPO with old log-probs and a KL to the reference: two passes, then the updates."""
    from pctrain.rl.algorithms import registry
    from pctrain.rl.batch import make_batch
    from pctrain.rl.update import train_on

    section = scene.config.rl
    with scene.mode.in_phase("keep reference"):
        scene.learner.keep_reference(section.reference_offload)
    algorithm = registry.build(section, scene.config.rollout.max_response)
    for packs in scene.asked.packs:
        lengths = scene.lengths(packs) * section.updates
        groups = _groups(lengths, section.group)
        with scene.mode.in_phase(f"rl passes {packs}"), _other_ranks_answer(scene, lengths):
            batch = make_batch(algorithm, groups, scene.learner, section, 1.0)
        assert {"old_logprob", "ref_logprob"} <= set(batch.rows[0].streams)
        with scene.mode.in_phase(f"rl {packs}"):
            updates = train_on(batch, scene.learner, algorithm, section, 1.0)
        assert len(updates.made) == section.updates
        assert not any(made.update.skipped for made in updates.made)


def _groups(lengths: list[int], size: int) -> list[Group]:
    import numpy as np

    from tests.helpers.rl_cases import PROMPT, group

    random = np.random.default_rng(0)
    responses = [random.integers(10, 250, length - len(PROMPT)).tolist() for length in lengths]
    rewards = [float(index % 2) for index in range(size)]
    parts = [responses[first : first + size] for first in range(0, len(responses), size)]
    return [
        group(index, rewards, part, logprobs=[[-1.0] * len(response) for response in part])
        for index, part in enumerate(parts)
    ]


def weights(scene: Scene) -> None:
    """Stream the weights to an engine that keeps none."""
    with scene.mode.in_phase("weights"):
        devices = {str(tensor.device) for _, tensor in scene.learner.hf_weights()}
    assert devices == {"cuda:0"}


def checkpoint(scene: Scene) -> None:
    """Plan a checkpoint with the plans of the other ranks, and write it as the background process of a GPU does."""
    folder = Path(scene.asked.folder)
    folder.mkdir()
    done: list[bool] = []
    with scene.mode.in_phase("checkpoint"):
        scene.learner.save(folder, done=lambda: done.append(True))
    with scene.mode.in_phase("checkpoint written"):
        scene.learner.poll_save(wait=True)
    assert done == [True]


PHASES = {function.__name__: function for function in (sft, logprob, rl, weights, checkpoint)}


@contextlib.contextmanager
def _other_ranks_answer(scene: Scene, lengths: list[int]) -> Iterator[None]:
    """Let the other data parallel ranks send values for every row that a pass is asked for."""
    import numpy as np

    whole = {row: np.zeros((1, length), np.float32) for row, length in enumerate(lengths)}

    def object_of_rank(value: Any, rank: int) -> Any:
        return whole | value if isinstance(value, dict) else value

    before, scene.mode.object_of_rank = scene.mode.object_of_rank, object_of_rank
    yield
    scene.mode.object_of_rank = before


class _Sent(Exception):
    """A rank has sent its part of a checkpoint's plan to rank 0."""


def _use_plans_of_other_ranks(asked: Asked, mode: FakeCuda, config: Config) -> None:
    """Build every other rank's learner in turn and keep what it would write, for rank 0 to plan the checkpoint with."""
    from torch.distributed.checkpoint.planner import SavePlan

    plans: list[Any] = [None]

    def keep_plan(value: Any) -> None:
        if isinstance(value, SavePlan):
            plans.append(value)
            raise _Sent

    mode.on_send = keep_plan
    for rank in range(1, asked.world):
        mode.rank = rank
        learner = _build(config)
        folder = Path(f"{asked.folder}-of-rank-{rank}")
        folder.mkdir()
        with contextlib.suppress(_Sent):
            learner.save(folder)
        del learner
        _leave_ranks()
    assert len(plans) == asked.world
    mode.rank, mode.on_send = 0, lambda value: None
    mode.object_of_rank = lambda value, rank: plans[rank] if isinstance(value, SavePlan) and rank else value
    mode.forget()


def _build(config: Config) -> Learner:
    from pctrain.core import Learner

    return Learner(config.model, config.parallel, optimizer_config=config.sft.optimizer, total_steps=10, seed=0)


def _leave_ranks() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def main() -> int:
    asked = Asked(**json.loads(Path(sys.argv[1]).read_text()))
    mode = start(asked.world)

    from pctrain.common.device import on_gpu
    from pctrain.config.load import read

    assert on_gpu()
    config = read(None, asked.options)
    if "checkpoint" in asked.phases and asked.world > 1:
        _use_plans_of_other_ranks(asked, mode, config)
    with mode.in_phase("build"):
        learner = _build(config)
    parameters = [parameter for module in learner.modules for parameter in module.parameters()]
    assert {str(parameter.device) for parameter in parameters} == {"cuda:0"}
    scene = Scene(asked, mode, config, learner, config.sft.token_budget)
    for name in asked.phases:
        PHASES[name](scene)
    report = Report(
        described=learner.describe(),
        parameters=len(parameters),
        waits=[(*key, count, sorted(mode.waits.lines[key])) for key, count in sorted(mode.waits.items())],
        peaks=mode.memory.peaks,
        collectives=[(*key, count) for key, count in sorted(mode.collectives.items())],
    )
    print(json.dumps(asdict(report)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
