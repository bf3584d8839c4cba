#!/usr/bin/env bash
# The tests that take too long for every run. Sets everything up like run_tests.sh.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
exec python -m pytest -m slow "$@"
