"""The typed config tree. One class a section; the field's description and unit are what `--help` prints.

Loading (YAML file, `--section.key=value`, nearest-key errors) is in `config_load.py`; this file only says what exists.
It imports neither torch nor anything else heavy: a wrong key is refused in milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pctrain.common import plugins


class Section(BaseModel):
    """Unknown keys are errors; values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class RunConfig(Section):
    dir: Path = Field(Path("runs/default"), description="run folder: everything this run writes goes below it")
    seed: int = Field(0, ge=0, description="seed of data order, initial weights and sampling")
    tensorboard: bool = Field(True, description="write TensorBoard events into the run folder")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases to write to as well (needs the wandb package)"
    )
    keep_last: int | None = Field(
        None,
        ge=1,
        description="checkpoints to keep: the newest, and the best; default all. `pctrain run` keeps all of SFT",
    )
    keep_every: int | None = Field(
        None, ge=1, description="with run.keep_last: also keep the steps that are multiples of this"
    )


class ArchitectureConfig(Section):
    """Shape of a model made from scratch (Llama form: RMSNorm, SwiGLU, RoPE). Ignored where `model.path` is given."""

    layers: int = Field(3, ge=1, description="transformer layers")
    hidden: int = Field(128, ge=8, description="hidden size")
    heads: int = Field(4, ge=1, description="attention heads")
    kv_heads: int = Field(4, ge=1, description="key/value heads (fewer than heads: grouped-query attention)")
    ffn: int = Field(384, ge=8, description="feed-forward width")
    context: int = Field(256, ge=16, description="longest sequence, tokens")
    tied: bool = Field(True, description="one matrix for the embedding and the output head")


class ModelConfig(Section):
    path: Path | None = Field(None, description="Hugging Face directory (config.json, tokenizer.json, safetensors)")
    checkpoint: Path | None = Field(
        None, description="pctrain checkpoint (…/checkpoints/step-N) to start from; weights only"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of parameters and activations")
    spec: Literal["auto", "te", "torch-varlen", "torch"] = Field(
        "auto",
        description="layer spec: Transformer Engine; torch, with variable-length flash attention (CUDA) or without; best here",
    )
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = Field(
        None,
        description="scaling recipe of matrix products in 8 bits (te only, with bfloat16); mxfp8: Blackwell; default: none",
    )
    router_aux_loss: float = Field(
        0.0,
        ge=0,
        description="mixture of experts: coefficient of the load-balancing loss in training, summed over layers; 0: none",
    )
    architecture: ArchitectureConfig = Field(default_factory=ArchitectureConfig)

    @property
    def fp8_block(self) -> int:
        """Tokens that matrix products in 8 bits take at a time."""
        return {None: 1, "mxfp8": 32}.get(self.fp8, 16)


class ParallelConfig(Section):
    """Data parallel size is what is left: world size / (tensor x pipeline x context)."""

    tensor: int = Field(1, ge=1, description="tensor parallel size, ranks")
    pipeline: int = Field(1, ge=1, description="pipeline parallel size, ranks")
    context: int = Field(
        1, ge=1, description="context parallel size, ranks: every sequence is cut into that many parts (te only)"
    )
    expert: int = Field(
        1, ge=1, description="expert parallel size, ranks (taken from the data parallel ones; mixture of experts only)"
    )
    sequence_parallel: bool = Field(
        False, description="shard activations of norms and residuals along the sequence (needs tensor > 1)"
    )
    virtual_pipeline: int = Field(
        1, ge=1, description="virtual stages of each pipeline stage, interleaved: smaller bubble, more traffic"
    )
    first_stage_layers: int | None = Field(
        None, ge=1, description="layers of the first pipeline stage; default: an even share"
    )
    last_stage_layers: int | None = Field(
        None, ge=1, description="layers of the last pipeline stage; default: an even share"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations made again in the backward pass: none, those inside attention, all but each layer's input",
    )
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients over data parallel ranks while the backward pass goes on"
    )
    timeout: float = Field(
        600,
        gt=0,
        le=604800,
        description="seconds a rank may go without progress (a collective, a step of the engine, a verdict): the run ends then",
    )


class ProblemsConfig(Section):
    """Generated arithmetic problems with worked solutions. Used where `data.train` is not given."""

    min_terms: int = Field(3, ge=2, le=12, description="fewest terms of a chain")
    max_terms: int = Field(4, ge=2, le=12, description="most terms of a chain")
    max_operand: int = Field(9, ge=1, le=9999, description="largest operand")
    train: int = Field(600, ge=1, description="expert trajectories for SFT, records")
    validation: int = Field(200, ge=1, description="held-out trajectories for the validation loss, records")
    test: int = Field(512, ge=1, description="held-out problems for the score, records")
    rl: int = Field(
        2000, ge=1, description="problems for RL, records; only algorithms with experts read their solutions"
    )
    vocab_size: int = Field(320, ge=270, description="SentencePiece vocabulary, upper bound, pieces")


class SourceConfig(Section):
    """One source of trajectories."""

    path: Path = Field(description="file, glob (*, ?, [], **) of files, or folder written by datasets' save_to_disk")
    weight: float = Field(
        1.0, gt=0, description="passes over it in one epoch: 2 shows every trajectory twice, 0.5 every other one"
    )
    name: str | None = Field(
        None, min_length=1, description="its name in metrics; default: the last part of the path without its suffix"
    )


def _as_sources(value: Any) -> Any:
    """`train.jsonl`, `{path: ..., weight: 2}` and lists of these all mean a list of sources."""
    items = value if isinstance(value, list) else [value]
    return None if value is None else [{"path": item} if isinstance(item, (str, Path)) else item for item in items]


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources), Field(min_length=1)]


class FieldsConfig(Section):
    """Where a record's fields lie. A dot goes into an object, a number into a list: `extra_info.question`, `prompt.0.content`.

    What is not given is found by the columns: `messages`; RETU's; or `prompt`, `response`, `answer`.
    """

    prompt: str | None = Field(None, min_length=1, description="the question")
    response: str | None = Field(None, min_length=1, description="the expert's trajectory")
    answer: str | None = Field(None, min_length=1, description="the gold answer")
    messages: str | None = Field(
        None, min_length=1, description="a chat in OpenAI's form, [{role, content}, ...]; in place of the prompt"
    )


class DataConfig(Section):
    train: Sources | None = Field(
        None, description="expert trajectories: a path, or [{path, weight, name}, ...] for several sources"
    )
    validation: Sources | None = Field(
        None, description="held-out trajectories; weights are not read: every one counts once"
    )
    test: Path | None = Field(None, description="problems to score on: prompt, answer; file, glob or folder")
    rl: Path | None = Field(
        None, description="problems for RL: prompt, answer, for algorithms with experts response; file, glob or folder"
    )
    fields: FieldsConfig = Field(default_factory=FieldsConfig)
    template: str = Field(
        "auto", description="chat template: auto (the checkpoint's own, none where it has none), none, or a Jinja file"
    )
    loss_on: Literal["last", "all"] = Field("last", description="assistant turns of a chat that are trained on")
    overlong: Literal["error", "drop", "right"] = Field(
        "error",
        description="trajectories longer than the context or sft.token_budget: stop, or count them and drop or cut them; problems "
        "of RL longer than rollout.max_prompt, or their experts than rollout.max_response: stop, or count and drop them (drop and right)",
    )
    unusable: Literal["error", "drop"] = Field(
        "error",
        description="records without a trainable token or that the template cannot mask: stop, or drop and count",
    )
    cache: Path | None = Field(
        None, description="folder of tokenised data, which runs may share; default: `tokens` in run.dir"
    )
    workers: int | None = Field(None, ge=1, description="processes that tokenise; default: one a core")
    problems: ProblemsConfig = Field(default_factory=ProblemsConfig)


class OptimizerConfig(Section):
    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a cosine or wsd schedule")
    schedule: Literal["constant", "cosine", "wsd"] = Field(
        "constant",
        description="learning rate after the warm-up; wsd: constant, then linear down to min_lr over the last `decay` steps",
    )
    warmup: int = Field(0, ge=0, description="linear warm-up, optimizer steps")
    decay: int = Field(0, ge=0, description="wsd only: optimizer steps of the decay at the end")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second decay")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    skip_above: float | None = Field(
        None,
        gt=0,
        description="skip an update whose gradient norm is above this (UPT's published code: 80); default: never",
    )
    max_skipped: int = Field(
        3, ge=1, description="updates in a row, skipped as loss or gradient was not finite, that stop the run"
    )


class SFTConfig(Section):
    steps: int = Field(1000, ge=1, description="optimizer steps in all")
    epochs: float | None = Field(None, gt=0, description="passes over the training set, in place of sft.steps")
    batch_size: int = Field(32, ge=1, description="trajectories per optimizer step, over all ranks")
    token_budget: int = Field(
        1024, ge=16, description="tokens of one pack (micro-batch) on one rank; a multiple of parallel.tensor"
    )
    val_every: int = Field(50, ge=1, description="steps between exact validation losses")
    eval_every: int = Field(0, ge=0, description="steps between scores on data.test; 0: never")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; the last step always has one")
    stop_after: Literal["stable", "mild", "never"] = Field(
        "never",
        description="stop when the validation loss has left this regime for good (ceiling.delta, ceiling.delta2)",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)


BuiltIn = Literal["grpo", "dapo_d", "dapo_dc", "luffy", "srft", "upt", "prefix_rft"]


def _algorithm(name: str) -> str:
    if name in get_args(BuiltIn) or plugins.NAME.fullmatch(name):
        return name
    known = ", ".join(repr(known) for known in get_args(BuiltIn))
    own = "module:Class, such as my_algorithms:Mine of my_algorithms.py in the current directory"
    raise PydanticCustomError("algorithm", f"{known} or {own}")


AlgorithmName = Annotated[BuiltIn | str, AfterValidator(_algorithm)]
SYNCHRONISED = (
    "luffy",
    "srft",
    "upt",
    "prefix_rft",
)  # SFT and RL at once: they need an expert's trajectory for every problem


class RLConfig(Section):
    algorithm: AlgorithmName = Field(
        "dapo_dc",
        description="dapo_d: GRPO with dynamic sampling; dapo_dc: and clip-higher; luffy, srft, upt and prefix_rft learn from "
        "experts as well; or a class of your own, module:Class (docs/your_own.md)",
    )
    steps: int = Field(50, ge=1, description="RL steps (one rollout batch each)")
    prompts: int = Field(32, ge=1, description="prompts per step, over all ranks")
    group: int = Field(
        8, ge=2, description="rollouts per prompt; luffy and srft: one fewer, and the expert's trajectory"
    )
    updates: int = Field(
        1, ge=1, description="optimizer updates per step; above 1 the ratio leaves 1 and clipping matters"
    )
    token_budget: int = Field(
        2048, ge=16, description="tokens of one pack (micro-batch) on one rank; a multiple of parallel.tensor"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="lower clip of the ratio: 1 - clip_low")
    clip_high: float = Field(
        0.28, gt=0, description="upper clip of the ratio: 1 + clip_high (dapo_dc; the others: clip_low on both sides)"
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="where the advantage is negative, the ratio counts for no more than this (arXiv 1912.09729); default: none",
    )
    std_normalise: bool | None = Field(
        None,
        description="divide the advantage by the group's standard deviation; default: as in the paper, dapo_dc alone",
    )
    leave_one_out: bool = Field(
        False, description="advantage against the mean of the others of the group (RLOO, arXiv 2402.14740)"
    )
    normaliser: Literal["token", "sequence", "fixed", "published"] = Field(
        "token",
        description="what the sum over tokens is divided by: their number (the paper); each response's length and the number of "
        "responses (GRPO, arXiv 2402.03300); responses x rollout.max_response (Dr. GRPO, arXiv 2503.20783); rollout.max_response alone, "
        "SFT terms by their own tokens (published code of LUFFY, UPT, Prefix-RFT)",
    )
    kl_coef: float = Field(
        0.0, ge=0, description="weight of the KL to the reference, the weights the run starts from; 0 (the paper): none"
    )
    kl_kind: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="its estimator (joschu.net/blog/kl-approx.html); k1 is taken off the reward, k2 and k3 are added to the loss",
    )
    reference_offload: bool = Field(
        False, description="keep the reference in host memory between its passes (GPU only)"
    )
    entropy_coef: float | None = Field(
        None,
        ge=0,
        description="weight of the entropy bonus; default: as in the paper, 0 for dapo_dc, 0.001 for the others",
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="tokens before rollout.max_response over which it is punished, linearly (DAPO, arXiv 2503.14476); 0: none",
    )
    overlong_weight: float = Field(
        1.0, gt=0, description="punishment, off the reward, of a response of rollout.max_response tokens"
    )
    is_correction: Literal["none", "token", "sequence"] | None = Field(
        None,
        description="weigh what was sampled by min(learner's probability / engine's, rl.is_cap), a token's or a whole response's; "
        "default: token in bfloat16, none in float32",
    )
    is_cap: float = Field(2.0, gt=0, description="largest such weight (truncated importance sampling, TIS)")
    upt_gamma: int = Field(
        0,
        ge=0,
        description="upt: rollouts of a prompt that are right, up to which it learns from the expert instead (0; 2 for Llama)",
    )
    upt_sft_coef: float = Field(
        1.0, gt=0, description="upt: weight of the expert's tokens (published code: 1.0; 0.3 for 1.5B parameters)"
    )
    prefix_low_start: float = Field(
        0.95, ge=0, le=1, description="prefix_rft: smallest share of the expert's prefix at the first step"
    )
    prefix_low_end: float = Field(
        0.05, ge=0, le=1, description="prefix_rft: the same at the last step, a cosine between them"
    )
    prefix_high: float = Field(0.95, ge=0, le=1, description="prefix_rft: largest share of the expert's prefix")
    prefix_beta_a: float = Field(
        1.0, gt=0, description="prefix_rft: first parameter of the Beta distribution between the two (1: uniform)"
    )
    prefix_beta_b: float = Field(1.0, gt=0, description="prefix_rft: its second parameter")
    prefix_entropy_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="prefix_rft: share of the prefix's tokens, those of the highest entropy, that are learnt from",
    )
    keep_low: int = Field(1, ge=0, description="dynamic sampling: fewest right rollouts of a prompt that is kept")
    keep_high: int | None = Field(
        None, ge=0, description="dynamic sampling: most right rollouts of such a prompt; default group - 1"
    )
    max_rounds: int = Field(10, ge=1, description="dynamic sampling: most sampling rounds per step")
    round_prompts: int = Field(48, ge=1, description="dynamic sampling: prompts sampled per round")
    truncated: Literal["wrong", "masked"] = Field(
        "wrong", description="responses cut at rollout.max_response: count as wrong, or are judged but not trained on"
    )
    eval_every: int = Field(10, ge=1, description="steps between scores on data.test")
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints; the last step always has one")
    stop_within: float | None = Field(
        None,
        gt=0,
        description="stop when the ceiling is identified and its 90 % interval reaches no further than this from the estimate, "
        "points; default: never",
    )
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(lr=1e-6))


class RolloutConfig(Section):
    tensor: int = Field(1, ge=1, description="tensor parallel size of one engine: 1, or what divides parallel.tensor")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of training rollouts; part of the policy")
    max_prompt: int | None = Field(
        None,
        ge=1,
        description="longest prompt of training and its scores, tokens: the KV cache must hold one with the longest response; "
        "default: what the context leaves",
    )
    max_response: int = Field(48, ge=1, description="longest response, tokens")
    max_sequences: int = Field(256, ge=1, description="sequences an engine decodes at once")
    kv_cache_mb: int = Field(256, ge=16, description="KV cache of an engine on CPU, MB")
    gpu_memory: float = Field(0.4, gt=0, lt=1, description="share of GPU memory an engine may use (GPU only)")
    verify_every: int = Field(
        10, ge=1, description="weight swaps between checks of the engine by log-probs; the first always"
    )
    verify_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest mean difference between the engine's and the learner's log-probs after a weight update, nats "
        "per token; default: 2e-5 in float32, 0.1 in bfloat16",
    )


class RewardConfig(Section):
    verifier: str = Field(
        "strict",
        min_length=1,
        description="strict: the last \\boxed{} by strings, numbers, Math-Verify; lenient: strict, then RETU's "
        "chain (stated answers, same LaTeX, rounded decimals, choices); exact: the same string in the box; choice: a letter A to J; or a "
        "function of your own, module:function, sync or async, (response, answer) -> bool or number in [0, 1]",
    )
    levenshtein: bool = Field(
        False,
        description="last link of the lenient chain: a string more than 0.6 like the answer is right. A hole: 1234567 is paid for "
        "1234568, and a policy learns to look like an answer",
    )
    workers: int = Field(1, ge=1, description="verifier processes per rank")
    timeout: float = Field(5.0, gt=0, description="deadline of one verdict, seconds; later is killed and counted")
    memory_mb: int = Field(
        2048,
        ge=64,
        description="address space a worker may take beyond what its imports mapped, MB; more is counted as memory (Linux)",
    )


class BenchmarkConfig(Section):
    """One benchmark of `pctrain eval`."""

    path: Path = Field(
        description="file, glob or folder of a Hugging Face data set; published layouts are known by their columns"
    )
    samples: int | None = Field(None, ge=1, description="samples per problem; default eval.samples")
    verifier: str | None = Field(
        None, min_length=1, description="verifier of its score; default reward.verifier, of multiple choice `choice`"
    )
    instruction: str | None = Field(
        None, description="text after each problem; default eval.instruction, of multiple choice its own"
    )
    fields: FieldsConfig = Field(default_factory=FieldsConfig, description="columns of a layout that is not known")


def _as_benchmark(value: Any) -> Any:
    """`math500.jsonl` means `{path: math500.jsonl}`."""
    return {"path": value} if isinstance(value, (str, Path)) else value


Benchmark = Annotated[BenchmarkConfig, BeforeValidator(_as_benchmark)]


class EvalConfig(Section):
    temperature: float = Field(0.7, ge=0, description="sampling temperature of evaluation; 0 is greedy")
    top_p: float = Field(
        1.0, gt=0, le=1, description="evaluation samples from the likeliest tokens of this mass alone; 1: from all"
    )
    samples: int = Field(1, ge=1, description="samples per problem; the score is their mean")
    max_response: int | None = Field(
        None,
        ge=1,
        description="longest response, tokens; default rollout.max_response, of `pctrain eval` 8192 or what the context leaves",
    )
    benchmarks: dict[str, Benchmark] = Field(
        {},
        description="`pctrain eval` alone: benchmarks by name, each a path or a mapping, {path: aime24.parquet, samples: 16}",
    )
    instruction: str | None = Field(
        None, description="`pctrain eval` alone: text after each problem, such as: Put your final answer in \\boxed{}."
    )
    judge: str | None = Field(
        None,
        min_length=1,
        description="`pctrain eval` alone: a function of your own, module:function, as for reward.verifier, "
        "that is asked where the two verifiers disagree",
    )


class CeilingConfig(Section):
    delta: float = Field(0.02, gt=0, description="stable band: loss <= (1 + delta) x minimum (PAPER.md 2)")
    delta2: float = Field(0.10, gt=0, description="severe overfit: loss >= (1 + delta2) x minimum")


class StudyConfig(Section):
    """What `pctrain run` runs: SFT on each set, RL from its checkpoints by each algorithm, all of it with each seed. docs/study.md."""

    policy: Literal["recommended", "paper", "compare"] = Field(
        "paper",
        description="recommended: SFT until its stable regime is over, RL from the one checkpoint that the monitor chose; paper: "
        "RL from study.starts; compare: SFT alone, RL alone, RL from the monitor's checkpoint, synchronised methods from the base model",
    )
    sets: dict[str, Sources] = Field(
        {}, description="trajectory sets by name, in place of data.train; each has an SFT run of its own"
    )
    starts: list[Literal["early", "stable", "overfit"]] = Field(
        ["early", "stable", "overfit"], description="policy paper: SFT checkpoints that RL starts from, by their regime"
    )
    checkpoints: list[int] = Field(
        [], description="policy paper: SFT steps that RL starts from, in place of study.starts; 0: without SFT"
    )
    algorithms: list[AlgorithmName] = Field(
        [], description="RL algorithms; default: rl.algorithm, for policy compare all seven"
    )
    seeds: list[int] = Field(
        [], description="a run of everything for each (order of the data, sampling); default: run.seed"
    )


class Config(Section):
    """Everything a run depends on. `pctrain <command> --help` prints it with units and defaults."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    rl: RLConfig = Field(default_factory=RLConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    ceiling: CeilingConfig = Field(default_factory=CeilingConfig)
    study: StudyConfig = Field(default_factory=StudyConfig)

    def longest_response(self) -> int:
        """Tokens: of training and of its scores."""
        return max(self.rollout.max_response, self.eval.max_response or 0)

    def longest_rollout(self, context: int) -> int:
        """Tokens of the longest prompt and response that an engine has to hold, for a model of that context."""
        prompt = self.rollout.max_prompt
        return context if prompt is None else min(context, prompt + self.longest_response())
