"""`pctrain show`, `fit` and `report`: the commands that read finished or running work. They take no config."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.cli.command import Call, Command, Operands
from pctrain.common.environment import set_environment
from pctrain.common.errors import UserError
from pctrain.config.tree import Section
from pctrain.report.fit_options import FitOptions


class ShowOptions(Section):
    """Options of `pctrain show`."""

    step: int | None = Field(None, ge=1, description="RL step; default: the newest")
    prompts: int = Field(5, ge=1, description="number of prompts to show")
    dropped: bool = Field(False, description="also show the prompts that dynamic sampling dropped, and why")


class ReportOptions(Section):
    """Options of `pctrain report`."""

    out: Path | None = Field(
        None, description="folder for the report; default: SOURCE/report, or NAME-report for a file"
    )
    ledger: bool = Field(
        False, description="only print where the compute went: tokens, FLOPs and seconds by run and phase"
    )
    watch: bool = Field(
        False, description="serve the report on this machine and refresh it while the run is training; writes nothing"
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="port of --watch; default: any free one, which is printed"
    )


_CURVES = (
    "scores against RL compute in EFLOPs (1e18 FLOPs), counted from the switch point, in one of these forms:\n"
    "      folder     an RL run of pctrain, or a study with several\n"
    "      CSV        header eflops,score[,curve][,score_se]; the row at 0 EFLOPs is the score at the switch point, "
    "P_sft\n"
    '      JSON       {"curves": [{"name": "a", "p_sft": 68.6, "eflops": [3.5, 6.4], "scores": [69.9, 70.1]}]}; a '
    "curve can\n"
    "                 also have p_sft_se and score_se (standard errors, points) and max_score (percent)\n"
    "      JSON       the exchange format of the published curves (meta, datasets): pctrain/report/curves.py"
)
_VERDICTS = (
    "Scores are percentages. Verdicts: identified; lower_bound (only the lower end of the interval is meaningful); "
    "flat (no gain yet, so this is not a ceiling); too_short (fewer than 12 points); collapsed (fitted to the points "
    "before the collapse). What each verdict can and cannot say: docs/ceilings.md"
)


def _show(call: Call[ShowOptions]) -> None:
    from pctrain.tools.show import main

    main(Path(call.operands[0]), call.options.step, call.options.prompts, call.options.dropped)


def _fit(call: Call[FitOptions]) -> None:
    set_environment()
    from pctrain.report.fit_command import main

    main(Path(call.operands[0]), call.options)


def _report(call: Call[ReportOptions]) -> None:
    options, source = call.options, Path(call.operands[0])
    if options.port is not None and not options.watch:
        raise UserError("pctrain report: --port is the port of --watch; add --watch")
    chosen = [name for name in ("out", "ledger", "watch") if getattr(options, name)]
    if len(chosen) > 1:
        raise UserError(f"pctrain report: --{chosen[0]} and --{chosen[1]} exclude each other; give one of them")
    if options.ledger:
        from pctrain.report.ledger_table import main as print_ledger

        print_ledger(source)
    elif options.watch:
        from pctrain.report.watch import main as serve

        serve(source, options.port or 0)
    else:
        from pctrain.report.command import main as write_report

        write_report(source, options.out)


COMMANDS = (
    Command(
        "show",
        "the rollouts of an RL step in the terminal: prompts, answers, rewards, advantages",
        "pctrain show RUN [--step N] [--prompts K] [--dropped]",
        _show,
        ("pctrain show runs/quickstart/rl-step-420", "pctrain show runs/rl --step 12 --prompts 20 --dropped"),
        ShowOptions,
        operands=Operands("RUN", "one folder of an RL run", 1, 1, {"RUN": "folder of an RL run"}),
    ),
    Command(
        "fit",
        "ceilings of score-against-compute curves, with intervals",
        "pctrain fit CURVES [--out FILE] [--reach SCORE] [--budget EFLOPS] [--points SHARE] [--method paper]",
        _fit,
        (
            "pctrain fit curves.json --out fits.json",
            "pctrain fit curves.csv --reach 75 --reach 80 --budget 500",
            "pctrain fit curves.json --points 0.71                    # fit the first 71%, compare with the rest",
            "pctrain fit curves.json --method paper --tau 2.5",
        ),
        FitOptions,
        operands=Operands("CURVES", "one file or folder of curves", 1, 1, {"CURVES": _CURVES}),
        notes=_VERDICTS,
    ),
    Command(
        "report",
        "a study, a run or a file of curves as one HTML page with charts; or where the compute went",
        "pctrain report SOURCE [--out DIR] [--ledger] [--watch [--port N]]",
        _report,
        (
            "pctrain report runs/quickstart",
            "pctrain report runs/quickstart --ledger",
            "pctrain report runs/rl --watch",
            "pctrain report curves.json --out curves-report",
        ),
        ReportOptions,
        operands=Operands(
            "SOURCE",
            "one folder or file of curves",
            1,
            1,
            {
                "SOURCE": "folder of a study (run.dir of `pctrain run`) or of one run, finished or not; or a JSON file "
                "of curves"
            },
        ),
        notes="The report is report.html (self-contained, opens offline), study.json, figures/*.png and figures/*.csv.",
    ),
)
