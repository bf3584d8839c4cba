#!/usr/bin/env bash
# Sets everything up, checks style and types, and runs the tests. Further arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test,plot
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
