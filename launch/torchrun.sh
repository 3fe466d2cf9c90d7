#!/usr/bin/env bash
# Starts a pctrain command on this node, alone or as one of several, and restarts it from its newest complete checkpoint when a rank fails.
# Run launch/setup.sh first. Call it on every node with the same arguments:
#
#   launch/torchrun.sh sft --config sft.yaml                                              # one node, one rank per GPU
#   NNODES=16 RDZV=node001:29500 RDZV_ID=run7 launch/torchrun.sh rl --config rl.yaml       # on each of sixteen
#
#   NPROC         ranks of this node                                   default: its GPUs (those of CUDA_VISIBLE_DEVICES), or 1
#   NNODES        nodes; or MIN:MAX, which continues with fewer        default: 1
#   RDZV          host:port of the first node, where all meet          required for more than one node
#   RDZV_ID       the same on all nodes, different for each job        default: pctrain
#   LOCAL_ADDR    address of this node that the others can reach       default: the one its host name resolves to
#   MAX_RESTARTS  restarts after a fault                               default: 3; 0 for doctor
#   STOP_SECONDS  time to finish a step and save, on SIGTERM           default: 600
#   NUMA_BINDING  node, socket, exclusive or core-complex: keep ranks  default: ranks may run on all CPUs
#                 on the CPUs next to their GPUs
#   PCTRAIN_VENV  the environment, relative to the checkout            default: .venv
#
# SIGUSR1 to all processes, or SIGTERM to this one: the step under way is finished and saved, exit status 0, "to be continued".
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${PCTRAIN_VENV:-.venv}"
[[ "$venv" = /* ]] || venv="$root/$venv"
python="$venv/bin/python"
say() { printf 'torchrun.sh: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }

[[ $# -gt 0 ]] || refuse "no command given. Example: launch/torchrun.sh sft --config sft.yaml"
[[ -x "$python" ]] || refuse "$python does not exist: run launch/setup.sh, or set PCTRAIN_VENV"
torch="$("$python" -c 'from importlib.util import find_spec; print(find_spec("torch").submodule_search_locations[0])' 2>/dev/null)" ||
  refuse "$python has no torch: run launch/setup.sh, or set PCTRAIN_VENV"
knows() { grep -qF "\"$1\"" "$torch/distributed/run.py"; }  # knows OPTION: this torch's torchrun has it

# ---- where the ranks run ----

count_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true  # MIG slices have lines of their own
  fi
}
nproc="${NPROC:-$(count_gpus)}"
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

# ---- how they stop, and what they are bound to ----

ends=(--max-restarts "${MAX_RESTARTS:-$([[ "$1" = doctor ]] && echo 0 || echo 3)}")
if knows --shutdown-timeout; then
  ends+=(--shutdown-timeout "${STOP_SECONDS:-600}")
else
  say "torchrun of this torch has no --shutdown-timeout: after SIGTERM ranks have 30 s to save, not ${STOP_SECONDS:-600} (SIGUSR1 has no limit)"
fi
if [[ -n "${NUMA_BINDING:-}" ]]; then
  knows --numa-binding || refuse "NUMA_BINDING=$NUMA_BINDING: torchrun of this torch has no --numa-binding (2.9 and later have it): unset it"
  place+=(--numa-binding "$NUMA_BINDING")
fi

# ---- the environment (docs/gpu.md, Networks); your own values win, and those of NCCL's configuration files ----

default() {  # default NAME VALUE
  if [[ -z "${!1+set}" ]] && ! grep -qs "^ *$1 *=" /etc/nccl.conf "${NCCL_CONF_FILE:-${HOME:-}/.nccl.conf}"; then export "$1=$2"; fi
}
default CUDA_DEVICE_ORDER PCI_BUS_ID  # GPU 0 is the same one for torch, vLLM and nvidia-smi
default NCCL_DEBUG WARN               # when NCCL fails, it says why; otherwise it is silent
if [[ "$nodes" != 1 ]]; then
  default NCCL_IB_TIMEOUT 22  # InfiniBand waits two minutes for a port that went down, not half a minute
  # Checkpoints and NCCL's bootstrap go over one interface, if NCCL's setting names just one.
  interface="${NCCL_SOCKET_IFNAME:-}"
  interface="${interface#=}"
  if [[ -n "$interface" && -e "/sys/class/net/$interface" ]]; then default GLOO_SOCKET_IFNAME "$interface"; fi
fi
# Give every start of the ranks a new store: torch 2.13 keeps the agent's over a restart, where ranks find the addresses of dead ranks and
# wait five minutes for them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

trap '' USR1  # it is meant for the ranks, which handle it; their launcher must survive it
exec "$python" -m torch.distributed.run "${place[@]}" --nproc-per-node "$nproc" "${ends[@]}" -m pctrain "$@"
