"""The stages of a study: which there are, in which order jobs take them, and what is refused before writing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pctrain.cli.main import main as cli
from pctrain.common.errors import UserError
from pctrain.config.algorithm import built_in
from pctrain.config.load import load
from pctrain.study.jobs import Crew, lock_file
from pctrain.study.stages import OnDisk, Stage, chosen, stage_config, stages_of

SETS = "--study.sets={easy: easy.jsonl, hard: hard.jsonl}"
DATA = ["--data.validation=v.jsonl", "--data.test=t.jsonl", "--data.rl=r.jsonl"]


def names(*options: str) -> list[str]:
    return [stage.name for stage in stages_of(load(None, list(options)))]


# ---- which stages exist


def test_a_plain_study():
    assert names() == ["sft", "rl-early", "rl-stable", "rl-overfit"]
    assert [stage.needs for stage in stages_of(load(None, []))] == [(), ("sft",), ("sft",), ("sft",)]
    assert names("--study.policy=recommended") == ["sft", "rl-stable"]


def test_sets_starts_algorithms_and_seeds_multiply():
    found = names(
        SETS, *DATA, "--study.starts=[stable, overfit]", "--study.algorithms=[grpo, luffy]", "--study.seeds=[3, 5]"
    )
    assert len(found) == 2 * 2 * (1 + 2 * 2) and found[:5] == [
        "seed-3/easy/sft",
        "seed-3/easy/grpo-stable",
        "seed-3/easy/luffy-stable",
        "seed-3/easy/grpo-overfit",
        "seed-3/easy/luffy-overfit",
    ]


def test_rl_without_sft_is_run_once_for_all_sets():
    found = names(SETS, *DATA, "--study.checkpoints=[0, 200]")
    assert found == ["easy/sft", "rl-base", "easy/rl-step-200", "hard/sft", "hard/rl-step-200"]
    [base] = [
        stage for stage in stages_of(load(None, [SETS, *DATA, "--study.checkpoints=[0, 200]"])) if stage.start == "base"
    ]
    assert base.needs == () and base.folder(Path("s"), 0) == Path("s/rl-step-0")
    assert names("--study.checkpoints=[0]") == ["rl-base"]  # and then no SFT is needed


def test_compare_has_every_way_of_training():
    found = names("--study.policy=compare", "--sft.eval_every=100")
    assert found == [
        "sft",
        "rl-base",
        "grpo-stable",
        "dapo_d-stable",
        "rl-stable",
        *(f"{name}-base" for name in ("luffy", "srft", "upt", "prefix_rft")),
    ]
    assert names(
        "--study.policy=compare", "--study.algorithms=[grpo, srft]", "--rl.algorithm=grpo", "--sft.eval_every=100"
    ) == ["sft", "rl-base", "rl-stable", "srft-base"]


def test_a_growing_plan_finds_its_finished_stages():
    small = stages_of(load(None, [SETS, *DATA, "--study.starts=[stable]", "--run.seed=3"]))
    more = ["--study.starts=[early, stable]", "--study.algorithms=[grpo, dapo_dc]", "--study.seeds=[1, 3]"]
    sets = "--study.sets={easy: easy.jsonl, hard: hard.jsonl, third: third.jsonl}"
    large = {stage.name: stage for stage in stages_of(load(None, [sets, *DATA, *more, "--run.seed=3"]))}
    assert (
        len({stage.folder(Path(), 7 if stage.start == "stable" else 3) for stage in large.values()})
        == len(large)
        == 2 * 3 * 5
    )
    assert all(large[stage.name] == stage for stage in small)


def test_every_algorithm_reads_its_traits_from_its_options():
    from pctrain.rl.algorithms.registry import ALGORITHMS

    assert {name: algorithm.Options for name, algorithm in ALGORITHMS.items()} == built_in()


def test_options_hold_for_every_algorithm_of_a_study(tmp_path):
    options = [
        "--rl.algorithm.is_cap=3",
        "--rl.algorithm.entropy_coef=0.01",
        "--study.algorithms=[srft, {name: upt, gamma: 2}]",
    ]
    config = load(None, [SETS, *DATA, *options, "--study.policy=recommended"]).with_model(tmp_path)
    srft, upt = (
        stage_config(config, stage, tmp_path, 40).rl.algorithm
        for stage in stages_of(config)
        if stage.kind == "rl" and stage.set == "hard"
    )
    assert (srft.name, srft.is_cap, srft.entropy_coef) == ("srft", 3, 0.01)
    assert (upt.name, upt.is_cap, upt.gamma) == ("upt", 3, 2)
    assert not srft.std_normalise  # a default of dapo_dc is not one of its changes


def test_what_a_stage_runs_with(tmp_path):
    options = [f"--run.dir={tmp_path}", "--study.seeds=[3, 5]", "--study.algorithms=[grpo, upt]", "--run.keep_last=1"]
    config = load(None, [SETS, *DATA, *options, "--study.policy=recommended"])
    sft, rl = stages_of(config)[-3:-1]
    own = stage_config(config, sft, tmp_path, 0)
    assert own.run.dir == tmp_path / "seed-5/sets/hard/sft" and own.run.seed == 5 and own.run.keep_last is None
    assert [str(source.path) for source in own.data.train] == ["hard.jsonl"] and own.data.cache == tmp_path / "tokens"
    assert own.sft.stop_after == "stable" and not own.study.sets  # the plan may grow without affecting its runs
    own = stage_config(config, rl, tmp_path, 40)
    assert (
        own.run.dir == tmp_path / "seed-5/sets/hard/rl-grpo-step-40"
        and own.rl.algorithm.name == "grpo"
        and own.run.keep_last == 1
    )
    assert own.model.checkpoint == tmp_path / "seed-5/sets/hard/sft/checkpoints/step-40"


# ---- what is refused


@pytest.mark.parametrize(
    "options, says",
    [
        ([SETS, *DATA, "--data.train=x.jsonl"], "study.sets and data.train are both given"),
        (["--study.sets={../up: easy.jsonl}", *DATA], "'../up' becomes the name of a folder"),
        ([SETS, "--data.validation=v.jsonl"], "study.sets is given without data.rl and data.test"),
        ([SETS, "--data.test=t.jsonl", "--data.rl=r.jsonl"], "study.sets is given without data.validation"),
        (["--study.policy=compare", SETS, "--data.validation=v.jsonl"], "the problems to sample and to score on"),
        (["--study.policy=compare", "--rl.algorithm=luffy"], "makes pure RL with it"),
        (["--study.policy=compare"], "sft.eval_every = 0: SFT would never be scored"),
        (["--study.policy=compare", "--study.starts=[stable]"], "read by study.policy = paper"),
        (["--study.seeds=[1, 1]"], "study.seeds names 1 more than once"),
        (["--study.checkpoints=[150]", "--sft.checkpoint_every=100"], "names step 150, which will have no checkpoint"),
        (["--study.algorithms=[srft]", "--rl.algorithm.kl_coef=0.1"], "is not read by study.algorithms = srft"),
        (["--study.algorithms=[ppo]"], "study.algorithms.0 (command line): expected 'grpo'"),
        (["--study.sets=easy.jsonl"], "study.sets (command line): expected"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(options, says):
    with pytest.raises(UserError) as refused:
        load(None, options)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "options, says",
    [
        ([SETS, *DATA], "data file v.jsonl does not exist"),
        (["--only", "hrad"], "--only hrad names no stage, set or seed of this study; its stages are: sft, rl-early"),
    ],
)
def test_nothing_is_written_where_the_command_refuses(tmp_path, capsys, options, says):
    assert cli(["run", f"--run.dir={tmp_path}/s", *options]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_problems_without_experts_are_refused_before_sft(tmp_path, capsys):
    for name in ("easy", "hard", "v", "t"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1+1=", "response": "2", "answer": "2"}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    files = [option.replace("=", f"={tmp_path}/") for option in DATA]
    sets = f"--study.sets={{easy: {tmp_path}/easy.jsonl, hard: {tmp_path}/hard.jsonl}}"
    assert cli(["run", f"--run.dir={tmp_path}/s", sets, *files, "--study.policy=compare", "--sft.eval_every=100"]) == 2
    errors = capsys.readouterr().err
    assert "r.jsonl:1" in errors and "luffy, prefix_rft, srft, upt learn from an expert's trajectory" in errors
    assert not (tmp_path / "s").exists()


def test_a_dry_run_prints_the_plan_and_its_cost(tmp_path, capsys):
    assert (
        cli(
            [
                "run",
                f"--run.dir={tmp_path}/s",
                "--study.policy=compare",
                "--sft.eval_every=50",
                "--dry-run",
                "--sft.steps=100",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "9 stages, policy compare" in printed
        and "prefix_rft-base" in printed
        and "~" in printed
        and "of training compute left" in printed
    )
    assert not (tmp_path / "s").exists()


def test_only_names_stages_sets_and_seeds():
    stages = stages_of(load(None, [SETS, *DATA, "--study.seeds=[1, 2]", "--study.starts=[stable]"]))
    assert [stage.name for stage in chosen(stages, ["seed-2", "seed-1/hard/sft"])] == [
        "seed-1/hard/sft",
        "seed-2/easy/sft",
        "seed-2/easy/rl-stable",
        "seed-2/hard/sft",
        "seed-2/hard/rl-stable",
    ]
    assert chosen(stages, []) == stages


# ---- several jobs


STAGES = [
    Stage("a/sft", "sft", "a", 0),
    Stage("a/rl", "rl", "a", 0, ("a/sft",)),
    Stage("b/sft", "sft", "b", 0),
    Stage("b/rl", "rl", "b", 0, ("b/sft",)),
    Stage("rl-base", "rl", "", 0),
]


class Folder:
    """Fake study whose stages complete by touching a file."""

    def __init__(self, root: Path):
        self.root, self.left_out = root, set()

    def file(self, stage: Stage) -> Path:
        return self.root / f"{stage.name.replace('/', '-')}.done"

    def ended(self, stage: Stage):
        return "left out" if stage.name in self.left_out else "done" if self.file(stage).exists() else "to do"

    def crew(self, mine=STAGES, say=lambda line: None) -> Crew:
        return Crew(self.root, STAGES, mine, self.ended, say)


def take(crew: Crew) -> str | None:
    """Return the next stage of a job that need not wait."""
    assert list(crew.take()) == []
    return crew.claim and crew.claim.stage.name


def work(crew: Crew, folder: Folder) -> list[str]:
    """Return every stage that one job runs."""
    done = []
    while True:
        for _ in crew.take():
            pass
        if crew.claim is None:
            return done
        done.append(crew.claim.stage.name)
        folder.file(crew.claim.stage).touch()
        crew.done()


def test_one_job_runs_everything_in_order(tmp_path):
    folder = Folder(tmp_path)
    assert work(folder.crew(), folder) == [stage.name for stage in STAGES]
    assert folder.crew().all_ended and work(folder.crew(), folder) == []


def test_a_finished_stage_is_not_run_again(tmp_path):
    folder = Folder(tmp_path)
    folder.file(STAGES[0]).touch()
    folder.left_out = {"a/rl"}
    assert work(folder.crew(), folder) == ["b/sft", "b/rl", "rl-base"]


def test_a_stage_that_another_job_holds_is_left_and_the_next_free_one_taken(tmp_path):
    folder = Folder(tmp_path)
    one, other = folder.crew(), folder.crew()
    assert (take(one), take(other)) == ("a/sft", "b/sft")
    assert other.state(STAGES[0]) == ("running", f"process {os.getpid()} on {os.uname().nodename}")
    folder.file(STAGES[2]).touch()
    other.done()
    assert take(other) == "b/rl"
    third = folder.crew()
    assert take(third) == "rl-base"
    folder.file(STAGES[0]).touch()
    one.done()
    assert take(one) == "a/rl"  # no job runs a stage that another holds


def test_a_job_waits_for_what_it_needs_and_says_for_whom(tmp_path, monkeypatch):
    monkeypatch.setattr("pctrain.study.jobs.POLL", 0.0)
    folder, said = Folder(tmp_path), []
    one, other = folder.crew(STAGES[:2]), folder.crew(STAGES[:2], said.append)
    assert take(one) == "a/sft"
    waiting = iter(other.take())
    for _ in range(3):
        next(waiting)
    assert said == [f"waiting for a/sft (process {os.getpid()} on {os.uname().nodename})"]
    folder.file(STAGES[0]).touch()
    one.done()
    assert list(waiting) == [] and other.claim.stage.name == "a/rl"


def test_a_job_that_has_nothing_to_wait_for_ends(tmp_path):
    folder = Folder(tmp_path)
    assert take(folder.crew(STAGES[1:2])) is None  # --only leaves its SFT out, so no job runs it
    one, other = folder.crew(STAGES[4:]), folder.crew(STAGES[4:])
    assert (take(one), take(other)) == ("rl-base", None)


def test_a_stage_that_ends_between_two_checks_is_not_missed(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    crew = folder.crew(STAGES[1:2])
    monkeypatch.setattr(crew, "_worth_waiting", lambda: folder.file(STAGES[0]).touch())
    assert take(crew) == "a/rl"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{repository!r}]
from tests.study.test_study_plan import Folder, STAGES
folder = Folder(Path({root!r}))
crew = folder.crew()
for stage in range({whole}):
    list(crew.take()); folder.file(crew.claim.stage).touch(); crew.done()
list(crew.take())
print(crew.claim.stage.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("whole", [0, 2])
def test_a_killed_job_leaves_its_stage_free(tmp_path, whole):
    """Run a job that dies within a stage, after `whole` others."""
    script = KILLED.format(repository=str(Path(__file__).parents[2]), root=str(tmp_path), whole=whole)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL and done.stdout.strip() == STAGES[whole].name, done.stderr
    assert lock_file(tmp_path, STAGES[whole].name).exists()
    folder = Folder(tmp_path)
    assert work(folder.crew(), folder) == [stage.name for stage in STAGES[whole:]]


def test_the_folder_shows_the_state_of_a_stage(tmp_path):
    config = load(None, [f"--run.dir={tmp_path}", "--study.checkpoints=[0, 100, 300]", "--sft.steps=300"])
    sft, base, early, late = stages_of(config)
    disk = OnDisk(config, tmp_path)
    assert [disk.ended(stage) for stage in (sft, base, early)] == ["to do"] * 3 and disk.folder(early) is None
    (tmp_path / "sft" / "checkpoints" / "step-100").mkdir(parents=True)
    (tmp_path / "sft" / "checkpoints" / "step-100" / "manifest.json").write_text("{}")
    (tmp_path / "sft" / "summary.json").write_text("{}")
    assert disk.ended(sft) == "done" and disk.folder(early) == tmp_path / "rl-step-100" and disk.ended(early) == "to do"
    assert disk.ended(late) == "left out"
    (tmp_path / "rl-step-0").mkdir()
    (tmp_path / "rl-step-0" / "summary.json").write_text("{}")
    assert disk.ended(base) == "done"
