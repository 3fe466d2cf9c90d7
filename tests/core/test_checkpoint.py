"""A resumed run equals an uninterrupted one: bit for bit at the same layout, within rounding at another."""

import numpy as np
import pytest

from pctrain.core.megatron_version import HAS_COMMON_FILE
from tests.helpers import small

STEPS = 6


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2, "virtual_pipeline": 2}), (2, {})],
    ids=["single", "TP2", "PP2 with virtual stages", "DP2"],
)
def test_same_layout_bit_for_bit(ranks, hf_dirs, tmp_path, world, layout):
    uninterrupted = ranks.run(small.save_and_continue, hf_dirs[True], layout, tmp_path / "step-6", STEPS, world=world)
    resumed = ranks.run(small.load_and_continue, hf_dirs[True], layout, tmp_path / "step-6", STEPS, world=world)
    for a, b in zip(uninterrupted, resumed, strict=True):
        assert a[:3] == b[:3]
        assert all(np.array_equal(a[3][name], b[3][name]) for name in a[3])


def _train_from(directory, folder, adam, action):
    """Train after a save to `folder` or a load from it, with the Adam of torch or of Transformer Engine."""
    from contextlib import nullcontext

    from tests.helpers import fused_adam

    with fused_adam.in_place_of_torchs() if adam == "te" else nullcontext():
        model = small.learner(directory, {})
        if action == "save":
            folder.mkdir()
            model.save(folder)
        elif action == "load":
            model.load(folder)
        result = small.train_on(model, 3)
        if action == "train and save":
            folder.mkdir()
            model.save(folder)
            return small.train_on(model, 3)
        return result


@pytest.mark.parametrize("adam", ["torch", "te"])
def test_a_run_that_has_not_stepped_yet_is_saved_too(ranks, hf_dirs, tmp_path, adam):
    """RL whose dynamic sampling has kept no prompt so far."""
    plain, saved, loaded = (
        ranks.run(_train_from, hf_dirs[True], tmp_path / "step-0", adam, action, world=1)[0]
        for action in ("nothing", "save", "load")
    )
    for other in (saved, loaded):
        assert other[:3] == plain[:3] and all(np.array_equal(other[3][name], plain[3][name]) for name in plain[3])


def test_transformer_engines_adam_resumes_bit_for_bit(ranks, hf_dirs, tmp_path):
    saved, loaded = (
        ranks.run(_train_from, hf_dirs[True], tmp_path / "step-3", "te", action, world=1)[0]
        for action in ("train and save", "load")
    )
    assert loaded[:2] == saved[:2] and all(np.array_equal(loaded[3][name], saved[3][name]) for name in saved[3])


def _optimizer_bytes_of_a_save(directory, layout):
    """Return the bytes of optimizer state that this rank holds for a save, and of its parameters in float32."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from pctrain.core import checkpoint

    model = small.learner(directory, layout)
    state = checkpoint._sharded_state(model.chunks, model.optimizer, is_loading=False)
    apply_factories(state)
    tensors = [value.data for value in nested_values(state["optimizer"]) if isinstance(value, ShardedTensor)]
    return sum(tensor.nbytes for tensor in tensors), 4 * sum(p.numel() for m in model.modules for p in m.parameters())


def test_one_rank_of_a_data_parallel_group_holds_the_optimizer(ranks, hf_dirs):
    """It has the float32 weights and two moments; the others would each need as much host memory."""
    (first, parameters), (second, _) = ranks.run(_optimizer_bytes_of_a_save, hf_dirs[True], {}, world=2)
    assert first == 3 * parameters and second == 0
    for held, parameters in ranks.run(_optimizer_bytes_of_a_save, hf_dirs[True], {"tensor": 2}, world=2):
        assert held == 3 * parameters


def _optimizer_bytes_of_a_load(directory, folder):
    """Return the bytes of memory behind the optimizer state that a load reads, and of the parameters in float32."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from pctrain.core import checkpoint

    model = small.learner(directory, {})
    folder.mkdir()
    model.save(folder)
    state = checkpoint._sharded_state_to_read(folder, model.chunks, model.optimizer)
    loaded = checkpoint._load(folder, state, model.chunks)
    storages = [v.untyped_storage() for v in nested_values(loaded["optimizer"]["param_state"]) if torch.is_tensor(v)]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(held.values()), 4 * sum(p.numel() for m in model.modules for p in m.parameters())


def test_a_load_holds_the_optimizer_once(ranks, hf_dirs, tmp_path):
    """megatron-core reads the halves of a SwiGLU's first matrix into views, and would join them into a copy."""
    [(held, parameters)] = ranks.run(_optimizer_bytes_of_a_load, hf_dirs[True], tmp_path / "step-0", world=1)
    assert 3 * parameters <= held <= 3.1 * parameters


@pytest.mark.parametrize(
    "world, layout",
    [
        pytest.param(1, {}, marks=pytest.mark.full, id="single"),
        pytest.param(2, {"pipeline": 2}, marks=pytest.mark.full, id="PP2"),
        pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, id="PP2 with virtual stages"),
        pytest.param(2, {"pipeline": 2, "first_stage_layers": 1}, marks=pytest.mark.full, id="PP2 of 1 and 3 layers"),
        pytest.param(2, {}, marks=pytest.mark.full, id="DP2"),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, id="TP2 x PP2"),
    ],
)
def test_another_layout(ranks, hf_dirs, tmp_path, world, layout):
    uninterrupted = ranks.run(
        small.save_and_continue, hf_dirs[True], {"tensor": 2}, tmp_path / "step-6", STEPS, world=2
    )[0]
    resumed = ranks.run(small.load_and_continue, hf_dirs[True], layout, tmp_path / "step-6", STEPS, world=world)[0]
    np.testing.assert_allclose(resumed[0], uninterrupted[0], rtol=1e-5)  # fp32 sums in another order
    np.testing.assert_allclose(resumed[1], uninterrupted[1], rtol=1e-4)
    assert resumed[2] == uninterrupted[2]


def _weights_from(directory, folder):
    return {n: t.numpy().copy() for n, t in small.learner(directory, {}, checkpoint=folder, train=False).hf_weights()}


def test_another_run_can_start_from_the_weights(ranks, hf_dirs, tmp_path):
    saved = tmp_path / "step-6"
    ranks.run(small.save_and_continue, hf_dirs[True], {}, saved, STEPS, world=1)
    started = ranks.run(_weights_from, hf_dirs[True], saved, world=1)[0]
    initial = ranks.run(_weights_from, hf_dirs[True], None, world=1)[0]
    assert any(not np.array_equal(started[name], initial[name]) for name in started)


def test_a_folder_that_is_no_checkpoint_is_refused(ranks, hf_dirs, tmp_path):
    from tests.helpers.ranks import RanksFailed

    with pytest.raises(RanksFailed, match="not a pctrain checkpoint"):
        ranks.run(_weights_from, hf_dirs[True], tmp_path, world=1)


def _save_in_the_background(directory, folder):
    """A GPU's way of saving, on the CPU: training continues while the checkpoint is written."""
    from pctrain.core import checkpoint
    from pctrain.distributed import parallel

    model = small.learner(directory, {})
    model.saver = checkpoint.Saver(background=True)
    events = []
    for i in range(STEPS):
        small.step(model, i)
    for number in (1, 2):
        if parallel.rank() == 0:
            folder.with_name(f"save-{number}").mkdir()
        parallel.barrier()
    model.save(folder.with_name("save-1"), done=lambda: events.append("save-1"))
    assert events == [], "done before anybody looked"
    after = small.train_on(model, STEPS)  # changes the tensors in place while they are being written
    model.save(folder.with_name("save-2"), done=lambda: events.append("save-2"))
    assert events == ["save-1"], "the next save begins when the one before is complete"
    model.poll_save(wait=True)
    assert events == ["save-1", "save-2"]
    model.poll_save(wait=True)
    assert events == ["save-1", "save-2"]
    return after


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_in_the_background_holds_the_moment_of_the_save(ranks, hf_dirs, tmp_path, world):
    uninterrupted = ranks.run(_save_in_the_background, hf_dirs[True], tmp_path / "save-1", world=world)[0]
    resumed = ranks.run(small.load_and_continue, hf_dirs[True], {}, tmp_path / "save-1", STEPS, world=world)[0]
    assert resumed[:3] == uninterrupted[:3]
    assert all(np.array_equal(resumed[3][name], uninterrupted[3][name]) for name in resumed[3])


def _load_foreign(directory, folder, part):
    """A checkpoint in which `part` is a pickle that runs a command."""
    import pickle

    import torch

    from pctrain.common.errors import UserError

    model = small.learner(directory, {})
    small.step(model, 0)
    folder.mkdir()
    model.save(folder)
    marker = folder / "it-ran"

    class Runs:
        def __reduce__(self):
            import os

            return os.mkdir, (str(marker),)

    if part == "common.pt":
        torch.save({"model": Runs()}, folder / part)
    else:
        (folder / part).write_bytes(pickle.dumps(Runs()))
    try:
        model.load(folder)
    except UserError as error:
        return str(error), marker.exists()
    return "loaded", marker.exists()


@pytest.mark.parametrize("part", ["common.pt", ".metadata"])
def test_a_checkpoint_cannot_run_a_command(ranks, hf_dirs, tmp_path, part):
    [(message, ran)] = ranks.run(_load_foreign, hf_dirs[True], tmp_path / "step-1", part, world=1)
    assert "mkdir" in message and not ran


def _load_spoilt(directory, folder):
    """Return the message that refuses a checkpoint for each of its parts, spoilt in turn; None if it was loaded."""
    from pctrain.common.errors import UserError

    model = small.learner(directory, {})
    small.step(model, 0)
    folder.mkdir()
    model.save(folder)
    parts = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".sha256.json")}
    said = {}
    for name, data in parts.items():
        for how, spoilt in {
            "empty": b"",
            "cut": data[: len(data) // 2],
            "foreign": b"[3]",
            "zeros": bytes(len(data)),
        }.items():
            (folder / name).write_bytes(spoilt)
            try:
                model.load(folder)
                said[name, how] = None
            except UserError as error:
                said[name, how] = str(error)
            (folder / name).write_bytes(data)
    model.load(folder)
    return said


def test_a_part_that_cannot_be_read_is_reported(ranks, hf_dirs, tmp_path):
    """Found by fuzzing: each way ended in another exception of pickle, torch or megatron-core."""
    [said] = ranks.run(_load_spoilt, hf_dirs[True], tmp_path / "step-1", world=1)
    names = {name for name, _ in said}
    assert names >= {".metadata", "metadata.json", *["common.pt"] * HAS_COMMON_FILE}
    assert any(name.endswith(".distcp") for name in names)
    for (name, how), message in said.items():
        assert message and str(tmp_path / "step-1") in message, (name, how, message)
