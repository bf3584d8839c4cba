#!/usr/bin/env bash
# Sets everything up and trains a small GPT twice on 4 CPU ranks: stock ZeRO-3, then MiCS. Prints a comparison.
# Further arguments go to scripts/ab_gpt.py, for example another JSON, or --steps 100.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" run
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
case "${1:-}" in
    *.json) ;;
    *) set -- scripts/configs/mics_node_fp32.json "$@" ;;
esac
exec python scripts/ab_gpt.py "$@"
