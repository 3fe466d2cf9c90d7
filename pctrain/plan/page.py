"""The printed answer of `pctrain plan`: a table of layouts, the best one by part, warnings and assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pctrain.plan.activations import layer_spec
from pctrain.plan.gpus import GIB, Gpu
from pctrain.plan.host import HostMemory
from pctrain.plan.memory import CPU_RUNTIME, PARTS, cpu_holes, gib
from pctrain.plan.planner import Plan, Planner
from pctrain.plan.rollouts import BANDWIDTH, LAUNCH, SCHEDULING
from pctrain.plan.shapes import all_parameters
from pctrain.plan.traffic import CALL, LINK_SHARE
from pctrain.plan.work import KEPT

OTHER = ("optimizer", "swap", "logprob", "reference")
BUSY = 0.3  # a larger bubble gets a warning


def show(console: Console, planner: Planner, plans: Sequence[Plan], configured: Plan | str) -> None:
    """Print the plans, best first, with the config's own layout or why it does not run."""
    best, fitting = plans[0], [plan for plan in plans if plan.fits]
    _say(console, _title(planner), style="bold")
    rows = one_of_each(fitting or plans)[: planner.options.top]
    _layouts(console, rows, configured)
    if isinstance(configured, str):
        _say(console, f"The config's own layout does not run on {planner.options.gpus} GPUs: {configured}")
    if not fitting:
        _say(console, nothing_fits(best), style="bold red")
        for way in planner.ways_out(best):
            _say(console, f"  {way}")
    _memory(console, best)
    _traffic(console, best)
    for line in [*_rollouts(planner, best), *warnings(planner, best)]:
        _say(console, line)
    _say(console, "")
    _say(console, "Assumed:", style="bold")
    for line in assumptions(planner):
        _say(console, f"  {line}")


def one_of_each(plans: Sequence[Plan]) -> list[Plan]:
    """Return the best plan for each set of tensor, pipeline, context and expert parallel sizes."""
    best: dict[tuple[int, ...], Plan] = {}
    for plan in plans:
        par = plan.layout.parallel
        best.setdefault((par.tensor, par.pipeline, par.context, par.expert), plan)
    return list(best.values())


def _title(planner: Planner) -> str:
    options = planner.options
    work = planner.work
    hf = planner.hf
    gpu = planner.gpu
    return (
        f"{planner.kind} of {hf.architecture}, {_count(all_parameters(hf))} parameters, on {options.gpus} x "
        f"{gpu.name} ({gpu.memory / GIB:.1f} GiB each): a step of {work.sequences} sequences, {work.prompt} + "
        f"{work.response} tokens on average, packs of {work.token_budget}"
    )


def _layouts(console: Console, plans: Sequence[Plan], configured: Plan | str) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    sampling = ["rollout"] if plans[0].engine is not None else []
    words, numbers = (
        ("layout", "recompute", "fullest"),
        ("s/step", "compute", "bubble", "comm", *sampling, "other", "tok/s/GPU"),
    )
    for name in (*words[:2], "GiB", "of GPU", words[2], *numbers):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    for plan in plans:
        table.add_row(*_row(plan, plan.name))
    if isinstance(configured, Plan):
        table.add_section()
        table.add_row(*_row(configured, f"{configured.name} (as configured)"))
    console.print(table)


def _row(plan: Plan, name: str) -> list[str]:
    parts, speed = plan.speed.parts, plan.speed
    other = sum(parts.get(key, 0.0) for key in OTHER)
    share = f"{plan.share:.0%}" + ("" if plan.share <= 1 else " !")
    sampling = [_seconds(parts["rollout"])] if "rollout" in parts else []
    return [
        name,
        plan.layout.parallel.recompute,
        gib(plan.memory.peak.total),
        share,
        plan.memory.peak.phase,
        _seconds(speed.seconds),
        _seconds(parts["compute"]),
        f"{speed.bubble:.0%}",
        _seconds(parts["interconnect"]),
        *sampling,
        _seconds(other),
        f"{speed.tokens / speed.seconds / plan.layout.gpus:,.0f}",
    ]


def nothing_fits(best: Plan) -> str:
    """Return by how much the closest layout misses."""
    if best.share <= 1:
        return f"Nothing starts: {_too_small_a_cache(best)}. What would help, each by itself:"
    over = best.memory.peak.total - best.gpu.memory
    return (
        f"No layout fits: the smallest ({best.name}, recompute {best.layout.parallel.recompute}) is {gib(over)} GiB "
        f"over the {gib(best.gpu.memory)} GiB of a GPU, in the phase {best.memory.peak.phase!r}. What would help, each "
        "by itself:"
    )


def _too_small_a_cache(plan: Plan) -> str:
    engine = plan.engine
    if engine is None:
        return ""
    sequence = (
        "the longest prompt and response"
        if plan.config.rollout.max_prompt
        else "the whole context (less with rollout.max_prompt)"
    )
    return (
        f"the engine's KV cache of {gib(engine.cache)} GiB holds {engine.tokens} tokens, and vLLM wants room for one "
        f"sequence of {sequence}, {plan.context} tokens"
    )


def _memory(console: Console, plan: Plan) -> None:
    moments = list(plan.memory.phases.values())
    names = [name for name in PARTS if any(name in moment.parts for moment in moments)]
    _say(console, f"{plan.name}: GiB on the fullest GPU, by phase", style="bold")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part")
    for moment in moments:
        where = f" (stage {moment.stage + 1})" if plan.layout.parallel.pipeline > 1 else ""
        table.add_column(f"{moment.phase}{where}", justify="right")
    for name in names:
        table.add_row(name, *(gib(moment.parts[name]) if name in moment.parts else "-" for moment in moments))
    table.add_section()
    table.add_row("total", *(gib(moment.total) for moment in moments))
    console.print(table)
    if not plan.gpu.is_cpu:
        _say(console, _host(plan.memory.host))


def _host(host: HostMemory) -> str:
    """Return the line about the machines' own memory."""
    line = (
        f"Host memory: a save takes {gib(host.save_rank)} GiB on the first rank of each data parallel group, at most "
        f"{gib(host.save_node)} GiB on a node; a resume takes {gib(host.load_rank)} GiB on every rank, at most "
        f"{gib(host.load_node)} GiB on a node"
    )
    if host.reference_node:
        line += f"; the offloaded reference takes {gib(host.reference_node)} GiB on a node"
    return f"{line}."


def _traffic(console: Console, plan: Plan) -> None:
    if not plan.speed.traffic:
        return
    _say(console, f"{plan.name}: what a GPU sends in a step", style="bold")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("group", "ranks", "GB", "over", "seconds", "not hidden"):
        table.add_column(name, justify="left" if name in ("group", "over") else "right")
    for transfer in plan.speed.traffic:
        table.add_row(
            transfer.group,
            str(transfer.ranks),
            f"{transfer.sent / 1e9:,.2f}",
            transfer.wire,
            _seconds(transfer.seconds),
            _seconds(transfer.waited),
        )
    console.print(table)


def _rollouts(planner: Planner, plan: Plan) -> Iterator[str]:
    sampled = plan.speed.rollouts
    engine = plan.engine
    rollout = plan.config.rollout
    if sampled is None or engine is None:
        return
    longest = planner.work.prompt + rollout.max_response
    yield (
        f"Rollouts: {sampled.sequences} sequences in {sampled.rounds} round(s) on {sampled.engines} engine(s) of "
        f"{rollout.tensor} GPU(s), {sampled.at_once} decoded together; a KV cache of {gib(engine.cache)} GiB holds "
        f"{engine.tokens} tokens: {engine.sequences(longest)} sequences of the longest kind ({longest} tokens)."
    )


def warnings(planner: Planner, plan: Plan) -> Iterator[str]:
    """Yield what a user should know before the run starts."""
    par, rollout = plan.layout.parallel, plan.config.rollout
    if not plan.starts and plan.share <= 1:
        yield (
            f"warning: {_too_small_a_cache(plan)}; raise rollout.gpu_memory (rollout.kv_cache_mb on a CPU), or "
            "rollout.tensor"
        )
    sampled, engine = plan.speed.rollouts, plan.engine
    if sampled is not None and engine is not None and plan.starts:
        wanted = min(rollout.max_sequences, -(-sampled.sequences // sampled.rounds // sampled.engines))
        room = engine.sequences(planner.work.prompt + rollout.max_response)
        if room < wanted:
            yield (
                f"warning: rollouts will not all fit: {wanted} sequences are decoded together, but the KV cache holds "
                f"{room} of the longest; the others are preempted and recomputed. Raise rollout.gpu_memory or "
                f"rollout.tensor, or set rollout.max_sequences to {max(1, room)}"
            )
    if plan.speed.bubble > BUSY:
        yield (
            f"warning: the pipeline's stages wait {plan.speed.bubble:.0%} of the time: {plan.speed.micro_batches} "
            f"micro-batch(es) of {planner.work.token_budget} tokens for {par.pipeline} stages; use smaller packs, a "
            "larger batch, or fewer stages"
        )
    if plan.config.model.dtype == "float32" and not plan.gpu.is_cpu:
        yield "warning: model.dtype = float32 reaches a fraction of a GPU's speed; set it to bfloat16"


def assumptions(planner: Planner) -> Iterator[str]:
    """Yield the assumptions behind the numbers."""
    options = planner.options
    gpu = planner.gpu
    work = planner.work
    yield _rates(gpu, planner)
    yield (
        f"a GPU reaches {options.mfu:.0%} of that while it computes (--mfu), an interconnect {LINK_SHARE:.0%} of its "
        f"rate plus {CALL * 1e6:.0f} us per call; FLOPs are exact (recomputation included), with every sequence at the "
        "mean length; packs are full"
    )
    if gpu.is_cpu:
        holes = f"{cpu_holes(options.gpus):.0%} for what glibc keeps of freed tensors"
        reserve = f"{CPU_RUNTIME / 1e6:g} MB that torch maps at its first steps, {holes}"
    else:
        reserve = f"{options.reserve:g} GiB for CUDA, NCCL and fragmentation (--reserve)"
    spec = layer_spec(planner.config.model, gpu)
    yield f"memory: a micro-batch of full length; layer spec {spec} (model.spec); {reserve}"
    yield (
        "communication is not hidden, except gradients behind the backward pass, context parallelism behind "
        "attention, and virtual stages"
    )
    if planner.kind == "rl":
        rl, longest = planner.config.rl, planner.config.rollout.max_response
        rounds = (
            f" of {rl.round_prompts} prompts, of which {KEPT:.0%} are kept" if rl.algorithm.dynamic_sampling else ""
        )
        overhead = f"{LAUNCH * 1e6:.0f} us per layer and {SCHEDULING * 1e3:.0f} ms per token"
        yield (
            f"rollouts: decoding at {BANDWIDTH:.0%} of the memory's bandwidth, plus {overhead}; "
            f"{work.rounds} round(s){rounds}; responses of {work.response} tokens (--response), the longest {longest}"
        )
    yield f"prompts of {work.prompt} tokens (--prompt); validation, scoring, checkpoints and verdicts are not counted"


def _count(parameters: int) -> str:
    """Return a number of parameters such as 7.62B or 0.681M."""
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def _rates(gpu: Gpu, planner: Planner) -> str:
    dtype = planner.config.model.dtype
    return (
        f"{gpu.name}: {gpu.flops(dtype) / 1e12:.3g} TFLOP/s in {dtype}, memory {gpu.bandwidth / 1e12:.3g} TB/s, within "
        f"a node {gpu.link / 1e9:.3g} GB/s, between nodes {gpu.network / 1e9:.3g} GB/s; "
        f"{planner.options.gpus_per_node} GPUs per node (--gpus-per-node). {gpu.source}"
    )


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.2g}"


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
