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
# packages is installed beside the machine's own torch, into .venv-gpu; PYTHON=... names another
# interpreter. Without a package index, see "Everything on one GPU" in benchmarks/README.md.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-python3}
modules="backports.zstd deepspeed jinja2 markupsafe megatron.core numpy
  orjson psutil pyarrow pydantic pytest rich safetensors tokenizers transformers xxhash yaml"

fail() {
  echo "gpu.sh: $*" >&2
  exit 1
}

# Which modules an interpreter lacks. -P: the folder that this is called from hides none of them.
missing() {
  # shellcheck disable=SC2086
  "$1" -P -c '
import importlib.util, sys
def is_there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(*(name for name in sys.argv[1:] if not is_there(name)))' $modules
}

install() {
  mkdir -p "$root/.venv-gpu" || fail "install $1 for $python by hand, or call from a copy of this folder"
  exec 9>"$root/.venv-gpu/.lock"
  flock 9 # another call may be installing
  [ -e "$root/.venv-gpu/.installed" ] && return
  echo "gpu.sh: installing what $python lacks into .venv-gpu ($1); torch stays the machine's"
  "$python" -m venv --system-site-packages "$root/.venv-gpu"
  # Where $python is of a virtual environment itself, --system-site-packages means those below it.
  "$python" -P -c '
import pathlib, sys, sysconfig
(beside,) = pathlib.Path(sys.argv[1]).glob("lib/python3*/site-packages")
found = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
lines = [f"import site; site.addsitedir({path!r})\n" for path in found]
(beside / "the_machine.pth").write_text("".join(lines))' "$root/.venv-gpu"
  local torch='import torch; print(torch.__version__.partition("+")[0])' version
  version=$("$python" -P -W ignore -c "$torch")
  [ "$version" = "$("$root/.venv-gpu/bin/python" -P -W ignore -c "$torch")" ] ||
    fail "torch of $python is not seen from .venv-gpu; install by hand: $1"
  grep -v '^torch==' "$root/constraints.txt" >"$root/.venv-gpu/constraints.txt"
  echo "torch==$version" >>"$root/.venv-gpu/constraints.txt"
  DS_BUILD_OPS=0 "$root/.venv-gpu/bin/python" -m pip install --quiet --disable-pip-version-check \
    --prefer-binary --retries 2 -c "$root/.venv-gpu/constraints.txt" \
    -e "$root" pytest pytest-xdist hypothesis 9>&- ||
    fail "the packages could not be installed; install by hand and call again: $1"
  touch "$root/.venv-gpu/.installed"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is not Python 3.11 or later; name an interpreter: PYTHON=..."
lacking=$(missing "$python") || fail "$python does not run"
if [ -n "$lacking" ]; then
  why=$("$python" -P -W ignore -c 'import torch' 2>&1) ||
    fail "$python has no torch; install the build for this GPU, or name an interpreter:" \
      "PYTHON=... ($(tail -n 1 <<<"$why"))"
  [ -e "$root/.venv-gpu/.installed" ] || install "$lacking"
  exec 9>&-
  python=$root/.venv-gpu/bin/python
  lacking=$(missing "$python")
  [ -z "$lacking" ] || fail "$python lacks $lacking; install by hand, or remove .venv-gpu and call again"
fi
# They are there; what they need in their turn may not be, and no point could be measured.
why=$("$python" -P -W ignore -c "import torch, $(tr -s ' \n' , <<<"$modules" | sed 's/,$//')" 2>&1 >/dev/null) ||
  fail "$python cannot import all it needs: $(tail -n 1 <<<"$why")"
export TOKENIZERS_PARALLELISM=false PYTHONUTF8=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -W ignore "$root/benchmarks/gpu.py" --spent "$SECONDS" "$@"
