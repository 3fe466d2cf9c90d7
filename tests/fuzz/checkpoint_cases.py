"""Cases of the checkpoints target: changed checkpoints, run folders, rollouts for replay, token stores and models.

Files that are protected by checksums get new checksums after the change, so that the reader behind them is reached.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.case import Case
from tests.fuzz.checkpoint_folders import METRICS, ROLLOUT, STATE
from tests.fuzz.mutate import ODD_VALUES, edited_bytes, edited_trees, json_files, json_text

STEP = "run/checkpoints/step-2"
RAN = "ran"  # a folder that code in a file would make
ABOUT = {
    "format": 1,
    "step": 3,
    "prompts": {"position": 3, "carried": [0, 1]},
    "rounds": 1,
    "rollout_seconds": 0.5,
    "reward_seconds": 0.1,
    "groups": [
        {
            "problem": 0,
            "id": "p:1",
            "why": None,
            "prefixes": [[], []],
            "verdicts": [{"reward": 1.0, "cause": "right", "detail": ""}] * 2,
            "finish": ["stop", "length"],
        },
        {
            "problem": 1,
            "id": "p:2",
            "why": "all wrong",
            "prefixes": [[], []],
            "verdicts": [{"reward": 0.0, "cause": "wrong", "detail": ""}] * 2,
            "finish": ["stop", "stop"],
        },
    ],
}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 270,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "head_dim": 8,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
EXPERTS = {
    **MODEL,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "rope_scaling": None,
    "layer_types": ["full_attention"],
    "sliding_window": None,
}
BYTES: dict[str, bytes] = {}  # of the files that are changed as bytes, by their path in the prepared folder


class _Runs:
    def __init__(self, call: Callable, *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def _global(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls `module.name`, in protocol 0, whatever that is here."""
    return (
        b"c"
        + f"{module}\n{name}\n".encode()
        + b"("
        + b"".join(pickle.dumps(argument, 0)[:-1] for argument in arguments)
        + b"tR."
    )


CODE = [
    pickle.dumps(_Runs(os.mkdir, RAN)),
    pickle.dumps(_Runs(os.mkdir, RAN), 0),
    pickle.dumps({"state": [_Runs(os.mkdir, RAN)]}),
    pickle.dumps(_Runs(eval, f"__import__('os').mkdir('{RAN}')")),
    _global("builtins", "getattr", "x", "upper"),
    _global("torch", "Size.__class__", 1),
    _global("torch", "load", "x"),
    _global("torch.serialization", "_get_layout", "x"),
    _global("torch.serialization", "_get_layout", "torch.strided"),
    _global("torch", "Size", 3),
    _global("torch", "float32", 3),
    _global("torch.distributed.checkpoint.metadata", "Metadata"),
    _global("torch.distributed.checkpoint.metadata", "Metadata", 1, 2, 3),
    _global("torch.distributed.checkpoint.metadata", "MetadataIndex", "x"),
    _global("torch.distributed.checkpoint.metadata", "TensorProperties.__init__.__globals__", "x"),
    _global("torch.distributed.checkpoint.metadata", "nothing"),
    pickle.dumps(3),
    pickle.dumps(None),
    pickle.dumps({"a": [1]}),
    b"",
    b".",
    b"N.",
    b"(" * 5000,
    b"]" * 3000 + b"a" * 2999 + b".",
    b"r\xff\xff\xff\x7f.",
    b"Nr\xff\xff\xff\x7f.",
    b"\x80\x05.",
    b"\x80\xff.",
    b"h\0.",
    b"X\xff\xff\xff\x7f.",
]


@st.composite
def parts(draw: st.DrawFn, name: str) -> bytes:
    """A checkpoint file as megatron-core and torch read it: changed at random, cut, another file, or another pickle."""
    data = BYTES[f"{STEP}/{name}"]
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.sampled_from(CODE))
    if kind == 1 and zipfile.is_zipfile(io.BytesIO(data)):
        return _with_pickle(data, draw(st.sampled_from(CODE)))
    if kind == 2:
        return draw(
            st.sampled_from([b"", data[: len(data) // 2], data * 2, *(BYTES[f"{STEP}/{other}"] for other in PARTS)])
        )
    return draw(edited_bytes(data, least=1, most=2))


def _with_pickle(data: bytes, replaced: bytes) -> bytes:
    """A file of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            new.writestr(item, replaced if item.filename.endswith("data.pkl") else old.read(item))
    return buffer.getvalue()


PARTS: list[str] = []  # names of a checkpoint's binary files


@st.composite
def checkpoint_cases(draw: st.DrawFn) -> Case:
    """The newest checkpoint, changed; with its manifest made anew (`whole`) or not."""
    files: dict[str, bytes | None] = {}
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        what = draw(st.sampled_from(["part", "part", "part", "metadata.json", "manifest", "gone", "folder"]))
        if what == "part":
            name = draw(st.sampled_from([*PARTS, ".metadata", ".metadata"]))
            files[f"{STEP}/{name}"] = draw(parts(name))
        elif what == "metadata.json":
            tree = json.loads(BYTES[f"{STEP}/metadata.json"])
            files[f"{STEP}/metadata.json"] = draw(
                json_files(tree, values=[*ODD_VALUES, "torch_dist", "zarr", "fully_sharded", 1, 2])
            )
        elif what == "manifest":
            odd = ["../../a.jsonl", "/etc/passwd", "a\0b", "x" * 5000, "", ".", *ODD_VALUES]
            files[f"{STEP}/manifest.json"] = draw(json_files(json.loads(BYTES[f"{STEP}/manifest.json"]), values=odd))
        elif what == "folder":
            files[f"{STEP}/{draw(st.sampled_from([*PARTS, 'metadata.json', 'manifest.json', 'state.json']))}"] = None
    whole = "manifest.json" not in str(list(files)) and draw(st.integers(0, 3)) > 0
    gone = draw(st.sampled_from(["", "", "", "", *PARTS, "metadata.json", "manifest.json", "state.json"]))
    return Case("load", files, ("whole" if whole else "as it is", gone), "run")


@st.composite
def code_cases(draw: st.DrawFn) -> Case:
    """A checkpoint, whole by its manifest, a part of which would run code."""
    name = draw(st.sampled_from([".metadata", ".metadata", *PARTS]))
    data, code = BYTES[f"{STEP}/{name}"], draw(st.sampled_from(CODE[:4]))
    packed = zipfile.is_zipfile(io.BytesIO(data)) and draw(st.booleans())
    return Case("load", {f"{STEP}/{name}": _with_pickle(data, code) if packed else code}, ("whole", ""), "run")


@st.composite
def state_cases(draw: st.DrawFn) -> Case:
    return Case("state", {f"{STEP}/state.json": draw(json_files(STATE))}, (), "run")


@st.composite
def lines(draw: st.DrawFn, rows: list[Any]) -> bytes:
    changed = [json_text(draw(edited_trees(row, most=1))) for row in rows]
    data = b"\n".join(changed) + draw(st.sampled_from([b"\n", b"\n", b"", b"\n\n", b"\n{", b"\n3\n", b"\nnull\n"]))
    return draw(edited_bytes(data)) if draw(st.integers(0, 3)) == 0 else data


@st.composite
def changed_configs(draw: st.DrawFn, text: bytes) -> bytes:
    """A config.yaml with one text replaced."""
    old = draw(
        st.sampled_from(
            [
                b"kind: sft",
                b"seed: 0",
                b"fingerprints:",
                b"a.jsonl",
                b"lr:",
                b"null",
                b"true",
                b"'",
                b"\n",
                b"sft:",
            ]
        )
    )
    odd = [
        b"",
        b"x",
        b"[]",
        b"{a: 1}",
        b"&a [*a]",
        b"!!timestamp x",
        b"kind: rl",
        b"3",
        b"fingerprints: 3\nx:",
        b"fingerprints: {3: 4}\nx:",
        b'"\\ud800"',
        b"[" * 2000,
        b"9" * 5000,
        b"\0",
    ]
    text = text.replace(old, draw(st.sampled_from(odd)), draw(st.sampled_from([1, 1, -1])))
    return draw(edited_bytes(text))


@st.composite
def rollout_files(draw: st.DrawFn) -> dict[str, bytes | None]:
    """A file of rollouts, and another file next to it."""
    rows = [
        {**ROLLOUT, "group": n // 2, "kept": n < 2, "why": "" if n < 2 else "all wrong"}
        for n in range(draw(st.sampled_from([1, 4, 4, 0])))
    ]
    step_2 = draw(lines(rows))
    others = [
        "step-3.jsonl",
        "step-x.jsonl",
        "step-٣.jsonl",
        f"step-{'9' * 200}.jsonl",
        "step--1.jsonl",
        "step-4.replay.npz",
    ]
    other = draw(st.sampled_from(others))
    return {"run/rollouts/step-2.jsonl": step_2, f"run/rollouts/{other}": b""}


@st.composite
def folder_cases(draw: st.DrawFn) -> Case:
    """A run folder that is opened again, or shown."""
    files: dict[str, bytes | None] = {}
    for name in draw(
        st.lists(
            st.sampled_from(["metrics.jsonl", "ledger.jsonl", "train.log", "config.yaml", "summary.json", "rollouts"]),
            min_size=1,
            max_size=2,
            unique=True,
        )
    ):
        path = f"run/{name}"
        if draw(st.integers(0, 29)) == 0:
            files[path] = None
        elif name == "metrics.jsonl":
            files[path] = draw(lines(METRICS))
        elif name == "ledger.jsonl":
            files[path] = draw(
                lines(
                    [{"step": 1, "phase": "sft_update", "tokens": 80}, {"step": 2, "phase": "validation", "tokens": 80}]
                )
            )
        elif name == "train.log":
            log = b"2026-01-01T00:00:00 step 1 loss\n2026-01-01T00:00:00 step 99 loss\nx\n"
            files[path] = draw(
                edited_bytes(log.replace(b"99", draw(st.sampled_from([b"99", b"9" * 5000, "٣".encode(), b"\xff"]))))
            )
        elif name == "config.yaml":
            files[path] = draw(changed_configs(BYTES[path]))
        elif name == "summary.json":
            files[path] = draw(
                json_files({"summary": {"steps": 2, "loss": 2.0, "final weights": "hf"}, "next_command": "pctrain rl"})
            )
        else:
            files |= draw(rollout_files())
    action = (
        draw(st.sampled_from(["open", "open", "show"]))
        if "run/rollouts/step-2.jsonl" not in files
        else draw(st.sampled_from(["show", "show", "open"]))
    )
    return Case(
        action,
        files,
        tuple(draw(st.sampled_from([("--step=2",), (), ("--dropped",), ("--step=2", "--dropped", "--prompts=1")]))),
        "run",
    )


@st.composite
def replay_cases(draw: st.DrawFn) -> Case:
    arrays = {
        "lengths": np.array([2, 1, 2, 1]),
        "tokens": np.arange(6, dtype=np.int32),
        "logprobs": np.zeros(draw(st.sampled_from([6, 0, 3]))),
    }
    odd = [
        np.zeros(0),
        np.zeros((2, 2)),
        np.array(3),
        np.array([1.5, -1]),
        np.array(["a"]),
        np.array([None], object),
        np.array([2**62, 2**62]),
        np.array([-5, 3]),
        np.zeros(6, "V8"),
        np.array([np.nan] * 6),
        np.zeros(6, bool),
        np.array([1, 2], "datetime64[s]"),
        np.zeros(3, complex),
    ]
    for name in draw(st.lists(st.sampled_from(list(arrays)), max_size=2, unique=True)):
        arrays[name] = draw(st.sampled_from(odd))
    about = draw(json_files(ABOUT))
    arrays["about"] = np.frombuffer(about, np.uint8) if draw(st.integers(0, 19)) else draw(st.sampled_from(odd))
    for name in draw(st.lists(st.sampled_from(list(arrays)), max_size=1 if draw(st.integers(0, 5)) == 0 else 0)):
        del arrays[name]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = buffer.getvalue()
    if draw(st.integers(0, 19)) == 0:  # a header that promises more than there is
        with zipfile.ZipFile(io.BytesIO(data), "a") as archive:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header,
                {"descr": "<i8", "fortran_order": False, "shape": (draw(st.sampled_from([10**9, 10**12, -1, 2**62])),)},
            )
            archive.writestr("tokens.npy", header.getvalue())
    data = draw(edited_bytes(data, least=1)) if draw(st.integers(0, 2)) == 0 else data
    return Case("replay", {"step.npz": data if draw(st.integers(0, 29)) else None})


@st.composite
def store_cases(draw: st.DrawFn) -> Case:
    """A folder of tokens."""
    name = draw(st.sampled_from(["manifest.json", "index.npz", "index.npz", "ids.jsonl", "shard-00000.tokens"]))
    data = BYTES[f"tokens/{name}"]
    if name == "manifest.json":
        content = draw(json_files(json.loads(data), values=[*ODD_VALUES, "object", "V8", "int32", "uint16", "float64"]))
    elif name == "index.npz" and draw(st.booleans()):
        with np.load(io.BytesIO(data)) as index:
            arrays = dict(index)
        changed = draw(st.sampled_from(sorted(arrays)))
        old = arrays[changed]
        arrays[changed] = draw(
            st.sampled_from(
                [
                    old[:-1],
                    old[:0],
                    old * 0 - 1,
                    old * 1000,
                    old.astype(float),
                    old.astype(object),
                    np.zeros((3, 3, 3), np.int32),
                    np.array(1),
                    old + 2**30,
                    -old,
                ]
            )
        )
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
    else:
        content = draw(edited_bytes(data, least=1))
    return Case("store", {f"tokens/{name}": content}, (), "store")


@st.composite
def model_cases(draw: st.DrawFn) -> Case:
    """A Hugging Face directory."""
    files: dict[str, bytes | None] = {}
    for name in draw(
        st.lists(
            st.sampled_from(
                [
                    "config.json",
                    "config.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "model.safetensors",
                    "index",
                    "special_tokens_map.json",
                ]
            ),
            min_size=1,
            max_size=2,
        )
    ):
        if name == "config.json":
            tree = draw(st.sampled_from([MODEL, MODEL, EXPERTS]))
            files["model/config.json"] = draw(
                json_files(
                    {**tree, "vocab_size": VOCABULARY[0]}, values=[*ODD_VALUES, "linear", "yarn", "default", 1, 2]
                )
            )
        elif name == "tokenizer.json":
            files["model/tokenizer.json"] = draw(json_files(json.loads(BYTES["model/tokenizer.json"])))
        elif name == "tokenizer_config.json":
            tree = {
                "eos_token": draw(st.sampled_from(["</s>", {"content": "</s>"}])),
                "bos_token": "<s>",
                "added_tokens_decoder": {},
                "chat_template": "{{ messages[0].content }}",
            }
            files["model/tokenizer_config.json"] = draw(
                json_files(
                    tree,
                    values=[
                        *ODD_VALUES,
                        [{"name": "default", "template": "x"}],
                        [{"name": "a"}],
                        [{"name": [], "template": "x"}],
                        "{% if %}",
                    ],
                )
            )
        elif name == "special_tokens_map.json":
            files["model/special_tokens_map.json"] = draw(json_files({"eos_token": "</s>"}))
        elif name == "index":
            weights = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
            odd = ["missing.safetensors", "../a.jsonl", "config.json", "a\0b", "", "/dev/null", *ODD_VALUES]
            files["model/model.safetensors.index.json"] = draw(json_files(weights, values=odd))
        else:
            files["model/model.safetensors"] = draw(safetensors())
    return Case("model", files, (), "model")


TENSORS: list[str] = []
VOCABULARY = [270]


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    data = BYTES["model/model.safetensors"]
    length = int.from_bytes(data[:8], "little")
    if draw(st.booleans()):
        header = draw(
            json_files(
                json.loads(data[8 : 8 + length]),
                values=[*ODD_VALUES, "F32", "F64", "BOOL", [1, 2], [0, 4], [4, 0], [2**40, 2**40], [0, 2**63]],
            )
        )
        size = draw(st.sampled_from([len(header)] * 4 + [0, 1, 2**63 - 1, len(header) + 10**6]))
        return size.to_bytes(8, "little") + header + data[8 + length :]
    return draw(edited_bytes(data, least=1))


CASES = st.one_of(
    checkpoint_cases(),
    checkpoint_cases(),
    code_cases(),
    state_cases(),
    folder_cases(),
    folder_cases(),
    replay_cases(),
    store_cases(),
    model_cases(),
    model_cases(),
)
