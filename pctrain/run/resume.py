"""Where a run folder meets the core: opening together, going on from the newest checkpoint, saving a new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pctrain.common.errors import ToBeContinued, UserError
from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config, ResolvedConfig
from pctrain.data.prepare import prepare
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.files.durable import write_beside
from pctrain.hf.chat_template import ChatTemplate
from pctrain.run import checkpoints
from pctrain.run.checkpoints import checkpoint_step
from pctrain.run.folder import HF_FOLDER, TO_BE_CONTINUED, Kind, RunFolder

if TYPE_CHECKING:  # an evaluation asks here too, and needs no model of megatron-core
    from pctrain.core import Learner


@contextmanager
def begin(config: Config) -> Iterator[ResolvedConfig]:
    """Collective, around all that a command does: joins the ranks, watches over them, and makes in `run.dir` what the config leaves to be
    made (problems, tokenizer, initial weights): the config that is yielded names it.

    Where the model's layers cannot run here, it says so before anything is written.
    """
    from pctrain.core.layers.spec import choose_spec

    parallel.initialize(config.parallel, config.run.seed)
    choose_spec(config.model, config.parallel)
    mark = Path(config.run.dir) / TO_BE_CONTINUED
    with watchdog.watch(
        Path(config.run.dir), config.parallel.timeout, parallel.rank(), parallel.world_size(), this_start()
    ):
        try:
            parallel.from_rank_zero(lambda: mark.unlink(missing_ok=True))
            yield parallel.from_rank_zero(lambda: prepare(config, config.run.dir))
        except ToBeContinued:
            parallel.from_rank_zero(mark.touch)
            raise


def this_start() -> str:
    """Collective. What the folder of a failed start is called: with the process, for several jobs of a study share run.dir."""
    return parallel.from_rank_zero(lambda: f"{datetime.now():%Y-%m-%dT%H-%M-%S}-{os.uname().nodename}-{os.getpid()}")


def open_run(
    config: ResolvedConfig, kind: Kind, data_files: Iterable[Path], digests: Mapping[str, str] | None = None
) -> RunFolder:
    """Collective: rank 0 checks and locks the folder; where it refuses, every rank raises.

    The run is bound to what is in its data files (the fingerprint of those in `digests` is known), in the model's config and tokenizer,
    and to the checkpoint it starts from.
    """
    model = config.model
    inputs = [*data_files, model.path / "config.json", model.path / "tokenizer.json"]
    if model.checkpoint is not None:
        verify(model.checkpoint, checkpoints.damaged_start)
        inputs += [model.checkpoint / checkpoints.MANIFEST, model.checkpoint / checkpoints.STATE]
    return parallel.agree(lambda: RunFolder.open(config, kind, inputs, digests, rank=parallel.rank()))


def finished(run: RunFolder) -> bool:
    """Collective. Says so where the run had ended before."""
    done = parallel.from_rank_zero(lambda: run.finished)
    if done:
        run.say_finished()
        run.close()
    return done


@watchdog.phase("resume")
def resume(run: RunFolder, learner: Learner) -> tuple[int, dict]:
    """(step, state) of the newest checkpoint, loaded into `learner`; (0, {}) where there is none. What lies beyond it is cut.

    Says what is about to run.
    """
    newest = parallel.from_rank_zero(run.latest_checkpoint)
    if newest is not None:
        verify(newest, checkpoints.damaged)
    step = checkpoint_step(newest) if newest else 0
    parallel.agree(lambda: run.rewind(step if newest else None))
    run.say(learner.describe())
    if newest is None:
        return 0, {}
    learner.load(newest)
    run.log(f"resumed from {newest.name}")
    return step, checkpoints.read_state(newest, *(["prompts"] if run.kind == "rl" else []))


def verify(path: Path, error: Callable[[Path, str], UserError]) -> None:
    """Collective: reads every byte of a checkpoint, each rank its share; where a file is not as it was written, all raise `error`."""
    fault = parallel.from_rank_zero(lambda: checkpoints.size_fault(path))
    if fault is None:
        names = sorted(parallel.from_rank_zero(lambda: checkpoints.read_manifest(path)["files"]))
        faults = parallel.map_over_ranks(lambda share: checkpoints.content_faults(path, share), names)
        fault = next(filter(None, faults), None)
    if fault is not None:
        raise parallel.from_rank_zero(lambda: error(path, fault))


@watchdog.phase("checkpoint")
def save(run: RunFolder, step: int, learner: Learner, state: dict) -> None:
    """Collective. `state`: plain JSON values. Everything of this step has been recorded before.

    On a GPU the checkpoint is complete only after a later `core.poll_save`.
    """
    learner.poll_save(
        wait=True
    )  # one at a time, in order: the newest complete checkpoint is always the last one begun, or the one before
    temporary = parallel.from_rank_zero(lambda: run.begin_checkpoint(step))
    about = {
        "layout": {"world": parallel.world_size(), **run.config.parallel.model_dump(exclude={"timeout"})},
        "ledger": state["ledger"],
        "versions": {name: version(name) for name in ("megatron-core", "torch")},
    }
    text = json.dumps(state)

    def commit() -> None:
        (temporary / checkpoints.STATE).write_text(text)
        run.commit_checkpoint(temporary, step, about)

    learner.save(temporary, done=lambda: parallel.from_rank_zero(commit))


def asked_to_stop() -> bool:
    """Collective: whether a rank got SIGTERM or SIGUSR1. Within a run `RankTimes.end_step` asks."""
    return any(parallel.gather(watchdog.asked_to_stop()))


def leave(run: RunFolder, step: int) -> NoReturn:
    """On every rank, after the checkpoint of `step`. Raises ToBeContinued."""
    run.log(f"step {step} asked to stop: saved")
    raise ToBeContinued(
        f"to be continued: {run.path} was asked to stop and is saved at step {step}; the same command goes on from there"
    )


@watchdog.phase("export")
def export(run: RunFolder, learner: Learner, template: ChatTemplate | None) -> None:
    """Collective. The final weights as a Hugging Face directory, with the chat template that the run was trained under."""
    learner.export(run.path / HF_FOLDER)
    if template is not None:
        parallel.from_rank_zero(lambda: write_beside(run.path / HF_FOLDER / "chat_template.jinja", template.source))


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never) is due; the last step always is."""
    return every > 0 and (step % every == 0 or step == last)


def record_ledger(run: RunFolder, ledger: Ledger) -> None:
    """Writes the entries that came since the last call."""
    run.record_ledger(ledger.entries)
    ledger.entries.clear()
