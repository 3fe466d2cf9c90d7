"""The benchmarks of the kernels package: the files a run writes, and that a wrong provider gets no time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # half a minute of compilation
    import harness
    import report
    import run_all

    return SimpleNamespace(harness=harness, report=report, run_all=run_all)


@pytest.mark.full
def test_every_operation_leaves_rows_and_a_picture(benchmarks, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    benchmarks.run_all.main(["--device", "cpu", "--shapes", "32,96,8", "--seconds", "0", "--out", str(tmp_path)])

    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())
    [picture] = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert {row["op"] for row in rows} == {*benchmarks.run_all.OPS}
    printed = capsys.readouterr().out
    for row in rows:
        assert (row["tokens"], row["vocab"], row["width"], row["dtype"]) == (32, 96, 8, "float32")
        assert (
            row["machine"] and row["driver"] is None and row["versions"]["torch"] == torch.__version__ and row["date"]
        )
        assert benchmarks.report.line(row) in printed
        if row["status"] == "ok":
            quantiles = [row["quantiles_ms"][q] for q in ("10", "25", "50", "75", "90")]
            assert (
                quantiles[0] > 0 and quantiles == sorted(quantiles) and row["median_ms"] == pytest.approx(quantiles[2])
            )
            assert row["turns"] == benchmarks.harness.LEAST_TURNS
            assert row["of_floor"] == 1 if row["provider"] == "floor" else row["of_floor"] > 0
            linear = row["op"].startswith("linear_")
            assert ("of_fp32_floor" in row) == linear
            assert row["provider"].startswith("floor") or (
                row["peak_bytes"] >= row["result_bytes"] > 0 and max(row["errors"].values()) < 1e-4
            )
        else:
            assert row["status"] in ("absent", "error") and row["reason"] and "median_ms" not in row
    timed = {(row["op"], row["provider"]) for row in rows if row["status"] == "ok"}
    assert timed >= {(op, name) for op in benchmarks.run_all.OPS for name in ("floor", "eager", "pctrain_kernels")}


def without_softmax(results: dict[str, torch.Tensor], target: torch.Tensor) -> None:
    """Compute dW of tokens that are no target: all of it comes from the softmax."""
    others = torch.ones(96, dtype=torch.bool)
    others[target] = False
    results["grad_weight"][others] = 0


@pytest.mark.parametrize(
    "piece, spoil",
    [
        ("loss", lambda results, target: results["loss"].mul_(1.0001)),
        ("grad_hidden", lambda results, target: results["grad_hidden"][0].fill_(torch.nan)),
        ("grad_weight of others", without_softmax),
    ],
)
def test_a_wrong_provider_prints_fail_and_has_no_time(
    benchmarks, tmp_path: Path, capsys: pytest.CaptureFixture, piece, spoil
) -> None:
    right = benchmarks.run_all.OPS["linear_token_loss"]

    def wrong(problem):
        step = right.providers["eager"](problem)

        def spoiled():
            results = step()
            spoil(results, problem.target)
            return results

        return spoiled

    op = dataclasses.replace(right, providers={"floor": right.providers["floor"], "wrong": wrong})
    harness = benchmarks.harness
    setting = harness.Setting(torch.device("cpu"), torch.float32, benchmarks.report.about(torch.device("cpu")))
    floor, row = benchmarks.run_all.run([(op, harness.HeadShape(32, 96, 8))], setting, 0.0, 60.0, tmp_path / "wrong")

    assert floor["status"] == "ok"
    assert row["status"] == "FAIL" and row["reason"] == f"differs from float64 in {piece}"
    assert not row.keys() & {"median_ms", "quantiles_ms", "of_floor", "turns"}
    [line] = [line for line in capsys.readouterr().out.splitlines() if " wrong " in line]
    assert "FAIL" in line and " ms" not in line


def test_a_warm_up_leaves_main_grad_as_it_was(benchmarks) -> None:
    op, harness = benchmarks.run_all.OPS["linear_token_loss"], benchmarks.harness
    problem = op.make(harness.HeadShape(32, 96, 8), torch.device("cpu"), torch.float32)
    step = op.providers["pctrain_kernels, main_grad"](problem)
    harness.warm_up(step)
    results = {name.removeprefix(harness.HELD): result for name, result in step().items()}
    assert max(harness.errors(problem.sample(results), problem.expected()).values()) < 1e-4


def test_after_the_limit_points_are_skipped_by_name(benchmarks, tmp_path: Path) -> None:
    op, harness = benchmarks.run_all.OPS["cross_entropy"], benchmarks.harness
    setting = harness.Setting(torch.device("cpu"), torch.float32, benchmarks.report.about(torch.device("cpu")))
    rows = benchmarks.run_all.run([(op, harness.HeadShape(8, 32, 4))], setting, 0.0, -1.0, tmp_path / "late")
    assert {row["status"] for row in rows} == {"skipped"} and {row["provider"] for row in rows} == op.providers.keys()


def test_the_fp32_floor_writes_full_precision_logits_and_adds_dw(benchmarks, tmp_path: Path) -> None:
    op, harness = benchmarks.run_all.OPS["linear_token_loss"], benchmarks.harness
    shape = harness.HeadShape(32, 96, 8)
    names = (harness.FLOOR, harness.FP32_FLOOR)
    op = dataclasses.replace(op, providers={name: op.providers[name] for name in names})
    setting = harness.Setting(torch.device("cpu"), torch.float32, benchmarks.report.about(torch.device("cpu")))
    floor, full = benchmarks.run_all.run([(op, shape)], setting, 0.0, 60.0, tmp_path / "floors")
    assert floor["of_floor"] == full["of_fp32_floor"] == 1 and "fp32 sum of dW" in floor["floor_is"]
    assert floor["of_fp32_floor"] > 0 and full["ms_by_bytes"] > floor["median_ms"]
    assert full["bytes_beyond_floor"] == 96 * 8 * 4  # fp32 inputs: dW is read as well as written
    bf16 = harness.fp32_bytes(op, shape, torch.bfloat16)
    assert bf16 == 32 * 96 * 2 + 32 * 8 * 2 + 96 * 8 * (4 + 2)

    problem = op.make(shape, torch.device("cpu"), torch.float32)
    mode = _Products()
    with mode:
        op.providers[harness.FP32_FLOOR](problem)()
    logits, grad_hidden, grad_weight = mode.results[-3:]
    assert [tuple(x.shape) for x in (logits, grad_hidden, grad_weight)] == [(32, 96), (32, 8), (96, 8)]
    torch.testing.assert_close(logits, problem.hidden.detach() @ problem.weight.detach().T)
    first = mode.results[2]
    assert first is grad_weight or first.data_ptr() == grad_weight.data_ptr()  # one buffer, added to twice
    assert mode.names[-1] == "addmm_"


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Record the matrix products and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith(("mm", "addmm")):
            self.names.append(name)
            self.results.append(result)
        return result


def test_without_matplotlib_there_are_numbers_and_no_picture(benchmarks, tmp_path, monkeypatch, capsys) -> None:
    op, harness = benchmarks.run_all.OPS["cross_entropy"], benchmarks.harness
    monkeypatch.setattr(benchmarks.run_all.importlib.util, "find_spec", lambda name: None)
    setting = harness.Setting(torch.device("cpu"), torch.float32, benchmarks.report.about(torch.device("cpu")))
    seen = []
    benchmarks.run_all.run([(op, harness.HeadShape(8, 32, 4))], setting, 0.0, -1.0, tmp_path / "late", seen.append)
    assert len(seen[0]) == len(op.providers)
    assert (tmp_path / "late.json").exists() and not (tmp_path / "late.png").exists()
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().out


def test_a_gpu_without_nvidia_smi_has_no_driver_version(benchmarks, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    about = benchmarks.report.about(torch.device("cuda"))
    assert about["machine"] == "NVIDIA H200" and about["driver"] is None
