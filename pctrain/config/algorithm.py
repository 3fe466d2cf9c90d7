"""`rl.algorithm`: the options of an RL algorithm, and what config checks, planner and costs need to know about it.

The options of the built-in algorithms are in `pctrain/rl/algorithms/options.py`, next to the losses and without torch.
They are imported by name, because imports point from `rl` to `config`. A user's algorithm is `module:Class`. Its module
is imported only when a command names it: a config that is merely read keeps the options as they are written
(`UncheckedOptions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from pctrain.common import plugins
from pctrain.common.errors import UserError
from pctrain.config.section import Section

DEFAULT = "dapo_dc"
_BUILT_IN = "pctrain.rl.algorithms.options"


class AlgorithmOptions(Section):
    """The options of one algorithm. The class variables are its traits."""

    needs_expert: ClassVar[bool] = False  # every problem must have an expert's trajectory
    expert_in_group: ClassVar[bool] = False  # the expert is the last member of its group, and its reward counts
    dynamic_sampling: ClassVar[bool] = False  # reject groups outside rl.keep_low to rl.keep_high and sample more
    unused: ClassVar[frozenset[str]] = frozenset()  # inherited options that this algorithm does not read

    name: str

    @classmethod
    def option_fields(cls) -> dict[str, FieldInfo]:
        """Return the options that a user can set."""
        return {key: field for key, field in cls.model_fields.items() if key != "name" and key not in cls.unused}

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from the defaults of this algorithm."""
        values = {key: getattr(self, key) for key in self.option_fields()}
        return {key: value for key, value in values.items() if value != type(self).model_fields[key].get_default()}

    def rollouts(self, group: int) -> int:
        """Return the number of responses sampled for a prompt with `group` members."""
        return group - self.expert_in_group

    def streams_from_pass(self, updates: int) -> frozenset[str]:
        """Return which of old_logprob, ref_logprob and entropy a pass without gradients makes before the updates."""
        return frozenset()

    def problems(self, group: int, max_response: int) -> Iterator[str]:
        """Yield a message for each combination of options that cannot work. The keys begin with `rl.algorithm.`."""
        yield from ()

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.unused}


class UncheckedOptions(AlgorithmOptions):
    """The options of a user's algorithm as they are written. `check_own` turns them into those of its class."""

    model_config = ConfigDict(extra="allow")


@cache
def built_in() -> Mapping[str, type[AlgorithmOptions]]:
    """Return the options class of each algorithm of this package, by name."""
    return import_module(_BUILT_IN).OPTIONS


def expected_names() -> str:
    """Return what an error message says about the names that are possible."""
    known = ", ".join(repr(name) for name in built_in())
    return f"{known} or module:Class, such as my_algorithms:Mine for my_algorithms.py in the current directory"


def load_own(name: str, kind: str, accepts: Callable[[Any], bool]) -> Any:
    """Return what a user's `module:Class` names. UserError if it cannot be imported or `accepts` refuses it."""
    try:
        own = plugins.load(name, "algorithms", accepts)
    except plugins.LoadError as error:
        raise UserError(f"rl.algorithm = {name!r}: {error}") from None
    if not accepts(own):
        raise UserError(f"rl.algorithm = {name!r}: expected {kind}, found {own!r:.80}")
    return own


def options_class(name: str) -> type[AlgorithmOptions]:
    """Return the options class of an algorithm; a user's module is imported.

    Raises:
        UserError: a user's module that cannot be imported, or a class that is no algorithm.
    """
    if name in built_in():
        return built_in()[name]
    return load_own(name, "a subclass of pctrain.rl.algorithms.grpo.GRPO (or of base.Algorithm)", _has_options).Options


def check_own(options: AlgorithmOptions) -> AlgorithmOptions:
    """Return the options of a user's algorithm checked by its class; those of a built-in one are checked already."""
    if not isinstance(options, UncheckedOptions):
        return options
    own = options_class(options.name)
    try:
        return own.model_validate(options.model_dump(), strict=True)
    except ValidationError as error:
        raise UserError(f"rl.algorithm = {options.name!r}: {_messages(error)}") from None


def with_shared(options: AlgorithmOptions, base: AlgorithmOptions) -> AlgorithmOptions:
    """Return options that take over what was changed in `base`, unless they lack an option or set it themselves."""
    has = options.option_fields()
    taken = {key: value for key, value in base.changed().items() if key in has and key not in options.model_fields_set}
    return options.model_copy(update=taken)


def _has_options(candidate: object) -> bool:
    options = getattr(candidate, "Options", None)
    return isinstance(candidate, type) and isinstance(options, type) and issubclass(options, AlgorithmOptions)


def _as_options(value: Any) -> Any:
    """Turn `grpo` or `{name: grpo, clip_low: 0.1}` into the options of that algorithm."""
    if isinstance(value, AlgorithmOptions):
        return value
    values = {"name": value} if isinstance(value, str) else value
    name = str(values.get("name", DEFAULT)) if isinstance(values, dict) else ""
    is_own = plugins.NAME.fullmatch(name) is not None
    if name not in built_in() and not is_own:
        raise PydanticCustomError("algorithm", "{expected}", {"expected": expected_names()})
    kind = UncheckedOptions if is_own else built_in()[name]
    try:
        return kind.model_validate({**values, "name": name}, strict=True)
    except ValidationError as error:
        raise PydanticCustomError("algorithm_options", "{problems}", {"problems": _messages(error)}) from None


def _messages(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False):
        message = "unknown option" if item["type"] == "extra_forbidden" else item["msg"]
        parts.append(f"{'.'.join(map(str, item['loc']))}: {message}")
    return "; ".join(parts)


AlgorithmChoice = Annotated[SerializeAsAny[AlgorithmOptions], BeforeValidator(_as_options)]
