"""Reading a study of several sets, algorithms and seeds from its folders."""

from pathlib import Path

import pytest

from pctrain.common.errors import UserError
from pctrain.report.reading import read_study
from pctrain.report.study_data import Study
from pctrain.run import layout
from tests.helpers.study_folders import make_rl, make_sft, make_study, rising

SCORES = {60: 20.0, 150: 45.0, 270: 50.0}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two sets, two seeds; two algorithms from the stable checkpoint of each, and RL without SFT."""
    root = tmp_path_factory.mktemp("wide")
    for seed in (1, 10):
        for place, (name, shift) in enumerate({"easy-1.0": 0.1, "hard": 0.0}.items()):
            make_sft(layout.sft_folder(root, name, seed), SCORES, seed, shift)
            for algorithm in ("grpo", "luffy"):
                folder = layout.rl_folder(root, 150, name, seed, algorithm)
                make_rl(folder, 150, "stable", rising(45.0, 70.0 + place, 4), seed=seed, algorithm=algorithm)
        make_rl(layout.rl_folder(root, 0, "hard", seed, "grpo"), 0, "none", rising(5.0, 60.0, 4), seed=seed)
    return read_study(root)


def test_every_run_knows_its_set_algorithm_and_seed(wide: Study) -> None:
    assert [(run.set, run.seed, run.name) for run in wide.sft[:2]] == [
        ("easy-1.0", 1, "seed-1/sets/easy-1.0/sft"),
        ("hard", 1, "seed-1/sets/hard/sft"),
    ]
    assert [run.seed for run in wide.sft] == [1, 1, 10, 10]  # by number, not by name
    runs = [(run.set, run.algorithm, run.seed, run.start_step) for run in wide.rl]
    of_seed = [
        ("", "grpo", 0),
        *((name, algorithm, 150) for name in ("easy-1.0", "hard") for algorithm in ("grpo", "luffy")),
    ]
    assert runs == [(name, algorithm, seed, step) for seed in (1, 10) for name, algorithm, step in of_seed]


def test_an_rl_run_is_compared_with_the_sft_run_it_started_from(wide: Study) -> None:
    easy, hard = (run for run in wide.rl if (run.algorithm, run.seed) == ("luffy", 10))
    assert [wide.sft_of(run).name for run in (easy, hard)] == ["seed-10/sets/easy-1.0/sft", "seed-10/sets/hard/sft"]
    assert easy.sft_equal.value == pytest.approx(45 + 5 * (300 + 6 * 4 - 300) / 240)
    pure = wide.rl[0]
    assert wide.sft_of(pure) is None and pure.start_regime is None and "none of the sets" in pure.sft_equal.reason


def test_labels_say_what_differs(wide: Study, tmp_path: Path) -> None:
    labels = [run.label for run in wide.rl]
    assert len(set(labels)) == len(labels)
    assert labels[:2] == ["step 0, grpo, seed 1", "easy-1.0 step 150 (stable), grpo, seed 1"]
    plain = read_study(make_study(tmp_path / "plain"))
    assert [run.label for run in plain.rl] == ["step 60 (early)", "step 150 (stable)", "step 270 (overfit)"]


def test_a_plain_study_keeps_its_folders(tmp_path: Path) -> None:
    assert layout.sft_folder(tmp_path) == tmp_path / "sft" and layout.rl_folder(tmp_path, 60) == tmp_path / "rl-step-60"
    study = read_study(make_study(tmp_path / "plain"))
    assert [run.name for run in study.runs] == ["sft", "rl-step-60", "rl-step-150", "rl-step-270"]
    assert study.sft[0].set == "" and study.sft_of(study.rl[0]) is study.sft[0]


def test_the_ledger_of_a_study_is_that_of_all_its_runs(wide: Study) -> None:
    assert wide.ledger()["sft_update"]["device_seconds"] == 4 * 2 * 1.0


SFT = b"kind: sft\nrun: {seed: 1}\nceiling: {delta: 0.1, delta2: 0.2}\n"


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("summary.json", b"{", "not valid JSON"),
        (
            "summary.json",
            b'{"summary": {"trajectories": "x"}, "next_command": ""}',
            "`trajectories` must be a whole number",
        ),
        ("config.yaml", b"\xff", "cannot be read as text"),
        ("config.yaml", SFT.replace(b"1}", b"x}"), "`seed` must be"),
        ("config.yaml", SFT.replace(b"0.1", b".nan"), "`delta` must be a finite number"),
        ("config.yaml", SFT + b"data: {train: [3]}\n", "`data.train` must be a list of sources"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "not valid JSON"),
        ("metrics.jsonl", b'{"kind": "val", "step": 1, "eflops_sft": 1' + b"0" * 400 + b"}\n", "one too large"),
        ("metrics.jsonl", b'{"kind": "\\ud800"}\n', "half of a surrogate pair"),
    ],
)
def test_files_that_no_run_wrote(tmp_path: Path, file: str, content: bytes, words: str) -> None:
    """Fuzzing found these files; each once ended in a traceback."""
    root = make_study(tmp_path / "study")
    (root / "sft" / file).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_study(root)
