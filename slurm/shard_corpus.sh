#!/bin/bash
# A corpus to shards as a Slurm job. From the checkout, one of:
#
#   INPUT="raw/web raw/code" OUTPUT=data/corpus TOKENIZER=tokenizer.json sbatch slurm/shard_corpus.sh
#   CONFIG=configs/data/mixture.yaml sbatch slurm/shard_corpus.sh                  # one node, all its cores
#   CONFIG=configs/data/mixture.yaml sbatch --nodes=4 slurm/shard_corpus.sh        # MPI: a rank per core
#   CONFIG=configs/data/mixture.yaml sbatch --array=0-31 slurm/shard_corpus.sh     # tasks that share OUTPUT only
#
# Every way gives the same bytes. An array needs no MPI and starts as soon as any node is free; tasks that die
# or never start are made up for by the others, and the last one commits. OUTPUT must be on a file system that
# all nodes share.
#
# Options before the script are Slurm's and win over the lines below (add --partition, --account, --time);
# arguments after it go to data_prep/shard.py, for example --glob '*.md'. The same command again does what is
# missing. Shortly before the time limit the job queues again and goes on.
#
# Environment:
#   CONFIG          a YAML file with sources and options (configs/data/); or, and over it:
#   INPUT           files and directories, split at blanks; patterns are expanded
#   OUTPUT          folder of the shard set
#   TOKENIZER       a tokenizer.json, train:SIZE or bytes
#   RANKS_PER_NODE  MPI ranks on each node (its CPUs)
#   MPIRUN          launcher of the MPI that mpi4py uses (beside PYTHON, else in PATH)
#   PYTHON          interpreter (the checkout's .venv/bin/python, else python3)
#   HEADWAY_ROOT    the checkout (the folder that sbatch was called in)
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

if [ -z "${CONFIG:-}" ]; then
  for name in INPUT OUTPUT TOKENIZER; do
    if [ -z "${!name:-}" ]; then
      echo "error: $name is not set, nor CONFIG; for example: INPUT=raw OUTPUT=data/corpus TOKENIZER=train:32000 sbatch $0" >&2
      exit 2
    fi
  done
elif [ ! -f "$CONFIG" ]; then
  echo "error: CONFIG=$CONFIG does not exist in $root" >&2
  exit 2
fi
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONUNBUFFERED=1

command=("$python" data_prep/shard.py)
[ -z "${CONFIG:-}" ] || command+=(--config "$CONFIG")
# shellcheck disable=SC2206  # INPUT is a list
[ -z "${INPUT:-}" ] || command+=(--input $INPUT)
[ -z "${OUTPUT:-}" ] || command+=(--output "$OUTPUT")
[ -z "${TOKENIZER:-}" ] || command+=(--tokenizer "$TOKENIZER")
command+=("$@")

if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  mpirun=${MPIRUN:-$(dirname "$python")/mpirun}
  [ -n "${MPIRUN:-}" ] || [ -x "$mpirun" ] || mpirun=mpirun
  if ! command -v "$mpirun" >/dev/null; then
    echo "error: no mpirun for $SLURM_JOB_NUM_NODES nodes; set MPIRUN, pip install mpich, or use sbatch --nodes=1 --array=0-$((SLURM_JOB_NUM_NODES - 1))" >&2
    exit 2
  fi
  ranks=${RANKS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}
  case $("$mpirun" --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *PRRTE*) placement=(--map-by "ppr:$ranks:node:OVERSUBSCRIBE" --bind-to none) ;;
    *) placement=(-n $((ranks * SLURM_JOB_NUM_NODES)) -ppn "$ranks") ;;
  esac
  run_supervised TERM "$mpirun" "${placement[@]}" "${command[@]}"
  # Ended by our TERM, a launcher reports one of several statuses; 1 to 3 are the shard command's own.
  [ "$warned" = 0 ] || [ "$status" -le 3 ] || status=143
else
  run_step --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" "${command[@]}"
fi
finish_job
