#!/usr/bin/env bash
# The core tests on several versions of DeepSpeed. Sets everything up; each version is installed to a folder of its own.
# Arguments: the versions, by default all that mics_ds takes. Prints a matrix at the end.
set -uo pipefail
# shellcheck source=scripts/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test,plot
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(0.19.6 0.19.7 0.19.8)
suites=(parity replicas hops checkpoints)
declare -A chosen=(
    [parity]="(equal_zero3 and fp32) or odd or offload or hierarchical_gather"
    [checkpoints]="kill_9 or another_number"
)
declare -A result
failed=0
for version in "${versions[@]}"; do
    place="$root/.cache/deepspeed/$version"
    if [ ! -d "$place/deepspeed" ]; then
        python -m pip install --quiet --no-deps --no-build-isolation --target "$place" "deepspeed==$version" || exit 1
    fi
    for suite in "${suites[@]}"; do
        echo "== DeepSpeed $version: $suite"
        # Extensions that one version compiled must not be loaded by another.
        MICS_DS_ALLOW_UNTESTED=1 PYTHONPATH="$place${PYTHONPATH:+:$PYTHONPATH}" TORCH_EXTENSIONS_DIR="$root/.cache/torch_extensions_$version" \
            python -m pytest -q "tests/ranks/test_$suite.py" -k "${chosen[$suite]:-}" >"$root/.cache/version_$version-$suite.log" 2>&1
        status=$?
        result["$version-$suite"]=$(tail -n 1 "$root/.cache/version_$version-$suite.log" | tr -d '=' | sed 's/ in .*//; s/, [0-9]* warnings*//')
        [ $status -eq 0 ] || failed=1
        echo "${result["$version-$suite"]}"
    done
done
echo
printf '| DeepSpeed |'; printf ' %s |' "${suites[@]}"; echo
printf '|---|'; printf -- '---|%.0s' "${suites[@]}"; echo
for version in "${versions[@]}"; do
    printf '| %s |' "$version"
    for suite in "${suites[@]}"; do printf ' %s |' "${result["$version-$suite"]}"; done
    echo
done
exit $failed
