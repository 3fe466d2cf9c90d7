"""The study: SFT, RL from several of its checkpoints, ceilings, report. Every stage is a run folder: it goes on wherever it was stopped."""

from __future__ import annotations

from pathlib import Path

from pctrain.ceiling import regimes, report
from pctrain.checkpoints import checkpoint_step, list_checkpoints
from pctrain.config import Config
from pctrain.core import parallel
from pctrain.errors import UserError
from pctrain.evaluate.scorer import Scorer
from pctrain.progress import make_console
from pctrain.resume import begin
from pctrain.rl import loop as rl
from pctrain.runfolder import read_values
from pctrain.sft import loop as sft


def main(config: Config) -> None:
    """`pctrain run`: writes run.dir/{data, model, sft, rl-step-N, report}."""
    with begin(config) as config, Scorer(config) as scorer:
        root = Path(config.run.dir)
        sft_stage = _stage(config, root / "sft")
        sft_stage.run.keep_last = None  # RL starts from any of its checkpoints
        sft.train(sft_stage, scorer)
        starts = parallel.from_rank_zero(lambda: choose_starts(config, root / "sft"))
        for role, step in starts.items():
            stage = _stage(config, root / f"rl-step-{step}")
            stage.model.checkpoint = root / "sft" / "checkpoints" / f"step-{step}"
            rl.train(stage, scorer, role)
        parallel.from_rank_zero(lambda: _report(root))


def _report(root: Path) -> None:
    report.main(root)
    console = make_console()
    console.print("Next:", style="bold")
    console.print(f"  pctrain fit {root} --out {root / 'report' / 'fits.json'}   # the ceilings as a table and as JSON", soft_wrap=True)


def _stage(config: Config, folder: Path) -> Config:
    stage = config.model_copy(deep=True)
    stage.run.dir = folder
    return stage


def choose_starts(config: Config, sft_run: Path) -> dict[str, int]:
    """{role: checkpoint step}, by the regimes of the validation loss (PAPER.md 2). A role whose regime did not occur is left out.

    Raises UserError where none occurred.
    """
    losses = read_values(sft_run, "val", "val_loss")
    checkpoints = [checkpoint_step(path) for path in list_checkpoints(sft_run)]
    found = regimes.starts(list(losses), list(losses.values()), checkpoints, config.ceiling.delta, config.ceiling.delta2)
    starts = {role: found[role] for role in config.study.starts if found[role] is not None}
    if not starts:
        raise UserError(f"{sft_run}: no checkpoint lies in a regime that study.starts names ({', '.join(config.study.starts)}); "
                        "raise sft.steps or lower sft.checkpoint_every")
    for role in set(config.study.starts) - set(starts):
        print(f"no checkpoint is a start of kind {role!r}: that regime did not occur")
    return starts
