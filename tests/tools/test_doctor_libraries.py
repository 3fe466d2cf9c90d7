"""`pctrain doctor`: packages built for another torch, two cuDNNs, and variables that do not fit together.

The packages are stand-ins that a real Python imports.
"""

import shutil
import subprocess
import sys

import pytest
from vllm.device_allocator import alloc_conf

from pctrain.tools.doctor import environment, libraries

UNDEFINED = "transformer_engine_torch.so: undefined symbol: _ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_ib"


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Return a function that installs a package of these files, with metadata, for this process and its children."""

    def install(distribution, version, files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(libraries, "IMPORTS", ())
    return install


def imports():
    return {finding.check: finding for finding in libraries.imports()}


def test_packages_that_are_not_installed_are_not_imported(installed):
    assert imports() == {}


def test_transformer_engine_built_for_another_torch(installed):
    code = f"try:\n    raise ImportError({UNDEFINED!r})\nfinally:\n    pass\n"
    installed(
        "transformer-engine", "2.11.0", {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": code}
    )
    finding = imports()["import transformer_engine.pytorch"]
    assert finding.result == f"ImportError: {UNDEFINED}" and finding.state == "wrong" and not finding.stops
    assert "built for another torch or CUDA" in finding.advice
    assert finding.advice.endswith("--no-deps --force-reinstall transformer-engine-torch==2.11.0")


def test_flash_attn_built_for_another_cuda(installed):
    message = "libcudart.so.12: cannot open shared object file: No such file or directory"
    code = f"import sys\nprint('a line', file=sys.stderr)\nraise ImportError({message!r})\n"
    installed("flash-attn", "2.8.3", {"flash_attn/__init__.py": code})
    finding = imports()["import flash_attn"]
    assert finding.state == "wrong" and finding.advice.endswith("--force-reinstall flash-attn==2.8.3")


def test_a_cudnn_without_its_parts(installed):
    message = "libcudnn_graph.so.9: cannot open shared object file: No such file or directory"
    files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": f"raise OSError({message!r})"}
    installed("transformer-engine", "2.11.0", files)
    finding = imports()["import transformer_engine.pytorch"]
    assert finding.state == "wrong" and "unset CUDNN_PATH and CUDNN_HOME" in finding.advice


def test_packages_are_imported_in_the_environment_of_a_run(installed, monkeypatch):
    """A run chooses the cuDNN and other settings before anything is imported."""
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    installed("flash-attn", "2.8.3", {"flash_attn/__init__.py": "import os\nos.environ['TORCH_CPP_LOG_LEVEL']"})
    assert imports()["import flash_attn"].state == "ok"


def test_a_compiled_module_with_an_undefined_symbol(installed, tmp_path):
    """As above, with the message of the real loader."""
    source = "void missing_symbol(void); void *PyInit_flash_attn(void) { missing_symbol(); return 0; }"
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "flash_attn.so")]
    subprocess.run(command, input=source, text=True, check=True)
    installed("flash-attn", "2.8.3", {})
    finding = imports()["import flash_attn"]
    assert "undefined symbol: missing_symbol" in finding.result and "built for another torch" in finding.advice


def transformer_engine_that_loads(*files):
    """Return the files of a package that maps these files, as a loader does with libraries."""
    code = "import mmap\nfiles, maps = [], []\n" + "".join(
        f"files.append(open({str(file)!r}, 'rb'))\nmaps.append(mmap.mmap(files[-1].fileno(), 0, prot=mmap.PROT_READ))\n"
        for file in files
    )
    return {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": code}


def cudnn(folder):
    folder.mkdir(parents=True)
    for name in ("libcudnn.so.9", "libcudnn_graph.so.9"):
        (folder / name).write_bytes(bytes(4096))
    return [folder / "libcudnn.so.9", folder / "libcudnn_graph.so.9"]


def test_two_cudnns(installed, tmp_path):
    system = cudnn(tmp_path / "usr/lib/x86_64-linux-gnu")
    pip = cudnn(tmp_path / "site-packages/nvidia/cudnn/lib")
    installed("transformer-engine", "2.11.0", transformer_engine_that_loads(*system, *pip))
    finding = imports()["cuDNN"]
    assert finding.state == "wrong"
    assert finding.result == f"2 are loaded: {pip[0].parent}, {system[0].parent}"
    assert finding.advice.endswith(f"Unset CUDNN_HOME, and set CUDNN_PATH={tmp_path}/site-packages/nvidia/cudnn")


def test_one_cudnn(installed, tmp_path):
    files = cudnn(tmp_path / "site-packages/nvidia/cudnn/lib")
    installed("transformer-engine", "2.11.0", transformer_engine_that_loads(*files))
    finding = imports()["cuDNN"]
    assert (finding.result, finding.state) == (str(files[0].parent), "ok")


def test_a_broken_torch_is_reported_before_anything_uses_it(monkeypatch, tmp_path, capsys):
    from pctrain.tools.doctor import command

    code = "raise OSError('libcudnn.so.9: cannot open shared object file')"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(libraries, "IMPORTS", ("torch",))
    monkeypatch.setattr(command, "machine", lambda folder: pytest.fail("it needs torch"))
    assert command.main(tmp_path) == 1
    assert "OSError: libcudnn.so.9: cannot open shared object file" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("variables", "check", "state", "advice"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "allocator", "ok", ""),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "allocator", "note", "use that name"),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "allocator",
            "wrong",
            "set only PYTORCH_CUDA_ALLOC_CONF",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "allocator", "wrong", "leave backend"),
        ({"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE", "note", "unset it"),
        ({"NCCL_DEBUG": "info"}, "NCCL_DEBUG", "note", "unset it"),
    ],
)
def test_variables_on_a_gpu(monkeypatch, variables, check, state, advice):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = {finding.check: finding for finding in environment("gpu")}[check]
    assert finding.state == state and advice in finding.advice
    assert check not in {finding.check for finding in environment("cpu")}


def test_vllm_takes_the_first_name_as_torch_does():
    """The reason why two different settings are wrong: vLLM, like torch, prefers the name that others do not know."""
    both = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert alloc_conf.alloc_conf_from_env(both) == "max_split_size_mb:512"
    assert alloc_conf.expandable_segments_enabled_from_env({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def test_vllm_is_imported_with_its_platform_whose_kernels_are_compiled():
    finding, _ = libraries._check_import("vllm")
    assert finding.state == "ok", finding
    code = f"{libraries.STATEMENTS['vllm']}; import sys; print(current_platform.device_type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.stdout.splitlines()[-1] == "cpu", done.stderr[-2000:]
