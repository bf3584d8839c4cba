#!/usr/bin/env bash
# Builds the wheel and the sdist into a folder (dist by default) and checks both. Sets everything up.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" release
out="${1:-dist}"
rm -rf "$out" build
python -m build --no-isolation --outdir "$out"
python -m twine check --strict "$out"/*
check-wheel-contents "$out"/*.whl
