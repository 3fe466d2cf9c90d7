"""`pctrain run` with fake stages: what it runs with which config, in which order, and how it resumes after a kill."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from pctrain.config.load import load
from tests.helpers.study_folders import make_rl, make_sft, rising

SETS = ("easy", "hard")


class Pretended:
    """Replaces the engines: it writes run folders as files, and records its calls."""

    def __init__(self, monkeypatch, root: Path):
        from pctrain.study import command as study

        self.report = study.report.main
        self.study, self.root, self.calls, self.dies_at = study, root, [], None
        monkeypatch.setattr(study.sft, "train", self.sft)
        monkeypatch.setattr(study.rl, "train", self.rl)
        monkeypatch.setattr(study.report, "main", lambda folder: (folder / "report").mkdir(exist_ok=True))
        monkeypatch.setattr(study, "begin", contextlib.nullcontext)
        monkeypatch.setattr(study, "RolloutWorker", lambda config: contextlib.nullcontext())

    def sft(self, config, worker):
        self._called(config)
        make_sft(config.run.dir, {60: 20.0, 270: 50.0}, config.run.seed, 0.1 if "easy" in str(config.run.dir) else 0.0)
        for step in range(30, 271, 30):
            (config.run.dir / "checkpoints" / f"step-{step}").mkdir(parents=True)
            (config.run.dir / "checkpoints" / f"step-{step}" / "manifest.json").write_text("{}")
        self._finish(config, 100 if "easy" in str(config.run.dir) else 105)

    def rl(self, config, worker, role):
        self._called(config)
        start = int(config.run.dir.name.rpartition("-")[2])
        assert config.model.checkpoint == (
            config.run.dir.parent / "sft" / "checkpoints" / f"step-{start}" if start else None
        )
        make_rl(
            config.run.dir,
            start,
            role,
            rising(30.0, 70.0 if "hard" in str(config.run.dir) else 60.0, 4),
            seed=config.run.seed,
            algorithm=config.rl.algorithm.name,
        )
        self._finish(config, None)

    def _called(self, config):
        name = str(config.run.dir.relative_to(self.root))
        self.calls.append(name)
        if name == self.dies_at:
            raise KeyboardInterrupt

    @staticmethod
    def _finish(config, trajectories):
        (config.run.dir / "summary.json").write_text(
            json.dumps({"summary": {"trajectories": trajectories}, "next_command": ""})
        )

    def run(self, *options, **more):
        self.calls.clear()
        for name in (*SETS, "v", "t", "r"):
            (self.root.parent / f"{name}.jsonl").write_text('{"prompt": "1+1=", "response": "2", "answer": "2"}\n')
        at = self.root.parent
        files = [f"--data.{name}={at}/{name[0]}.jsonl" for name in ("validation", "test", "rl")]
        sets = json.dumps({name: f"{at}/{name}.jsonl" for name in SETS})
        self.study.main(load(None, [f"--run.dir={self.root}", f"--study.sets={sets}", *files, *options]), **more)


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    return Pretended(monkeypatch, tmp_path / "study")


PLAN = ["--study.starts=[stable, overfit]", "--study.seeds=[0, 4]"]
OF_SEED = [f"sets/{name}/{run}" for name in SETS for run in ("sft", "rl-step-150", "rl-step-270")]
EVERY = OF_SEED + [f"seed-4/{run}" for run in OF_SEED]


def test_a_study_runs_its_plan_and_answers(pretended, capsys):
    pretended.study.report.main = pretended.report  # the real one
    pretended.run(*PLAN)
    assert pretended.calls == EVERY
    printed = " ".join(capsys.readouterr().out.split())
    assert "12 stages, policy paper" in printed and "about 0 FLOPs of training compute left" not in printed
    best_set = "hard: it has the lowest minimum validation loss (hard 0.500, easy 0.600 nats per token)."
    assert f"Which set first? {best_set}" in printed
    assert "Is more data, or harder data, worth more?" in printed
    assert "Highest last scores: " in printed and "hard (105 trajectories) 4" in printed
    study = json.loads((pretended.root / "report" / "study.json").read_text())
    assert [(run["set"], run["seed"], run["start_step"], run["role"]) for run in study["rl"]] == [
        (name, seed, step, role)
        for seed in (0, 4)
        for name in SETS
        for step, role in ((150, "stable"), (270, "overfit"))
    ]

    pretended.study.report.main = lambda folder: None
    pretended.run(*PLAN)
    assert pretended.calls == [] and "about 0 FLOPs of training compute left" in capsys.readouterr().out


def test_epochs_are_counted_by_a_dry_run_alone(pretended, capsys):
    pretended.run("--study.starts=[stable]", "--sft.epochs=3", dry_run=True)
    assert (
        "3 epochs" in (printed := capsys.readouterr().out)
        and "see --dry-run" not in printed
        and not pretended.root.exists()
    )
    pretended.run("--study.starts=[stable]", "--sft.epochs=3")
    assert "see --dry-run" in capsys.readouterr().out


def test_a_study_resumes_between_its_stages(pretended, capsys):
    pretended.dies_at = "sets/hard/rl-step-150"
    with pytest.raises(KeyboardInterrupt):
        pretended.run(*PLAN)
    assert pretended.calls == EVERY[:5] and not (pretended.root / "report").exists()
    pretended.dies_at = None
    pretended.run(*PLAN)
    assert pretended.calls == EVERY[4:] and (pretended.root / "report").exists()


def test_a_plan_grows(pretended):
    pretended.run("--study.policy=recommended", only=["easy"])
    assert pretended.calls == ["sets/easy/sft", "sets/easy/rl-step-150"] and not (pretended.root / "report").exists()
    pretended.run(
        "--study.policy=recommended",
        "--study.algorithms=[dapo_dc, grpo]",
        "--study.seeds=[0, 4]",
        only=["easy", "seed-4"],
    )
    assert pretended.calls == [
        "sets/easy/rl-grpo-step-150",
        *(f"seed-4/sets/{name}/{run}" for name in SETS for run in ("sft", "rl-step-150", "rl-grpo-step-150")),
    ]


def test_a_start_that_did_not_occur_is_left_out_and_reported(pretended, capsys, monkeypatch):
    """Every validation before the minimum is within the band, so there is no early start."""
    from tests.helpers import study_folders

    monkeypatch.setattr(study_folders, "LOSSES", [(0, 0.504), (30, 0.503), (150, 0.5), (270, 0.7)])
    pretended.run("--study.starts=[early, stable]")
    assert pretended.calls == ["sets/easy/sft", "sets/easy/rl-step-150", "sets/hard/sft", "sets/hard/rl-step-150"]
    assert "easy/rl-early: left out, because no checkpoint of" in capsys.readouterr().out


def test_a_study_without_any_start_is_an_error(pretended, monkeypatch):
    from pctrain.common.errors import UserError
    from tests.helpers import study_folders

    monkeypatch.setattr(study_folders, "LOSSES", [(0, 0.504), (30, 0.503), (150, 0.5), (270, 0.7)])
    with pytest.raises(UserError, match=r"no RL was run; raise sft\.steps"):
        pretended.run("--study.starts=[early]")
