"""megatron-core calls the Transformer Engine of our pin as it is: its sources' signatures are in te_signatures.json."""

import json

import pytest

from tests.contracts import te_signatures

TABLE = json.loads(te_signatures.TABLE.read_text())
NAMES = TABLE["names"]
# Names that this version of Transformer Engine does not have, and what megatron-core 0.16.1 does then.
ABSENT = {
    "transformer_engine.pytorch.attention._SplitAlongDim": "it splits with torch",
    "transformer_engine.pytorch.attention._SplitAlongDim.apply": "it splits with torch",
    "transformer_engine.pytorch.cpp_extensions.cast_to_fp8": "imported for versions below 2.0",
    "transformer_engine.pytorch.module.base.get_workspace": "the router's product runs in torch",
}


def existing(use: te_signatures.Use) -> str | None:
    """Return the first of a use's names that exists."""
    return next((name for name in use.names if NAMES[name] is not None), None)


def test_the_table_is_of_the_version_that_megatron_core_takes():
    assert TABLE["version"] == "2.11.0"
    assert set(NAMES) == {name for use in te_signatures.uses() for name in use.names}, te_signatures.__doc__


def test_every_name_exists():
    missing = {use.names[0]: use.place for use in te_signatures.uses() if existing(use) is None}
    assert set(missing) == set(ABSENT), missing


# Calls that do not fit, and why megatron-core does not make them.
NOT_MADE = {
    "transformer_engine.pytorch.cpp_extensions.general_gemm": "in te_general_gemm, which is None without get_workspace",
    "transformer_engine.pytorch.fp8.FP8GlobalStateManager.add_fp8_tensors_to_global_buffer": "for versions below 1.13",
}


def test_every_call_fits():
    checked, faults = set(), {}
    for use in te_signatures.uses():
        name = existing(use)
        if not use.call or not name or not NAMES[name]:
            continue
        signature = te_signatures.signature(NAMES[name])
        takes_self = next(iter(signature.parameters), "") in ("self", "cls")
        bind = signature.bind_partial if use.partial else signature.bind
        try:
            bind(*[None] * (use.positional + takes_self), **dict.fromkeys(use.keywords))
        except TypeError as error:
            faults[name] = f"{use.place}: {error}; {signature}"
        checked.add(name)
    assert set(faults) == set(NOT_MADE), faults
    layers = {"Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention"}
    assert {f"transformer_engine.pytorch.{layer}.__init__" for layer in layers} <= checked
    assert {f"transformer_engine.pytorch.{layer}.forward" for layer in layers} <= checked
    assert {f"transformer_engine.common.recipe.{recipe}" for recipe in RECIPES.values()} <= checked


RECIPES = {
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def test_what_our_options_need():
    """Packs and context parallelism (thd), the fused rotary embedding, and a recipe for every value of model.fp8."""
    from pctrain.core.model import _FP8

    forward = te_signatures.signature(NAMES["transformer_engine.pytorch.DotProductAttention.forward"]).parameters
    assert {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"} <= set(forward)
    rotary = te_signatures.signature(NAMES["transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb"])
    assert {"tensor_format", "fused", "cu_seqlens", "cp_size", "cp_rank"} <= set(rotary.parameters)
    assert set(_FP8) - {None} == set(RECIPES)
    for recipe in RECIPES.values():
        assert "fp8_format" in te_signatures.signature(NAMES[f"transformer_engine.common.recipe.{recipe}"]).parameters


def test_the_table_is_what_the_installed_package_has():
    root = te_signatures.installed()
    if root is None:
        pytest.skip("Transformer Engine is not installed: it needs CUDA")
    assert te_signatures.read(root) == TABLE, te_signatures.__doc__


def test_the_reader(tmp_path):
    """Re-exports, star imports, inherited methods and dataclasses, as the package uses them."""
    package = tmp_path / "engine"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("from .sub import *\nfrom engine.sub.deep import Deep as Renamed\n")
    (package / "sub" / "__init__.py").write_text("from .deep import Deep, helper\n")
    (package / "sub" / "deep.py").write_text(
        "class Base:\n    def forward(self, x: int, *, y=3): ...\n"
        "class Deep(Base):\n    def __init__(self, a, b=2, **rest): ...\n"
        "@dataclass()\nclass Recipe:\n    name: str\n    margin: int = 0\n"
        "def helper(a, b: float = 1.0): ...\n"
    )
    sources = te_signatures.Sources(tmp_path)
    assert sources.signature("engine.Deep") == "self, a, b=..., **rest"
    assert sources.signature("engine.Renamed.forward") == "self, x, *, y=..."
    assert sources.signature("engine.sub.deep.Recipe") == "self, name, margin=..."
    assert sources.signature("engine.helper") == "a, b=..."
    assert sources.signature("engine.sub") == ""
    assert sources.signature("engine.gone") is None and sources.signature("engine.Deep.gone") is None
