#!/usr/bin/env bash
# MiCS with DeepSpeed's own launcher, which reaches the nodes of a hostfile by ssh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The launcher forwards NCCL_*, PYTHON* and UCX* only. Everything else has to be in .deepspeed_env of the home folder.
cat >"$HOME/.deepspeed_env" <<'VARIABLES'
FI_EFA_USE_HUGE_PAGE=0
VARIABLES

mics-ds doctor ../deepspeed/ds_config.json --hostfile hostfile
exec deepspeed --hostfile hostfile ../deepspeed/train.py --deepspeed_config ../deepspeed/ds_config.json
