#!/usr/bin/env bash
# Starts a pctrain command on this node, alone or as one of several, and restarts it from its newest complete checkpoint when a rank fails.
# Run launch/setup.sh first. Call it on every node with the same arguments:
#
#   launch/torchrun.sh sft --config sft.yaml                                              # one node, one rank per GPU
#   NNODES=16 RDZV=node001:29500 RDZV_ID=run7 launch/torchrun.sh rl --config rl.yaml       # on each of sixteen
#
#   NPROC         ranks of this node                                   default: its GPUs, or 1
#   NNODES        nodes; or MIN:MAX, which continues with fewer        default: 1
#   RDZV          host:port of the first node, where all meet          required for more than one node
#   RDZV_ID       the same on all nodes, different for each job        default: pctrain
#   LOCAL_ADDR    address of this node that the others can reach       default: the one its host name resolves to
#   MAX_RESTARTS  restarts after a fault                               default: 3
#   STOP_SECONDS  time to finish a step and save, on SIGTERM           default: 600
#   PCTRAIN_VENV  the environment                                      default: .venv in the checkout
#
# SIGUSR1 to all processes, or SIGTERM to this one: the step under way is finished and saved, exit status 0, "to be continued".
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PCTRAIN_VENV:-$root/.venv}/bin/python"
refuse() { printf 'torchrun.sh: %s\n' "$*" >&2; exit 2; }

[[ $# -gt 0 ]] || refuse "no command given. Example: launch/torchrun.sh sft --config sft.yaml"
[[ -x "$python" ]] || refuse "$python does not exist: run launch/setup.sh, or set PCTRAIN_VENV"
nproc="${NPROC:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}"
[[ "$nproc" -gt 0 ]] || nproc=1
nodes="${NNODES:-1}"

if [[ "$nodes" = 1 ]]; then
  place=(--standalone)
else
  [[ "${RDZV:-}" = *:* ]] || refuse "NNODES=$nodes needs RDZV=host:port of the first node; found RDZV='${RDZV:-}'"
  place=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-pctrain}")
fi
if [[ -n "${LOCAL_ADDR:-}" ]]; then
  place+=(--local-addr "$LOCAL_ADDR")
  # torch recognizes the first node by its host name, which may resolve to another address.
  if [[ "${RDZV:-}" = "$LOCAL_ADDR":* ]]; then place+=(--rdzv-conf is_host=true); fi
fi

# Give every start of the ranks a new store: torch 2.13 keeps the agent's over a restart, where ranks find the addresses of dead ranks and
# wait five minutes for them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
trap '' USR1  # it is meant for the ranks, which handle it; their launcher must survive it
exec "$python" -m torch.distributed.run "${place[@]}" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-3}" \
  --shutdown-timeout "${STOP_SECONDS:-600}" -m pctrain "$@"
