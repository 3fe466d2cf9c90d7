#!/usr/bin/env bash
# Runs every static check: ruff (rules and format), mypy, lizard (complexity 15, 60 lines a function) and the length of files (500 lines).
# All checks run, also after one has failed; the exit status is 1 if any did. `launch/lint.sh --fix` lets ruff change the files first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PCTRAIN_VENV:-$PWD/.venv}/bin/python"
PCTRAIN_TEST_EXTRAS="${PCTRAIN_TEST_EXTRAS:-1}" bash launch/setup.sh

failed=()
check() {
  printf 'lint: %s\n' "$*"
  "$@" || failed+=("$*")
}

no_long_files() {
  find pctrain kernels benchmarks launch tests -name '*.py' -exec wc -l {} + |
    awk '$2 != "total" && $1 > 500 { print $2 " has " $1 " lines; the limit is 500"; long = 1 } END { exit long }'
}

if [[ "${1:-}" = --fix ]]; then
  "$python" -m ruff check --fix || true
  "$python" -m ruff format
fi
check "$python" -m ruff check
check "$python" -m ruff format --check
check "$python" -m mypy
check "$python" -m lizard -C 15 -L 60 -w pctrain kernels benchmarks
check no_long_files
if ((${#failed[@]})); then
  printf 'lint: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "lint: no findings"
