#!/usr/bin/env bash
# Sets up and runs the whole study on this machine: SFT, RL from several checkpoints, ceilings, report.
# A second call continues where the first stopped. Options such as --sft.steps=200 are passed on to `pctrain run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${PCTRAIN_VENV:-$PWD/.venv}"
config=configs/quickstart.yaml
bash launch/setup.sh

# Two ranks with one thread each if there are two cores; on GPUs at most one rank per GPU.
units=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)  # nproc obeys both
if [[ "$(head -n 1 "$venv/.pctrain-setup")" = "device gpu" ]]; then
  units="$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())')"  # the visible ones; of MIG slices one
fi
ranks=$((units >= 2 ? 2 : 1))

# The ranks use the loopback interface, whatever the host's name resolves to.
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
"$venv/bin/python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$ranks" \
  -m pctrain run --config "$config" "$@"

report="$("$venv/bin/python" - "$config" "$@" <<'PYTHON'
import sys

import yaml

folder = (yaml.safe_load(open(sys.argv[1])).get("run") or {}).get("dir", "runs/default")
for argument in sys.argv[2:]:
    if argument.startswith("--run.dir="):
        folder = argument.removeprefix("--run.dir=")
print(f"{folder}/report/report.html")
PYTHON
)"
if [[ -f "$report" ]]; then printf '\nThe report: %s\n' "$(realpath "$report")"; fi
