"""Files of records in every form, and chat templates: through check, the commands on sets, tokens and problems."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

from pctrain.cli import main as cli
from pctrain.common.errors import UserError
from pctrain.config.load import read
from pctrain.config.tree import ArchitectureConfig
from pctrain.data.build import TokenJob, build, folder_of
from pctrain.data.encode import Encoder
from pctrain.data.problems import read_problems
from pctrain.data.scratch_model import make_hf_dir
from pctrain.data.sources import list_files
from pctrain.data.store import TokenStore
from tests.fuzz.case import Case
from tests.fuzz.mutate import edited_bytes, edited_trees, json_files, json_text

NAME = "data"
PLAIN = {"id": "p1", "prompt": "1+2=", "response": "1+2=3 so \\boxed{3}", "answer": "3", "win_rate": 0.5}
RETU = {
    "data_source": "x",
    "prompt": [{"role": "user", "content": "q"}],
    "reward_model": {"ground_truth": "7", "style": "rule"},
    "extra_info": {"question": "What is 3+4?", "answer": "3+4=7 so \\boxed{7}", "index": 0},
}
CHAT = {
    "messages": [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "2*3?"},
        {"role": "assistant", "content": "\\boxed{6}"},
    ],
    "answer": 6,
    "win_rate": 1.0,
}
LONG_CHAT = {
    "messages": [
        {"role": role, "content": f"turn {i} of 12+30=42, then"} for i in range(3) for role in ("user", "assistant")
    ]
}
FORMS = ["jsonl", "jsonl", "jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "parquet", "arrow"]
# Columns of types that no record needs; a command on sets reads and writes all columns.
ODD_COLUMNS: list[Any] = [
    lambda n: pa.array([10**8] * n, pa.date32()),
    lambda n: pa.array([2**62] * n, pa.timestamp("us")),
    lambda n: pa.array([2**62 + 1] * n, pa.timestamp("ns")),
    lambda n: pa.array([-(2**62)] * n, pa.timestamp("s", "Europe/Berlin")),
    lambda n: pa.array([1] * n, pa.timestamp("s", "Nowhere/Never")),
    lambda n: pa.array([2**62] * n, pa.duration("s")),
    lambda n: pa.array([1] * n, pa.duration("ns")),
    lambda n: pa.array([10**12 + 1] * n, pa.time64("ns")),
    lambda n: pa.array([Decimal("1.5")] * n),
    lambda n: pa.array([date(2020, 1, 1)] * n),
    lambda n: pa.array([datetime(2020, 1, 1)] * n),
    lambda n: pa.array([timedelta(1)] * n),
    lambda n: pa.array([b"\xff\0"] * n),
    lambda n: pa.nulls(n),
    lambda n: pa.array([[("a", 1), ("a", 2)]] * n, pa.map_(pa.string(), pa.int8())),
    lambda n: pa.array(["x"] * n).dictionary_encode(),
    lambda n: pa.array([float("nan")] * n),
    lambda n: pa.array([2**64 - 1] * n, pa.uint64()),
    lambda n: pa.array([1.5] * n, pa.float16()),
    lambda n: pa.array([[None, [1]]] * n),
    lambda n: pa.array([{}] * n, pa.struct([])),
    lambda n: pa.array(["x"] * n, pa.large_string()),
    lambda n: pa.array(["x"] * n, pa.string_view()),
    lambda n: pa.RunEndEncodedArray.from_arrays([n], ["x"]) if n else pa.nulls(0),
    lambda n: pa.array([b"ab"] * n, pa.binary(2)),
]


@st.composite
def tables(draw: st.DrawFn, records: list[Any]) -> pa.Table:
    records = [record for record in records if isinstance(record, dict)]
    try:
        table = pa.Table.from_pylist(records)
    except (
        pa.ArrowException,
        ValueError,
        TypeError,
        OverflowError,
        UnicodeError,
    ):  # values of one column that Arrow cannot hold together
        table = pa.Table.from_pylist([PLAIN] * max(1, len(records)))
    for number in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(
            st.sampled_from(
                [
                    f"odd{number}",
                    f"odd{number}",
                    "prompt",
                    "response",
                    "answer",
                    "id",
                    "messages",
                    "win_rate",
                    "extra_info",
                    "",
                    "a.b",
                    "prompt.x",
                ]
            )
        )
        column = draw(st.sampled_from(ODD_COLUMNS))(table.num_rows)
        table = (
            table.set_column(table.schema.get_field_index(name), name, column)
            if name in table.schema.names
            else table.append_column(name, column)
        )
    if draw(st.integers(0, 9)) == 0 and table.num_columns:
        table = table.append_column(table.schema.names[0], table.column(0))  # a name twice
    return table


@st.composite
def record_files(draw: st.DrawFn, name: str) -> dict[str, bytes | None]:
    """A file `name`.SUFFIX, or a folder of a data set."""
    kind = draw(st.sampled_from([PLAIN, PLAIN, RETU, CHAT, LONG_CHAT]))
    records = [
        draw(edited_trees(kind, most=2 if draw(st.booleans()) else 0))
        for _ in range(draw(st.sampled_from([1, 1, 2, 3, 6, 0])))
    ]
    if draw(st.integers(0, 4)) == 0:
        records *= 5
    form = draw(st.sampled_from(FORMS))
    blind = draw(st.integers(0, 2)) == 0
    if form in ("parquet", "arrow"):
        try:
            packed = _parquet(draw, draw(tables(records))) if form == "parquet" else _arrow(draw(tables(records)))
        except (pa.ArrowException, ValueError):  # what Arrow holds and the format does not
            packed = (
                _parquet(draw, pa.Table.from_pylist([PLAIN]))
                if form == "parquet"
                else _arrow(pa.Table.from_pylist([PLAIN]))
            )
        if form == "parquet":
            return {f"{name}.parquet": draw(edited_bytes(packed, least=1)) if blind else packed}
        state = {
            "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
            "_fingerprint": "x",
            "_format_type": None,
            "_split": "train",
        }
        info = "dataset_dict.json" if draw(st.integers(0, 9)) == 0 else "state.json"
        tree = state if info == "state.json" else {"splits": ["train", "test"]}
        odd = [
            None,
            3,
            "../state.json",
            "missing.arrow",
            "",
            "/dev/null",
            ".",
            "data-00000-of-00001.arrow",
            "a\0b",
            "\ud800",
            {},
            [],
            "x" * 5000,
        ]
        return {
            f"{name}/data-00000-of-00001.arrow": draw(edited_bytes(packed, least=1)) if blind else packed,
            f"{name}/{info}": draw(json_files(tree, values=odd)),
        }
    lines = b"".join(json_text(record) + b"\n" for record in records)
    if blind:
        lines = draw(edited_bytes(lines))
    if form == "jsonl.gz":
        lines = gzip.compress(lines, 1, mtime=0)
    elif form == "jsonl.zst":
        lines = zstandard.compress(lines, 1)
    if form not in ("jsonl", "json") and draw(st.integers(0, 2)) == 0:
        lines = draw(edited_bytes(lines, least=1))
    return {f"{name}.{form}": None if draw(st.integers(0, 49)) == 0 else lines}


def _parquet(draw: st.DrawFn, table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=draw(st.sampled_from([1, 2, 1000])),
        compression=draw(st.sampled_from(["none", "snappy", "zstd"])),
    )
    return buffer.getvalue()


def _arrow(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return buffer.getvalue()


CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATE_PIECES = [
    "{{ messages }}",
    "{{ messages[9].content }}",
    "{{ nothing.at.all }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent='x') }}",
    "{{ namespace | tojson }}",
    "{{ 1 // 0 }}",
    "{{ 'a' + 1 }}",
    "{{ '\\ud800' }}",
    "{{ '\\N{nothing}' }}",
    "{{ '\\x' }}",
    "{{ '\\0' }}",
    "{% generation %}x{% endgeneration %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% block a %}{% endblock %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set x = x.__class__ %}{{ x }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ range(10**9) | list }}",
    "{% for i in range(3) recursive %}{{ loop(range(3)) }}{% endfor %}",
    "{% break %}",
    "{% for i in [1] %}{% break %}{% endfor %}",
    "{{ caller() }}",
    "{{ super() }}",
    "{{ self }}",
    "{{ loop.index }}",
    "{% filter nope %}{% endfilter %}",
    "{{ x | nope }}",
    "{{ x is nope }}",
    "{{ '%s' % x }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% if %}",
    "{% for %}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{% raw %}",
    "{{ (" * 5,
    "{{ " + "(" * 150 + "1" + ")" * 150 + " }}",
    "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "{{ [" * 100 + "1" + "] }}" * 100,
    "{% if 1 %}" * 30 + "{% endif %}" * 30,
    "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{{ 1" + " + 1" * 3000 + " }}",
    "{{ not " + "not " * 2000 + "1 }}",
    "{% set a, b = 1 %}",
    "{% set messages = none %}",
    "{{ messages[0]['content'] * 3 }}",
    "{{ -'a' }}",
    "{{ ''.join([1]) }}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "</s>",
    "\n",
    "\0",
    "\u2028",
    "💥",
    "{{ '1' | int('x') }}",
    "{{ 9999999999999999999 * 'a' }}",
    "{% autoescape true %}{{ messages[0].content }}{% endautoescape %}",
    "{{ _('x') }}",
    "{{ lipsum() }}",
    "{{ cycler() }}",
    "{{ joiner }}",
    "{{ dict(a=1).items() }}",
    "{{ 10 ** 4000 }}",
    "{{ messages | sort }}",
    "{{ messages | groupby('role') }}",
    "{{ messages | batch(0) }}",
    "{{ messages | xmlattr }}",
    "{{ 'a' | indent('b') }}",
    "{{ 'x' | center(10**12) }}",
]


@st.composite
def templates(draw: st.DrawFn) -> bytes:
    text = CHATML
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(TEMPLATE_PIECES))
        text = draw(st.sampled_from([text[:at] + piece + text[at:], text + piece, piece, piece + text]))
    data = text.encode()
    return draw(edited_bytes(data)) if draw(st.integers(0, 3)) == 0 else data


FIELDS = [
    "prompt",
    "response",
    "answer",
    "messages",
    "extra_info.question",
    "extra_info.answer",
    "reward_model.ground_truth",
    "messages.0.content",
    "messages.0",
    "prompt.0.content",
    "a..b",
    ".",
    "..",
    "0",
    "prompt.²",
    "messages.\u0660",
    "messages.-1",
    "messages." + "9" * 30,
    "messages." + "9" * 5000,
    "id",
    "é",
    "x" * 2000,
]
ACTIONS = {
    "check with a model": ("data", "check", "--out=out", "--model.path=model"),
    "dedup": ("data", "dedup", "--out=out.jsonl", "--data.workers=1"),
    "dedup to parquet": ("data", "dedup", "--out=out.parquet", "--data.workers=1", "--near=false"),
    "split": ("data", "split", "--out=out", "--validation=0.5", "--data.workers=1"),
    "split near": ("data", "split", "--out=out", "--validation=1", "--near", "--data.workers=1"),
    "decontaminate": ("data", "decontaminate", "--out=out.jsonl.zst"),
    "select": ("data", "select", "--out=out.jsonl.gz"),
}
MORE = {
    "dedup": ["--by=question", "--by=trajectory", "--shingle=char", "--ngram=1", "--threshold=1e-300", "--num_perm=16"],
    "split": ["--validation=1e308", "--validation=1e-300", "--validation=nan", "--seed=99999999999999999999"],
    "decontaminate": ["--n=2", "--search=record", "--against=b*"],
    "select": [
        "--take=easy",
        "--take=uniform",
        "--take=hard",
        "--size=1",
        "--prefer=longest",
        "--min_length=3",
        "--by=id",
        "--by=extra_info",
        "--seed=99999999999999999999",
        "--model.path=model",
    ],
}


@st.composite
def command_cases(draw: st.DrawFn) -> Case:
    action = draw(st.sampled_from(list(ACTIONS)))
    files = draw(record_files("a"))
    operands = [sorted({name.split("/")[0] for name in files})[0]]
    if action == "decontaminate" or draw(st.integers(0, 5)) == 0:
        more = draw(record_files("b"))
        files |= more
        other = sorted({name.split("/")[0] for name in more})[0]
        operands += [f"--against={other}"] if action == "decontaminate" else [other]
    if draw(st.integers(0, 9)) == 0:
        operands = [
            draw(
                st.sampled_from(
                    ["*", "a.*", "**", "[", "a*/*", "missing.jsonl", ".", "x" * 5000, "a.jsonl/x", "~", "/dev/null"]
                )
            ),
            *operands[1:],
        ]
    options = draw(
        st.lists(
            st.sampled_from(MORE.get(action.split()[0], ["--data.template=none"])),
            max_size=2,
            unique_by=lambda text: text.split("=")[0],
        )
    )
    if "model" in action:
        files["chat.jinja"] = draw(templates())
        options.append("--data.template=chat.jinja")
        options.append(
            draw(
                st.sampled_from(
                    ["--data.loss_on=all", "--data.loss_on=last", "--data.overlong=right", "--data.overlong=drop"]
                )
            )
        )
    for name in draw(
        st.lists(
            st.sampled_from(["prompt", "response", "answer", "messages"]), max_size=1 if draw(st.booleans()) else 0
        )
    ):
        options.append(f"--data.fields.{name}={draw(st.sampled_from(FIELDS))}")
    given = ACTIONS[action]
    return Case("command", files, (*given[:2], *operands, *given[2:], *options), "model")


@st.composite
def encoder_cases(draw: st.DrawFn) -> Case:
    """Tokens of a set, or problems."""
    files = draw(record_files("a"))
    options = [
        f"--data.{key}={draw(st.sampled_from(values))}"
        for key, values in {
            "loss_on": ["last", "all"],
            "overlong": ["error", "drop", "right"],
            "unusable": ["error", "drop"],
        }.items()
    ]
    if draw(st.booleans()):
        files["chat.jinja"] = draw(templates())
        options.append("--data.template=chat.jinja")
    path = sorted({name.split("/")[0] for name in files if name != "chat.jinja"})[0]
    return Case(
        draw(st.sampled_from(["tokens", "problems", "problems with experts"])), files, (path, *options), "model"
    )


CASES = st.one_of(command_cases(), encoder_cases())


def prepare(folder: Path) -> Mapping[str, Path]:
    import pctrain.data.check
    import pctrain.data.sets.decontaminate
    import pctrain.data.sets.dedup
    import pctrain.data.sets.select
    import pctrain.data.sets.split  # noqa: F401

    base = folder / "bases"
    base.mkdir()
    architecture = ArchitectureConfig(layers=1, hidden=16, heads=2, kv_heads=2, ffn=16, context=128)
    make_hf_dir(base / "model", architecture, ["12+3=15 so \\boxed{15}", "7-1=6, then"], vocab_size=300, seed=1)
    (base / "model" / "model.safetensors").unlink()
    return {"model": base}


def run(case: Case, folder: Path) -> None:
    if case.action == "command":
        try:
            cli.run_command(list(case.arguments))
        except SystemExit as end:
            if end.code not in (0, 1):
                raise
        return
    path, *options = case.arguments
    data = read(None, options).data
    encoder = Encoder(Path("model"), data, 64)
    if case.action == "tokens":
        job = TokenJob(tuple(list_files(path)), Path("model"), data.model_copy(update={"workers": 1}), 64)
        tokens = folder_of(Path("cache"), job)
        for _ in build(job, tokens):
            pass
        store = TokenStore(tokens)
        assert len(store) and all(
            len(store[i]) == store.lengths[i] and store.id(i) is not None for i in range(len(store))
        )
    else:
        problems = read_problems(
            Path(path),
            data.fields,
            encoder,
            room=64,
            room_name="the room",
            expert=64 if "expert" in case.action else None,
        )
        json.dumps([problem.id for problem in problems]).encode()
        if not problems:
            raise UserError("none")
