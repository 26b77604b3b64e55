#!/usr/bin/env bash
# Everything that one GPU can show, in at most ten minutes: tests/gpu, speed and memory of training
# over sizes, heads and options, baselines, decoding, and where a step's time goes.
#
#   benchmarks/gpu.sh                       on a machine with Python 3.11 or later and torch
#   benchmarks/gpu.sh --only heads memory   some pieces; --minutes N for another limit
#   benchmarks/gpu.sh --device cpu --tiny   tries the script on a CPU
#
# Results: benchmarks/results/gpu-cuda/*.json at once, and tables in benchmarks/README.md at the end. A
# call that was cut off goes on where it was when it is called again. What is missing of Python's
# packages is installed beside the machine's own torch, into .venv-gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
needed="import torch, deepspeed, megatron.core, pydantic, xxhash, pyarrow, tokenizers, transformers, pytest"
if ! lacking=$("$python" -W ignore -c "$needed" 2>&1 >/dev/null); then
  "$python" -c 'import torch' 2>/dev/null ||
    { echo "gpu.sh: $python has no torch; install the build for this GPU, or name an interpreter: PYTHON=..." >&2; exit 1; }
  if [ ! -e .venv-gpu/.installed ]; then
    echo "gpu.sh: installing what is missing into .venv-gpu; torch stays the machine's" \
      "($(tail -n 1 <<<"$lacking"))"
    "$python" -m venv --system-site-packages .venv-gpu
    torch=$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')
    grep -v '^torch==' constraints.txt >.venv-gpu/constraints.txt
    echo "torch==$torch" >>.venv-gpu/constraints.txt
    DS_BUILD_OPS=0 .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
      -c .venv-gpu/constraints.txt -e . pytest pytest-xdist hypothesis ||
      { echo "gpu.sh: the packages could not be installed; install them by hand and call again" >&2; exit 1; }
    touch .venv-gpu/.installed
  fi
  python=.venv-gpu/bin/python
fi
export TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -W ignore -m benchmarks.gpu "$@"
