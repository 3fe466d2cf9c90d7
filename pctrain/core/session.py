"""The life of a run on all ranks: begin, open the run folder, resume from the newest checkpoint, save, leave, export.

An evaluation uses this module too and needs no model of megatron-core, so it imports none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pctrain.common.errors import ToBeContinued, UserError
from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config, ResolvedConfig
from pctrain.data.prepare import prepare
from pctrain.data.sources import content_hash
from pctrain.distributed import gpu_environment, parallel
from pctrain.distributed.health import watchdog
from pctrain.files.durable import write_atomically
from pctrain.hf.chat_template import ChatTemplate
from pctrain.hf.directory import CHAT_TEMPLATE, model_files
from pctrain.run import checkpoints
from pctrain.run.checkpoint_state import STATE, read_state, state_text
from pctrain.run.checkpoints import checkpoint_step
from pctrain.run.config_file import Kind
from pctrain.run.folder import RunFolder
from pctrain.run.names import HF_FOLDER, TO_BE_CONTINUED

if TYPE_CHECKING:
    from pctrain.core import Learner


@contextmanager
def begin(config: Config) -> Iterator[ResolvedConfig]:
    """Join the ranks and watch over them, around everything that a command does. Collective.

    What the config leaves to be made (problems, tokenizer, initial weights) is made in `run.dir`; the yielded config
    names it. If the model's layers cannot run here, the error comes before anything is written.
    """
    from pctrain.core.layers.spec import choose_spec

    gpu_environment.prepare(deterministic=config.model.deterministic)
    parallel.initialize(config.parallel, config.run.seed)
    choose_spec(config.model, config.parallel)
    run_dir = Path(config.run.dir)
    mark = run_dir / TO_BE_CONTINUED
    with watchdog.watch(run_dir, config.parallel.timeout, parallel.rank(), parallel.world_size(), this_start()):
        try:
            parallel.from_rank_zero(lambda: mark.unlink(missing_ok=True))
            yield parallel.from_rank_zero(lambda: prepare(config, config.run.dir))
        except ToBeContinued:
            parallel.from_rank_zero(mark.touch)
            raise


def this_start() -> str:
    """Return the name of this start's folder of faults. Collective.

    It has the host and the process, because several jobs of a study share run.dir.
    """
    return parallel.from_rank_zero(lambda: f"{datetime.now():%Y-%m-%dT%H-%M-%S}-{os.uname().nodename}-{os.getpid()}")


def open_run(
    config: ResolvedConfig, kind: Kind, data_files: Iterable[Path], digests: Mapping[str, str] | None = None
) -> RunFolder:
    """Open the run folder: rank 0 checks and locks it, and if it refuses, every rank raises. Collective.

    The run is bound to the contents of its data files, to the model's config and tokenizer, and to the checkpoint it
    starts from. `digests`: fingerprints of further files that are known already.
    """
    inputs = [*data_files, *model_files(config.model.path)]
    start = config.model.checkpoint
    if start is not None:
        verify(start, checkpoints.damaged_start)
        inputs += [start / checkpoints.MANIFEST, start / STATE]
    return parallel.agree(
        lambda: RunFolder.open(config, kind, inputs, digests, rank=parallel.rank(), fingerprint_of=content_hash)
    )


def finished(run: RunFolder) -> bool:
    """Return whether the run had finished before; if so, say it and close the folder. Collective."""
    done = parallel.from_rank_zero(lambda: run.finished)
    if done:
        run.say_finished()
        run.close()
    return done


@watchdog.phase("resume")
def resume(run: RunFolder, learner: Learner) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint into `learner` and return (step, state); (0, {}) if there is none.

    Records after its step are cut. The model that is about to run is described in the log.
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
    return step, read_state(newest, *(["prompts"] if run.kind == "rl" else []))


def verify(path: Path, error: Callable[[Path, str], UserError]) -> None:
    """Read every byte of a checkpoint, each rank its share; if a file is not as it was written, all ranks raise
    `error`.

    Collective.
    """
    fault = parallel.from_rank_zero(lambda: checkpoints.size_fault(path))
    if fault is None:
        names = sorted(parallel.from_rank_zero(lambda: checkpoints.read_manifest(path)["files"]))
        faults = parallel.map_over_ranks(lambda share: checkpoints.content_faults(path, share), names)
        fault = next(filter(None, faults), None)
    if fault is not None:
        raise parallel.from_rank_zero(lambda: error(path, fault))


@watchdog.phase("checkpoint")
def save(run: RunFolder, step: int, learner: Learner, state: dict[str, Any]) -> None:
    """Save a checkpoint of `step`. Collective. `state` has plain JSON values. Everything of this step is recorded
    already.

    On a GPU the checkpoint is complete only after a later `learner.poll_save`.
    """
    # One at a time, in order: the newest complete checkpoint is always the last one begun, or the one before it.
    learner.poll_save(wait=True)
    temporary = parallel.from_rank_zero(lambda: run.begin_checkpoint(step))
    about = {
        "layout": {"world": parallel.world_size(), **run.layout},
        "ledger": state["ledger"],
        "versions": {name: version(name) for name in ("megatron-core", "torch")},
    }
    text = state_text(state)  # now: the checkpoint may be committed some steps later

    def commit() -> None:
        (temporary / STATE).write_text(text)
        run.commit_checkpoint(temporary, step, about)

    learner.save(temporary, done=lambda: parallel.from_rank_zero(commit))


def asked_to_stop() -> bool:
    """Return whether a rank got SIGTERM or SIGUSR1. Collective. Within a run `RankTimes.end_step` asks."""
    return any(parallel.gather(watchdog.asked_to_stop()))


def leave(run: RunFolder, step: int) -> NoReturn:
    """Raise ToBeContinued on every rank, after the checkpoint of `step`."""
    run.log(f"step {step} asked to stop: saved")
    raise ToBeContinued(
        f"to be continued: {run.path} was asked to stop and is saved at step {step}; the same command resumes there"
    )


@watchdog.phase("export")
def export(run: RunFolder, learner: Learner, template: ChatTemplate | None) -> None:
    """Write the final weights as a Hugging Face directory, with the chat template that the run was trained under.

    Collective.
    """
    learner.export(run.path / HF_FOLDER)
    if template is not None:
        source = template.source
        parallel.from_rank_zero(lambda: write_atomically(run.path / HF_FOLDER / CHAT_TEMPLATE, source))


def due(step: int, every: int, last: int) -> bool:
    """Return whether something done every `every` steps (0: never) is due. The last step always is."""
    return every > 0 and (step % every == 0 or step == last)


def record_ledger(run: RunFolder, ledger: Ledger) -> None:
    """Write the ledger entries that came since the last call."""
    run.record_ledger(ledger.entries)
    ledger.entries.clear()
