#!/usr/bin/env bash
# A tiny run on this machine's CPU, stopped half-way and resumed: bash examples/train_tiny.sh [KEY=VALUE ...]
# It needs the shards of examples/tokenize_corpus.py. Arguments win over the values below; STEPS is the run's length.
set -euo pipefail

python=${PYTHON:-.venv/bin/python}
config=$(dirname "${BASH_SOURCE[0]}")/../configs/quickstart.yaml
steps=${STEPS:-40}

# Any value of the YAML file can be set on the command line. 4 heads share a trunk of 2 layers.
settings=(
  run.name=tiny run.dir=runs/examples/run data.shards=runs/examples/shards data.sequence_length=64
  model.layers=6 model.hidden_size=64 model.ffn_hidden_size=128
  train.device=cpu train.steps=$steps schedule.warmup_steps=$((steps / 8))
  eval.every_steps=$((steps / 2)) eval.samples=8
)

# --resume none: start over; files of an earlier run in the same folder are moved aside.
"$python" -m headway train "$config" --resume none --set "${settings[@]}" train.stop_at_step=$((steps / 2)) "$@"

# Without the stop, the same command resumes from the newest checkpoint, to the bit as if nothing had happened.
"$python" -m headway train "$config" --set "${settings[@]}" "$@"
