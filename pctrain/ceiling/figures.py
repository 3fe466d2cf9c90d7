"""The report's four figures as PNG, drawn with matplotlib from a `Study`; no pyplot, no display, the same bytes for the same numbers.

Colours are Okabe and Ito's (safe for the common kinds of colour blindness); a start keeps its colour in every figure, and marker
shape and a written label repeat what colour says.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pctrain.ceiling.ledger import PHASES as LEDGER_PHASES
from pctrain.ceiling.study_data import RLRun, SFTRun, Study

INK, MUTED, GRID, SFT_COLOUR = "#1f2328", "#656d76", "#e4e7eb", "#3d444d"
REGIME_COLOURS = {"adaptive": "#56b4e9", "stable": "#009e73", "mild": "#f0c419", "severe": "#d55e00", "transient": "#8c959f"}
ROLE_COLOURS = {"early": "#0072b2", "stable": "#009e73", "overfit": "#d55e00"}
OTHER_COLOURS = ["#cc79a7", "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#7b5ea7", "#8c6d3f"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
PHASES = {"sft_update": "SFT updates", "rollout": "Rollouts", "rollout_rejected": "Rollouts rejected", "logprob": "Log-prob passes",
          "rl_update": "RL updates", "validation": "Validation", "evaluation": "Evaluation"}
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#9aa1a9",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "figure.facecolor": "white", "axes.facecolor": "white",
    "axes.titlelocation": "left", "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlepad": 12, "legend.frameon": False,
    "hatch.linewidth": 0.7, "savefig.dpi": 200,
}


def draw_all(study: Study) -> dict[str, bytes]:
    """`{file name: PNG}` of every figure the study has data for."""
    drawn = {"validation_loss.png": validation_loss, "score_vs_compute.png": score_vs_compute, "ceilings.png": ceilings,
             "compute.png": compute}
    with matplotlib.rc_context(STYLE):
        figures = {name: draw(study) for name, draw in drawn.items()}
        return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def flop_scale(eflops: float) -> tuple[float, str]:
    """(factor, unit) so that `eflops * factor` reads as 1 to 999 of `unit`."""
    for power, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if eflops >= 10.0 ** (power - 18):
            return 10.0 ** (18 - power), prefix + "FLOPs"
    return 1e18, "FLOPs"


def flops_text(eflops: float) -> str:
    factor, unit = flop_scale(eflops)
    return f"{eflops * factor:.3g} {unit}"


def run_colours(runs: Sequence[RLRun]) -> list[str]:
    """One colour a run: its role's, and for runs without a role the next that no role has taken."""
    free = iter(colour for colour in OTHER_COLOURS * (len(runs) + 1) if colour not in {ROLE_COLOURS.get(run.role) for run in runs})
    return [ROLE_COLOURS[run.role] if run.role in ROLE_COLOURS else next(free) for run in runs]


def first_sft(study: Study) -> SFTRun | None:
    return study.sft[0] if study.sft else None


def validation_loss(study: Study) -> Figure | None:
    """Validation loss against SFT compute, regimes shaded, RL starts marked."""
    sft = first_sft(study)
    if sft is None or not sft.losses:
        return None
    factor, unit = flop_scale(sft.losses[-1].eflops_sft)
    x = [p.eflops_sft * factor for p in sft.losses]
    loss = [p.val_loss for p in sft.losses]
    figure, axes = _axes("Validation loss along SFT", f"SFT compute ({unit})", "Validation loss (nats per token)")
    low, high = _loss_axis(axes, loss)
    span = max(x[-1] - x[0], 1e-30)
    seen: dict[str, float] = {}
    for band in sft.bands():
        left, right = band["from"] * factor, band["to"] * factor
        patch = axes.axvspan(left, right, color=REGIME_COLOURS[band["regime"]], alpha=0.20, lw=0)
        patch.set_gid(f"regime-{band['regime']}")
        if (right - left) / span > 0.012 * len(band["regime"]) + 0.02:
            axes.text((left + right) / 2, 0.975, band["regime"], transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9)
        seen[band["regime"]] = seen.get(band["regime"], 0.0) + right - left
    for share, side in ((sft.delta, "top"), (sft.delta2, "bottom")):
        axes.axhline(sft.best.val_loss * (1 + share), color=MUTED, lw=0.8, ls=(0, (2, 3)))
        axes.annotate(f"min + {100 * share:g} %", (1, sft.best.val_loss * (1 + share)), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va=side, fontsize=7.5, color=MUTED)
    axes.plot(x, loss, color=SFT_COLOUR, lw=1.8, zorder=3)
    axes.plot(x, loss, "o", color=SFT_COLOUR, ms=3 if len(x) < 60 else 0, zorder=3)
    ring = {"ls": "", "marker": "o", "mfc": "none", "mec": SFT_COLOUR, "mew": 1.3}  # an RL start at the minimum shows inside it
    axes.plot(sft.best.eflops_sft * factor, sft.best.val_loss, ms=15, zorder=5, **ring)
    axes.set_xlim(x[0], x[-1] if len(x) > 1 else x[0] + 1)
    axes.set_ylim(low, high)
    _mark_starts(axes, study, sft, factor)
    order = [name for name in REGIME_COLOURS if name in seen]
    handles = [Patch(color=REGIME_COLOURS[name], alpha=0.3, lw=0, label=name) for name in order]
    handles.append(Line2D([], [], ms=9, label=f"minimum, step {sft.best.step}", **ring))
    _legend_below(figure, handles, columns=6)
    return figure


def _loss_axis(axes: Axes, loss: Sequence[float]) -> tuple[float, float]:
    """Logarithmic where the start would press the rise of overfitting flat; returns the limits, with room for labels above."""
    low, high = min(loss), max(loss)
    if low > 0 and high / low > 4:
        axes.set_yscale("log")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50) if low * 0.9 <= t <= high * 1.1]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(axes.get_ylabel() + ", log scale")
        return low * (low / high) ** 0.08, high * (high / low) ** 0.14
    room = max(high - low, 0.02 * high, 1e-9)
    return low - 0.08 * room, high + 0.14 * room


def _mark_starts(axes: Axes, study: Study, sft: SFTRun, factor: float) -> None:
    """A marker and a label at every RL start; labels of close neighbours stand one above the other. Needs the final limits."""
    span = axes.get_xlim()[1] - axes.get_xlim()[0]
    previous, level = float("-inf"), 0
    for run, colour, marker in zip(study.rl, run_colours(study.rl), _markers(study.rl)):
        near = min(sft.losses, key=lambda p: abs(p.eflops_sft - run.eflops_sft))
        at = run.eflops_sft * factor
        level = level + 1 if at - previous < 0.2 * span else 0
        previous = at
        late = at > axes.get_xlim()[0] + 0.8 * span
        high = axes.transAxes.inverted().transform(axes.transData.transform((at, near.val_loss)))[1] > 0.75
        axes.plot(at, near.val_loss, marker=marker, ms=8, color=colour, mec="white", mew=1.2, zorder=6, clip_on=False)
        halo = withStroke(linewidth=2.5, foreground="white", alpha=0.75)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.9, "shrinkB": 6, "shrinkA": 1, "relpos": (float(late), float(high))}
        axes.annotate(f"RL from\n{run.label}", (at, near.val_loss), xytext=(-8 if late else 4, -26 if high else 28 + 26 * level),
                      textcoords="offset points", ha="right" if late else "left", va="top" if high else "bottom", fontsize=8.5,
                      fontweight="bold", color=colour, path_effects=[halo], zorder=7, arrowprops=line)


def score_vs_compute(study: Study) -> Figure | None:
    """Score against total training compute: RL runs with their fits, pure SFT beside them."""
    runs = [run for run in study.rl if run.points]
    sft = first_sft(study)
    scores = sft.scores if sft else []
    if not runs and not scores:
        return None
    most = max([p.eflops_sft for p in scores] + [run.eflops_total for run in runs])
    factor, unit = flop_scale(most)
    figure, axes = _axes("Score against total training compute", f"Training compute, SFT + RL ({unit})", "Score (% of test problems)")
    ends: list[tuple[float, float, str, str]] = []
    if scores:
        x, y = [p.eflops_sft * factor for p in scores], [p.score for p in scores]
        axes.errorbar(x, y, yerr=[p.score_se for p in scores], color=SFT_COLOUR, ecolor="#b9c0c8", elinewidth=1, lw=1.6, marker="o", ms=3.5,
                      zorder=3)
        ends.append((x[-1], y[-1], "pure SFT", SFT_COLOUR))
    for run, colour, marker in zip(runs, run_colours(runs), _markers(runs)):
        joint = run.eflops_sft * factor
        x, y = [joint + p.eflops_rl * factor for p in run.points], [p.score for p in run.points]
        curve = run.curve()
        if curve:
            fitted = [joint + value * factor for value in curve["eflops_rl"]]
            axes.fill_between(fitted, curve["low"], curve["high"], color=colour, alpha=0.14, lw=0, zorder=2)
            axes.plot(fitted, curve["median"], color=colour, lw=2, ls="-" if run.fit.verdict == "identified" else (0, (4, 2)), zorder=6)
        else:
            axes.plot(x, y, color=colour, lw=1, alpha=0.6, zorder=4)
        axes.errorbar(x, y, yerr=[p.score_se for p in run.points], color=colour, ls="", marker=marker, ms=5.5 if len(x) <= 12 else 4,
                      mec="white", mew=0.6, elinewidth=0.8, alpha=0.75 if len(x) <= 30 else 0.35, zorder=5)
        if run.sft_equal.value is not None:
            axes.plot([x[-1]] * 2, [y[-1], run.sft_equal.value], color=colour, lw=0.9, ls=(0, (1, 2)), zorder=3)
            axes.plot(x[-1], run.sft_equal.value, marker="D", ms=6.5, mfc="white", mec=colour, mew=1.5, zorder=7)
        ends.append((x[-1], curve["median"][-1] if curve else y[-1], f"RL from {run.label}", colour))
    axes.set_xlim(0, most * factor * 1.02)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(0, bottom), min(100, top) if top < 100 else 100)
    _label_ends(axes, ends)
    keys = []
    if any(run.fit for run in runs):
        keys = [Line2D([], [], color=MUTED, lw=1.8, label="fit, ceiling identified"),
                Line2D([], [], color=MUTED, lw=1.8, ls=(0, (4, 2)), label="fit, ceiling not identified"),
                Patch(color=MUTED, alpha=0.25, lw=0, label="90 % interval of the curve")]
    if any(run.sft_equal.value is not None for run in runs):
        keys.append(Line2D([], [], ls="", marker="D", mfc="white", mec=MUTED, mew=1.5, label="pure SFT at equal total"))
    keys.append(Line2D([], [], ls="", marker="|", ms=11, mew=1.2, color=MUTED, label="± one standard error of a score"))
    _legend_below(figure, keys, columns=3)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Direct labels right of the axes, pushed apart, each joined to the end of its line."""
    bottom, top = axes.get_ylim()
    heights = _spread([y for _, y, _, _ in ends], 0.065 * (top - bottom), bottom, top)
    for (x, y, text, colour), height in zip(ends, heights):
        axes.annotate(text, (x, y), xycoords="data", xytext=(1.02, height), textcoords=("axes fraction", "data"), va="center", ha="left",
                      fontsize=9, color=colour, fontweight="bold", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.4, "shrinkA": 2, "shrinkB": 4})


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`values` moved as little as a forward and a backward pass need for `gap` between neighbours, kept in [low, high] where they fit."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = list(values)
    for previous, i in zip([None, *order], order):
        placed[i] = max(placed[i], low if previous is None else placed[previous] + gap)
    for following, i in zip([None, *order[::-1]], order[::-1]):
        placed[i] = min(placed[i], high if following is None else placed[following] - gap)
    return placed


def ceilings(study: Study) -> Figure | None:
    """P_sft + PL_rl per checkpoint (the paper's Figure 3), the 90 % interval as an error bar, the verdict beside each."""
    runs = [run for run in study.rl if run.p_sft.value is not None]
    if not runs:
        return None
    figure, axes = _axes("Score before RL, and what RL adds", "Score (% of test problems)", "", height=1.9 + 0.62 * len(runs))
    axes.grid(False)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_xlim(0, 100)
    for row, (run, colour) in enumerate(zip(runs, run_colours(runs))):
        base = run.p_sft.value
        axes.barh(row, base, height=0.56, color="#c3cad2")
        axes.text(base / 2 if base > 12 else 1, row, f"{base:.1f}", ha="center" if base > 12 else "left", va="center", fontsize=9)
        if shows_ceiling(run):
            solid = run.fit.verdict == "identified"
            top = max(run.fit.a_post, base)
            axes.barh(row, top - base, left=base, height=0.56, color=colour, alpha=0.85 if solid else 0.28, hatch=None if solid else "////",
                      edgecolor="white" if solid else colour, lw=0)
            if solid and top - base > 8:
                axes.text((base + top) / 2, row, f"{run.fit.pl_rl:+.1f}", ha="center", va="center", fontsize=9, color="white",
                          fontweight="bold")
            axes.plot([run.fit.a_post_low, run.fit.a_post_high], [row, row], color=INK, lw=1.3, zorder=5)
            axes.plot(run.fit.a_post_low, row, marker="|", ms=9, mew=1.3, color=INK, zorder=5)
            # An arrow where only the lower end means anything.
            end = {"marker": ">", "ms": 5} if run.fit.verdict == "lower_bound" else {"marker": "|", "ms": 9}
            axes.plot(run.fit.a_post_high, row, mew=1.3, color=INK, zorder=5, clip_on=False, **end)
        elif run.last and run.last.score > base:
            axes.barh(row, run.last.score - base, left=base, height=0.56, facecolor="none", edgecolor=colour, lw=1.2, ls=(0, (2, 2)))
        axes.text(1.02, row, ceiling_text(run), transform=axes.get_yaxis_transform(), va="center", ha="left", fontsize=9, linespacing=1.35)
    axes.set_yticks(range(len(runs)), [run.label.replace(" (", "\n(") for run in runs])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    _legend_below(figure, [Patch(color="#c3cad2", label="P_sft, before RL"), Patch(color=MUTED, label="PL_rl, ceiling identified"),
                           Patch(facecolor="#e3e6e9", edgecolor=MUTED, lw=0, hatch="////", label="PL_rl, not identified"),
                           Patch(facecolor="none", edgecolor=MUTED, ls=(0, (2, 2)), label="measured gain, no ceiling")])
    return figure


def shows_ceiling(run: RLRun) -> bool:
    """Whether the fit says anything about a ceiling; `flat` and `too_short` do not."""
    return run.fit is not None and run.fit.verdict in ("identified", "lower_bound", "collapsed")


def ceiling_text(run: RLRun) -> str:
    """Two short lines for the side of a bar."""
    if run.fit is None:
        return f"no fit\n{run.fit_reason}"
    fit = run.fit
    if fit.verdict == "identified":
        return f"identified\nA_post {fit.a_post:.1f} ({fit.a_post_low:.1f} to {fit.a_post_high:.1f})"
    if fit.verdict == "lower_bound":
        return f"lower bound only\nA_post at least {fit.a_post_low:.1f}"
    if fit.verdict == "collapsed":
        return f"collapsed\nbefore it {fit.a_post:.1f} ({fit.a_post_low:.1f} to {fit.a_post_high:.1f})"
    if fit.verdict == "flat":
        return "flat: no ceiling\nno rise to fit yet"
    return f"too short: no ceiling\n{fit.n_used} scores"


def compute(study: Study) -> Figure | None:
    """Where the compute went, by phase, in the paper's count and in the exact one."""
    ledger = study.ledger()
    phases = [phase for phase in PHASES if phase in ledger]
    if not phases:
        return None
    factor, unit = flop_scale(max(max(row["paper_flops"], row["exact_flops"]) for row in ledger.values()) / 1e18)
    figure, axes = _axes("Where the compute went", unit, "", height=1.6 + 0.56 * len(phases))
    axes.grid(False)
    axes.grid(axis="x", color=GRID, lw=0.8)
    largest = max(max(row["paper_flops"], row["exact_flops"]) for row in ledger.values()) / 1e18 * factor
    for row, phase in enumerate(phases):
        colour = "#9a6fb0" if LEDGER_PHASES[phase].axis is None else "#0072b2"
        for shift, key, alpha in ((-0.19, "paper_flops", 1.0), (0.19, "exact_flops", 0.45)):
            value = ledger[phase][key] / 1e18
            axes.barh(row + shift, value * factor, height=0.34, color=colour, alpha=alpha)
            axes.text(value * factor + 0.008 * largest, row + shift, flops_text(value), va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(phases)), [PHASES[phase] for phase in phases])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, largest * 1.16)
    axes.invert_yaxis()
    _legend_below(figure, [Patch(color="#0072b2", label="training, paper's formula"),
                           Patch(color="#0072b2", alpha=0.45, label="training, exact count"),
                           Patch(color="#9a6fb0", label="measuring (never in x)")])
    return figure


# -- shared looks ------------------------------------------------------------------------------------------------------------------

def _axes(title: str, xlabel: str, ylabel: str, height: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.07)
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.tick_params(length=3)
    return figure, axes


def _markers(runs: Sequence[RLRun]) -> list[str]:
    return [MARKERS[i % len(MARKERS)] for i in range(len(runs))]


def _legend_below(figure: Figure, handles: list, columns: int = 5) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, handlelength=1.6, columnspacing=1.6)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
