# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in .venv with everything they need.
# Arguments: the extras to install, for example "test".
# A torch that is already there is used; otherwise the small CPU build is installed.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv --system-site-packages .venv
fi
# shellcheck disable=SC1091
. .venv/bin/activate
python -c "import torch" 2>/dev/null || python -m pip install --quiet torch==2.13.0
stamp=".venv/.mics-ds-$(cat pyproject.toml mics_ds/__init__.py | cksum | cut -d' ' -f1)-$1"
if [ ! -e "$stamp" ]; then
    # Offload to NVMe needs libaio. Where it is missing and may not be installed, its tests are skipped.
    if [ ! -e /usr/include/libaio.h ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        quick=(-qq -o Acquire::Retries=0 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10)
        { apt-get "${quick[@]}" update && apt-get "${quick[@]}" install -y --no-install-recommends libaio-dev; } >/dev/null 2>&1 \
            || echo "libaio-dev could not be installed: tests of offload to NVMe will be skipped"
    fi
    python -m pip install --quiet "setuptools>=77" wheel deepspeed==0.19.8
    python -m pip install --quiet --no-build-isolation --editable ".[$1]"
    touch "$stamp"
fi
# DeepSpeed compiles small extensions on first use; two checkouts must not share them.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$root/.cache/torch_extensions}"
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
