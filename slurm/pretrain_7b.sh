#!/bin/bash
# Pretraining as a Slurm job, on any number of nodes. From the checkout:
#
#   sbatch slurm/pretrain_7b.sh                                        # configs/7b.yaml on 8 nodes
#   sbatch --nodes=32 --time=24:00:00 slurm/pretrain_7b.sh --set batch.accumulation=1
#   CONFIG=configs/7b_staged.yaml sbatch --nodes=5 slurm/pretrain_7b.sh  # a pipeline stage on each node
#   CONFIG=configs/quickstart.yaml sbatch --nodes=4 slurm/pretrain_7b.sh
#
# Options before the script are Slurm's and win over the lines below (add --partition, --account, --time, and
# --gpus-per-node where GPUs must be asked for); arguments after it go to pipeline.train. The same command
# again resumes from the newest checkpoint. Shortly before the time limit the run saves and queues again.
#
# Environment:
#   CONFIG          run configuration (configs/7b.yaml)
#   ARGS            more arguments for pipeline.train, split at blanks
#   PYTHON          interpreter (the checkout's .venv/bin/python, else python3)
#   RANKS_PER_NODE  processes on each node (the GPUs that torch sees on the first node; 1 without any)
#   HEADWAY_ROOT    the checkout (the folder that sbatch was called in)
#
#SBATCH --job-name=pretrain
#SBATCH --nodes=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

# sbatch runs a copy of this script, so its own path says nothing about the checkout.
root=${HEADWAY_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/pipeline/train.py" ]; then
  echo "error: $root is not the checkout (no pipeline/train.py in it); call sbatch there or set HEADWAY_ROOT" >&2
  exit 2
fi
cd "$root"
. slurm/supervise.sh

config=${CONFIG:-configs/7b.yaml}
if [ ! -f "$config" ]; then
  echo "error: CONFIG=$config does not exist in $root; give the path of a run's YAML file" >&2
  exit 2
fi
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

# How many GPUs there are is asked of torch, as the trainer does: Slurm may count devices that no driver serves.
given=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
given=${given##*:} # h100:8 is 8
ranks=${RANKS_PER_NODE:-}
if [ -z "$ranks" ]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null | tail -n 1) || gpus=""
  if [ -z "$gpus" ]; then
    echo "error: $python cannot import torch on $(hostname); set PYTHON to the interpreter of the installation" >&2
    exit 2
  fi
  if [ "$gpus" = 0 ] && [ "$given" != 0 ]; then
    say "Slurm gave $given GPUs on $(hostname), but torch sees none: 1 process per node, on CPUs"
  fi
  ranks=$((given > 0 && given < gpus ? given : gpus))
  ranks=$((ranks > 0 ? ranks : 1))
fi

nodes=$SLURM_JOB_NUM_NODES
hostnames=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hostnames%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs that share a node do not meet
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_task "$ranks")}
export PYTHONUNBUFFERED=1
unset RANK LOCAL_RANK WORLD_SIZE # of the shell that called sbatch; each task takes its own from srun

say "$config on $nodes nodes x $ranks processes ($SLURM_JOB_NODELIST), rendezvous $MASTER_ADDR:$MASTER_PORT," \
  "run number $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID"

# Each process gets its share of the node's CPUs and sees all GPUs of its node, of which it takes its own. Said to
# srun because a step inherits neither from an allocation of whole nodes.
resources=()
[ "$given" = 0 ] || resources+=(--gpus-per-node="$given")
cpus=$((${SLURM_CPUS_ON_NODE:-$ranks} / ranks))
# shellcheck disable=SC2086  # ARGS is a list
run_step --nodes="$nodes" --ntasks="$((nodes * ranks))" --ntasks-per-node="$ranks" \
  --cpus-per-task="$((cpus > 0 ? cpus : 1))" "${resources[@]}" --kill-on-bad-exit=1 \
  "$python" -m pipeline.train "$config" --resume auto ${ARGS:-} "$@"
finish_job
