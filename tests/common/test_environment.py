"""The environment for GPUs: Transformer Engine gets the cuDNN of torch's wheel."""

import ctypes
import importlib.util
import os
import sysconfig

import pytest

from pctrain.common import environment

NAMES = ("libcudnn.so.9", "libcudnn_adv.so.9", "libcudnn_graph.so.9", "libcudnn_ops.so.9")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend a GPU, Transformer Engine and a wheel of cuDNN; return (its folder, the libraries that are loaded)."""
    folder = tmp_path / "nvidia" / "cudnn"
    (folder / "lib").mkdir(parents=True)
    for name in NAMES:
        (folder / "lib" / name).touch()
    loaded = []
    monkeypatch.setattr(environment, "_has_gpu", lambda: True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "transformer_engine" or None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: loaded.append((path, mode)))
    monkeypatch.setattr(os, "environ", {})
    return folder, loaded


def test_transformer_engine_gets_the_cudnn_of_torchs_wheel(machine):
    folder, loaded = machine
    order = ("libcudnn_graph.so.9", "libcudnn_ops.so.9", "libcudnn.so.9", "libcudnn_adv.so.9")  # what others need first
    for _ in ("a process", "its child, which inherits the variable"):
        loaded.clear()
        environment.set_environment()
        assert os.environ["CUDNN_PATH"] == str(folder)
        assert loaded == [(str(folder / "lib" / name), ctypes.RTLD_GLOBAL) for name in order]


@pytest.mark.parametrize("name", ["CUDNN_HOME", "CUDNN_PATH"])
def test_a_folder_that_the_user_names_is_left_alone(machine, monkeypatch, name):
    monkeypatch.setenv(name, "/own")
    environment.set_environment()
    assert not machine[1] and os.environ[name] == "/own"
    assert name == "CUDNN_PATH" or "CUDNN_PATH" not in os.environ


@pytest.mark.parametrize("absent", ["transformer engine", "cudnn", "gpu"])
def test_nothing_is_loaded_where_it_is_not_needed(machine, monkeypatch, absent):
    folder, loaded = machine
    if absent == "transformer engine":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif absent == "cudnn":
        for path in (folder / "lib").iterdir():
            path.unlink()
    else:
        monkeypatch.setattr(environment, "_has_gpu", lambda: False)
    environment.set_environment()
    assert not loaded and "CUDNN_PATH" not in os.environ
