"""Where a run folder meets the core: opening together, going on from the newest checkpoint, saving a new one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pctrain.ceiling.ledger import Ledger
from pctrain.config import Config
from pctrain.core import Core, parallel
from pctrain.runfolder import Kind, RunFolder, checkpoint_step


def open_run(config: Config, kind: Kind, data_files: Iterable[Path]) -> RunFolder:
    """Collective: rank 0 checks and locks the folder; where it refuses, every rank raises.

    The run is bound to what is in its data files, in the model's config and tokenizer, and to the checkpoint it starts from.
    """
    model = config.model
    inputs = [*data_files, model.path / "config.json", model.path / "tokenizer.json"]
    if model.checkpoint is not None:
        inputs += [model.checkpoint / "manifest.json", model.checkpoint / "state.json"]
    return parallel.agree(lambda: RunFolder.open(config, kind, inputs, rank=parallel.rank()))


def finished(run: RunFolder) -> bool:
    """Collective. Says so where the run had ended before."""
    done = parallel.from_rank_zero(lambda: run.finished)
    if done:
        run.say_finished()
        run.close()
    return done


def resume(run: RunFolder, core: Core) -> tuple[int, dict]:
    """(step, state) of the newest checkpoint, loaded into `core`; (0, {}) where there is none. What lies beyond it is cut."""
    newest = parallel.from_rank_zero(run.latest_checkpoint)
    step = checkpoint_step(newest) if newest else 0
    parallel.agree(lambda: run.rewind(step if newest else None))
    if newest is None:
        return 0, {}
    core.load(newest)
    run.log(f"resumed from {newest.name}")
    return step, json.loads((newest / "state.json").read_text())


def save(run: RunFolder, step: int, core: Core, state: dict) -> Path:
    """Collective. `state`: plain JSON values. Everything of this step has been recorded before."""
    temporary = run.begin_checkpoint(step)
    parallel.barrier()
    core.save(temporary)
    if run.writes:
        (temporary / "state.json").write_text(json.dumps(state))
    parallel.barrier()
    path = parallel.from_rank_zero(lambda: run.commit_checkpoint(temporary, step))
    return path


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never) is due; the last step always is."""
    return every > 0 and (step % every == 0 or step == last)


def record_ledger(run: RunFolder, ledger: Ledger) -> None:
    """Writes the entries that came since the last call."""
    run.record_ledger(ledger.entries)
    ledger.entries.clear()
