#!/bin/bash
# A corpus to shards as a Slurm job on one node. From the checkout:
#
#   INPUT="raw/web raw/code" OUTPUT=data/corpus TOKENIZER=tokenizer.json sbatch slurm/shard_corpus.sh
#
# Options before the script are Slurm's and win over the lines below (add --partition, --account, --time);
# arguments after it go to data_prep/shard.py, for example --glob '*.md'. The same command again does what is
# missing. Shortly before the time limit the job queues again and goes on.
#
# Environment:
#   INPUT         files and directories, split at blanks; patterns are expanded (required)
#   OUTPUT        folder of the shard set (required)
#   TOKENIZER     a tokenizer.json, train:SIZE or bytes (required)
#   PYTHON        interpreter (the checkout's .venv/bin/python, else python3)
#   HEADWAY_ROOT  the checkout (the folder that sbatch was called in)
#
#SBATCH --job-name=shard
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -euo pipefail

# sbatch runs a copy of this script, so its own path says nothing about the checkout.
root=${HEADWAY_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/data_prep/shard.py" ]; then
  echo "error: $root is not the checkout (no data_prep/shard.py in it); call sbatch there or set HEADWAY_ROOT" >&2
  exit 2
fi
cd "$root"
. slurm/supervise.sh

for name in INPUT OUTPUT TOKENIZER; do
  if [ -z "${!name:-}" ]; then
    echo "error: $name is not set; for example: INPUT=raw OUTPUT=data/corpus TOKENIZER=train:32000 sbatch $0" >&2
    exit 2
  fi
done
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONUNBUFFERED=1

# shellcheck disable=SC2086  # INPUT is a list
run_step --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" \
  "$python" data_prep/shard.py --input $INPUT --output "$OUTPUT" --tokenizer "$TOKENIZER" "$@"
finish_job
