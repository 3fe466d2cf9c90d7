#!/usr/bin/env bash
# Sets up and runs the tests: the fast tier by default; `--full` adds the tests marked `full`. `--avx2` runs them as on an x86 CPU with AVX2
# and without AVX-512, where torch and vLLM take other code paths. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${PCTRAIN_VENV:-$PWD/.venv}"
PCTRAIN_TEST_EXTRAS="${PCTRAIN_TEST_EXTRAS:-1}" bash launch/setup.sh

tier=(-m "not full")
arguments=()
for argument in "$@"; do
  case "$argument" in
    --full) tier=() ;;
    --avx2) export PYTHONPATH="$PWD/tests/avx2${PYTHONPATH:+:$PYTHONPATH}" ;;
    *) arguments+=("$argument") ;;
  esac
done

# One thread per process: on two cores, two processes with two threads each are ten times slower than with one. Two test processes, each with
# one file at a time, because most tests keep one core busy.
export OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1
exec "$venv/bin/python" -m pytest --numprocesses=2 --dist=loadfile --timeout=300 --durations=10 "${tier[@]}" "${arguments[@]}"
