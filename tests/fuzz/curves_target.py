"""Curves in every form, and the folders of studies: through `pctrain fit` and `pctrain report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from pctrain.cli import main as cli
from tests.fuzz.case import Case
from tests.fuzz.mutate import ODD_VALUES, edited_bytes, edited_trees, json_files, json_text

NAME = "curves"
CELLS = [
    "",
    "0",
    "-0",
    "1",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e400",
    "1e-320",
    "5e-324",
    "100",
    "100.0000001",
    "101",
    "1_0",
    "٣",
    "0x1",
    "1,5",
    '"1',
    '"',
    "a",
    " 7 ",
    "9" * 400,
    "x" * 200,
    "\0",
    "\r",
    "\u2028",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "=1+1",
    "1e5",
]
NUMBERS = [
    0,
    -1,
    1e308,
    1e-308,
    5e-324,
    1e300,
    float("nan"),
    float("inf"),
    50,
    50.0,
    100,
    100.1,
    2**63,
    True,
    None,
    "1",
    [],
    {},
]


@st.composite
def points(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """EFLOPs from the joint and scores: of many sizes and shapes, most of them curves that can be fitted."""
    n = draw(st.sampled_from([1, 2, 3, 5, 11, 12, 13, 20, 26, 60]))
    scale = draw(st.sampled_from([1e-300, 1e-9, 1.0, 1.0, 1.0, 1e9, 1e300]))
    x = [scale * (i + 1) for i in range(n)]
    if draw(st.integers(0, 4)) == 0:
        x = draw(
            st.sampled_from(
                [
                    lambda x: [scale * 10.0**i for i in range(n)],
                    lambda x: [scale * (1 + i * 1e-15) for i in range(n)],
                    lambda x: [scale, *[scale * (1e3 + i) for i in range(1, n)]],
                ]
            )
        )(x)
    shape = draw(
        st.sampled_from(["rise", "rise", "flat", "fall", "collapse", "zero", "full", "jump", "noise", "far", "any"])
    )
    scores = {
        "rise": [40 + 30 * i / (i + n / 3) for i in range(n)],
        "flat": [50.0] * n,
        "fall": [60 - 40 * i / n for i in range(n)],
        "collapse": [40 + 20 * i / n if i < n * 2 / 3 else 0.5 for i in range(n)],
        "zero": [0.0] * n,
        "full": [100.0] * n,
        "jump": [20.0 if i < n / 2 else 80.0 for i in range(n)],
        "noise": [50 + 49 * (-1) ** i for i in range(n)],
        "far": [99.99 if i == n // 2 else 0.01 for i in range(n)],
    }.get(shape)
    return x, scores if scores is not None else draw(st.lists(st.floats(0, 100), min_size=n, max_size=n))


@st.composite
def csv_files(draw: st.DrawFn) -> bytes:
    rows = []
    header = draw(
        st.sampled_from(
            [
                ["eflops", "score"],
                ["eflops", "score"],
                ["curve", "eflops", "score", "score_se"],
                ["score", "eflops", "score_se"],
                ["Eflops ", "SCORE"],
                ["a", "b"],
                [],
            ]
        )
    )
    for name in draw(st.sampled_from([["a"], ["a"], ["a", "b"], ["", "[bold]"], ["a" * 300]])):
        x, y = draw(points())
        start = draw(st.sampled_from([y[0], y[0], 0.0, 100.0]))
        for eflops, score in [(0, start), *zip(x, y, strict=True)]:
            cells = {
                "eflops": repr(eflops),
                "score": repr(score),
                "curve": name,
                "score_se": draw(st.sampled_from(["", "1.0", "1e-300", "1e300"])) if len(rows) < 2 else "",
            }
            rows.append([cells.get(key.strip().lower(), "1") for key in header])
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        row = draw(st.integers(0, len(rows) - 1))
        edit = draw(st.integers(0, 3))
        if edit == 0:
            rows.insert(row, rows[row])
        elif edit == 1:
            rows[row] = rows[row][: draw(st.integers(0, 3))]
        elif rows[row]:
            rows[row][draw(st.integers(0, len(rows[row]) - 1))] = draw(st.sampled_from(CELLS))
    data = "\n".join(",".join(row) for row in [header, *rows]).encode("utf-8", "replace")
    data = draw(
        st.sampled_from(
            [data] * 6
            + [
                data.decode().encode("utf-16"),
                data.replace(b"\n", b"\r\n"),
                data.replace(b"\n", b"\r"),
                data.replace(b",", b";"),
            ]
        )
    )
    return draw(edited_bytes(data)) if draw(st.integers(0, 4)) == 0 else data


@st.composite
def plain_files(draw: st.DrawFn) -> bytes:
    curves = []
    for name in draw(st.sampled_from([["a"], ["a"], ["a", "a"], [""], ["[bold]", "\ud800"], ["a" * 300]])):
        x, y = draw(points())
        curve: dict[str, Any] = {"name": name, "p_sft": y[0], "eflops": x, "scores": y}
        for key in draw(st.lists(st.sampled_from(["p_sft_se", "score_se", "max_score"]), max_size=3, unique=True)):
            curve[key] = draw(st.sampled_from([1.0, 100, 0, 1e-300, 1e300, *NUMBERS]))
        curves.append(curve)
    return draw(json_files({"curves": curves}, values=[*NUMBERS, *ODD_VALUES]))


@st.composite
def exchange_files(draw: st.DrawFn) -> bytes:
    datasets = {}
    for name in draw(st.sampled_from([["easy"], ["easy"], ["easy", "hard"], ["\ud800"], ["<script>", "../x"]])):
        x, y = draw(points())
        steps = draw(st.sampled_from([[0, 100], [100], [0], [100, 200]]))
        data: dict[str, Any] = {
            "sft": [{"eflops": step / 100, "scores": {"gsm": 40.0, "math": 20.5}} for step in steps],
            "rl": {str(steps[-1]): [{"eflops": a, "scores": {"gsm": b, "math": b}} for a, b in zip(x, y, strict=True)]},
        }
        about = {"checkpoint_steps": steps, "batch_size": 128, "mean_seq_len": 1000.0}
        data |= {key: value for key, value in about.items() if draw(st.integers(0, 2))}
        if draw(st.booleans()):
            for i, entry in enumerate(data["sft"]):
                entry["val_loss"] = 1.0 - i / 10
        datasets[name] = data
    tree = {"meta": {"benchmarks": {"gsm": 1319, "math": 500}}, "datasets": datasets}
    if draw(st.booleans()):
        tree["meta"]["model"] = {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1000,
            "tie_word_embeddings": True,
        }
    if draw(st.integers(0, 3)) == 0:
        tree["meta"]["max_score"] = draw(st.sampled_from([100, 90.5, *NUMBERS]))
    return draw(json_files(tree, values=[*NUMBERS, *ODD_VALUES]))


RUNS = ["sft", "rl-step-60", "rl-step-150", "rl-step-270"]


@st.composite
def study_files(draw: st.DrawFn) -> dict[str, bytes | None]:
    """Files of the made study, changed: lines of metrics and ledgers, what RL started from, configs."""
    run = draw(st.sampled_from(RUNS))
    names = ["metrics.jsonl", "metrics.jsonl", "ledger.jsonl", "config.yaml", "summary.json"] + (
        ["start.json", "rollouts/step-10.jsonl"] if run != "sft" else []
    )
    name = draw(st.sampled_from(names))
    if draw(st.integers(0, 29)) == 0:
        return {f"{run}/{name}": None}
    if name == "config.yaml":
        text = (
            b"kind: " + (b"sft" if run == "sft" else b"rl") + b"\nrun: {seed: 3}\nceiling: {delta: 0.02, delta2: 0.1}\n"
        )
        text += b"rl: {algorithm: grpo}\nfingerprints: {}\n"
        if draw(st.booleans()):
            key = draw(st.sampled_from([b"0.02", b"0.1", b"3", b"grpo", b"{seed: 3}", b"sft", b"rl", b"{}"]))
            text = text.replace(
                key,
                draw(
                    st.sampled_from(
                        [
                            b"nan",
                            b".nan",
                            b"-1",
                            b"1e400",
                            b"x",
                            b"[]",
                            b"{a: [b]}",
                            b"''",
                            b"&a [*a]",
                            b"!!timestamp x",
                            b'"\\ud800"',
                            b"9" * 5000,
                            b"[" * 2000,
                            b"null",
                            b"!!python/name:os.system",
                            b"2020-01-01",
                            b"!!int x",
                            b"{data: {train: 3}}",
                            b"{train: [{path: 3}]}",
                            b"true",
                        ]
                    )
                ),
            )
        if draw(st.booleans()):
            text += draw(
                st.sampled_from(
                    [
                        b"data: {train: 3}",
                        b"data: {train: [3]}",
                        b"data: {train: [{path: x}]}",
                        b"data: {train: [{}]}",
                        b"data: 3",
                        b"data: {train: {path: x}}",
                        b'data: {train: [{path: "a\\0b"}]}',
                    ]
                )
            )
        return {f"{run}/{name}": draw(edited_bytes(text))}
    if name in ("start.json", "summary.json"):
        tree = (
            {"start_step": 60, "role": "early", "sft_run": "../sft", "eflops_sft": 1.2e-7}
            if name == "start.json"
            else {"summary": {"trajectories": 100, "steps": 3}, "next_command": "x"}
        )
        return {f"{run}/{name}": draw(json_files(tree))}
    rows = _rows(run, name)
    ends = draw(
        st.sampled_from([slice(None), slice(None), slice(0, 3), slice(-3, None), slice(0, 0), slice(None, None, -1)])
    )
    rows = rows[ends]
    lines = [json_text(row) for row in rows]
    for _ in range(draw(st.sampled_from([1, 1, 2, 0]))):
        if lines:
            at = draw(st.integers(0, len(lines) - 1))
            lines[at] = draw(
                st.sampled_from(
                    [lines[at], json_text(draw(edited_trees(rows[at % len(rows)], values=[*NUMBERS, *ODD_VALUES])))]
                )
            )
    data = b"\n".join(lines) + draw(st.sampled_from([b"\n", b"\n", b"", b"\n\n", b"\n{"]))
    return {f"{run}/{name}": draw(edited_bytes(data)) if draw(st.integers(0, 3)) == 0 else data}


def _rows(run: str, name: str) -> list[dict[str, Any]]:
    """Lines as pctrain writes them; few, for most of the time goes into fits."""
    if name == "ledger.jsonl":
        return [
            {
                "step": 1,
                "phase": "rl_update" if run != "sft" else "sft_update",
                "sequences": 32,
                "tokens": 800,
                "mean_length": 25.0,
                "paper_flops": 2e10,
                "exact_flops": 3e10,
                "seconds": 0.5,
                "device_seconds": 1.0,
            }
        ]
    if name.startswith("rollouts"):
        return [
            {
                "prompt": "1+1=",
                "response": "2",
                "answer": "2",
                "reward": 1.0,
                "cause": "right",
                "finish": "stop",
                "kept": True,
                "why": "",
            }
        ] * 2
    own = (
        {"loss": 1.0}
        if run == "sft"
        else {
            "reward": 0.5,
            "kept_prompts": 32,
            "dropped_prompts": 10,
            "carried_prompts": 6,
            "rounds": 2,
            "truncated_share": 0.01,
        }
    )
    rows: list[dict[str, Any]] = []
    for step in range(0, 14, 2):
        axes = {"eflops_sft": (step if run == "sft" else 60) * 2e-9, "eflops_rl": 0.0 if run == "sft" else step * 4e-9}
        rows.append(
            {
                "step": step,
                "kind": "eval",
                **axes,
                "score": 20.0 + step,
                "score_se": 2.0,
                "problems": 512,
                "truncated_share": 0.0,
                "no_box_share": 0.0,
            }
        )
        rows.append(
            {"step": step, "kind": "train", **axes, **own}
            if run != "sft"
            else {
                "step": step,
                "kind": "val",
                **axes,
                "val_loss": 1 / (step + 1),
                "val_loss_se": 0.01,
                "val_tokens": 500,
            }
        )
    return rows


OPTIONS = [
    "--reach=50",
    "--reach=100",
    "--reach=0",
    "--reach=1e308",
    "--budget=1e308",
    "--budget=0",
    "--budget=1e-300",
    "--points=0.5",
    "--points=1e-9",
    "--method=paper",
    "--method=paper",
    "--tau=1e-300",
    "--alpha=0.5",
    "--eps=1e300",
    "--out=folder/out.json",
]


@st.composite
def file_cases(draw: st.DrawFn) -> Case:
    form, files = draw(st.sampled_from([("csv", csv_files()), ("json", plain_files()), ("json", exchange_files())]))
    name = draw(st.sampled_from([f"curves.{form}"] * 9 + ["curves.txt", "curves.json", "curves.csv"]))
    content = draw(files)
    if draw(st.integers(0, 49)) == 0:
        content = draw(
            st.sampled_from(
                [b"", b"\x80\x04\x95.", b"null", b"[]", b"{}", b"3", b'{"curves": {}}', b"\n\n", b"eflops,score\n"]
            )
        )
    report = draw(st.integers(0, 9)) == 0  # drawing takes ten times as long as fitting
    options = (
        ["--out=out"]
        if report
        else [
            "--out=out.json",
            *draw(st.lists(st.sampled_from(OPTIONS), max_size=3, unique_by=lambda text: text.split("=")[0])),
        ]
    )
    return Case("report" if report else "fit", {name: content, "folder": None}, (name, *options))


@st.composite
def study_cases(draw: st.DrawFn) -> Case:
    files: dict[str, bytes | None] = {}
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        files |= draw(study_files())
    source = draw(st.sampled_from([".", ".", *RUNS]))
    kind = draw(st.sampled_from(["fit"] * 4 + ["ledger"] * 6 + ["report"]))
    options = {"fit": ["--out=out.json"], "ledger": ["--ledger"], "report": ["--out=out"]}[kind]
    return Case("report" if kind == "ledger" else kind, files, (source, *options), "study")


CASES = st.one_of(file_cases(), file_cases(), study_cases())


def prepare(folder: Path) -> Mapping[str, Path]:
    import pctrain.report.command  # noqa: F401
    from tests.helpers import study_folders

    base = study_folders.make_study(folder / "study")
    for run in base.glob("rl-*"):  # fewer points: most of the time goes into fits
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:20]))
    return {"study": base}


def run(case: Case, folder: Path) -> None:
    cli.run_command([case.action, *case.arguments])
    if case.action == "fit":
        out = next(path for path in (folder / "out.json", folder / "folder" / "out.json") if path.exists())
        _check_fits(json.loads(out.read_text(), parse_constant=_no_constant))


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in the fits, which is no JSON")


def _check_fits(rows: list[dict[str, Any]]) -> None:
    """Whatever the curve: a ceiling within what there can be, and an interval around it."""
    for row in rows:
        assert 0 <= row["a_post"] <= 100.0001, row
        low, high = row["a_post_low"], row["a_post_high"]
        assert low is None or (low <= row["a_post"] + 1e-9 and row["a_post"] <= high + 1e-9), row
