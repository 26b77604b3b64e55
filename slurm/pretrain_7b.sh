#!/bin/bash
# Pretraining as a Slurm job, on any number of nodes:
#
#   sbatch slurm/pretrain_7b.sh                                          # configs/7b.yaml on 8 nodes
#   sbatch --nodes=32 --time=24:00:00 slurm/pretrain_7b.sh configs/7b.yaml --set batch.accumulation=1
#   sbatch --nodes=5 slurm/pretrain_7b.sh configs/7b_staged.yaml         # a pipeline stage on each node
#   sbatch --nodes=4 slurm/pretrain_7b.sh configs/quickstart.yaml
#
# Options before the script are Slurm's and win over the lines below (add --partition, --account, --time, and
# --gpus-per-node where GPUs must be asked for); what follows it is the configuration and further arguments
# of pipeline.train. The same command again resumes from the newest checkpoint. Shortly before the time
# limit, on preemption, and when a node or a task is lost, the run goes on in the queue.
#
# Environment:
#   CONFIG             run configuration, if none is given as argument (configs/7b.yaml)
#   ARGS               more arguments for pipeline.train, split at blanks
#   PYTHON             interpreter (.venv/bin/python of the checkout or the working folder, else python3)
#   RANKS_PER_NODE     processes on each node (--ntasks-per-node, else the GPUs that torch sees on the first
#                      node, else 1)
#   SRUN_ARGS          more options of srun, split at blanks
#   CONTAINER_IMAGE    image for srun --container-image (pyxis)
#   APPTAINER          options and image for apptainer exec, e.g. "--nv image.sif"
#   MAX_IDLE_REQUEUES  how often the job puts itself into the queue without a new checkpoint (3)
#   HEADWAY_ROOT       the checkout, and the folder that relative paths count from (the checkout of the
#                      submitted script, and the folder of sbatch or its --chdir)
#
#SBATCH --job-name=pretrain
#SBATCH --nodes=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
warned=0 cancelled=0
trap 'warned=1' USR1 # before anything that takes time: untrapped, a signal would end the job
trap 'cancelled=1' TERM
set -euo pipefail

# sbatch runs a copy of this script; Slurm knows where the original lies.
submitted=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's#^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*#\1#p') || submitted=""
for code in "${HEADWAY_ROOT:-$submitted}" "$PWD" "${SLURM_SUBMIT_DIR:-}" ""; do
  [ ! -f "$code/pipeline/train.py" ] || break
done
if [ -z "$code" ] || { [ -n "${HEADWAY_ROOT:-}" ] && [ "$code" != "$HEADWAY_ROOT" ]; }; then
  echo "error: ${HEADWAY_ROOT:-$PWD} is not the checkout (no pipeline/train.py in it); call sbatch there or set HEADWAY_ROOT" >&2
  exit 2
fi
cd "${HEADWAY_ROOT:-$PWD}"
. "$code/slurm/supervise.sh"

# The first argument is the configuration, unless it is an option.
case ${1:--} in
  -*) config=${CONFIG:-configs/7b.yaml} ;;
  *)
    config=$1
    shift
    ;;
esac
[ -f "$config" ] || [ ! -f "$code/$config" ] || config=$code/$config
[ -f "$config" ] || refuse "CONFIG=$config does not exist in $PWD; give the path of a run's YAML file"
choose_python

nodes=$SLURM_JOB_NUM_NODES
# What was asked for; a node that is given whole has more. --gres stands in no variable.
asked=$(job_field TresPerNode | grep -o 'gpu[^,]*') || asked=""
given=${SLURM_GPUS_PER_NODE:-${asked:-${SLURM_GPUS_ON_NODE:-0}}}
if [ -z "${SLURM_GPUS_PER_NODE:-}" ] && [ -n "${SLURM_GPUS:-}" ]; then # --gpus counts those of the job
  given=$((${SLURM_GPUS##*:} / nodes))
  [ $((given * nodes)) = "${SLURM_GPUS##*:}" ] ||
    refuse "--gpus=$SLURM_GPUS are not the same number on each of $nodes nodes; use --gpus-per-node"
fi
given=${given##*:} # h100:8 is 8
ranks=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-}}
if [ -z "$ranks" ]; then
  # How many GPUs there are is asked of torch, as the trainer does: Slurm may count devices that no driver serves.
  gpus=$(call_python -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null | tail -n 1) || gpus=""
  [ -n "$gpus" ] || [ "$warned$cancelled" != 00 ] ||
    refuse "${python[*]} cannot import torch on $(hostname); set PYTHON to the interpreter of the installation"
  if [ "$gpus" = 0 ] && [ "$given" != 0 ]; then
    say "Slurm gave $given GPUs on $(hostname), but torch sees none: 1 process per node, on CPUs"
  fi
  ranks=$((given > 0 && given < ${gpus:-0} ? given : ${gpus:-0}))
  ranks=$((ranks > 0 ? ranks : 1))
fi

hostnames=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hostnames%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs that share a node do not meet
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_task "$ranks")}
unset RANK LOCAL_RANK WORLD_SIZE # of the shell that called sbatch; each task takes its own from srun

say "$config on $nodes nodes x $ranks processes ($SLURM_JOB_NODELIST), rendezvous $MASTER_ADDR:$MASTER_PORT," \
  "run number $((${SLURM_RESTART_COUNT:-0} + 1)) of job $job"

# Configuration, shards and number of ranks are looked at once, here, where an error is one line.
# shellcheck disable=SC2206  # ARGS is a list
arguments=("$config" --resume auto ${ARGS:-} "$@")
# A job that is queued again goes on from its own newest checkpoint, also if it began elsewhere or anew.
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || arguments+=(--resume auto)
export HEADWAY_NOTIFIED_BY=job # run.notify is called here, where it is known whether the job goes on by itself
tell_end() { call_python -m pipeline.train "${arguments[@]}" --notify "$1" "$2" || true; }
if [ "$warned$cancelled" = 00 ]; then
  checked=0 check_errors=$(mktemp)
  run_dir=$(call_python -m pipeline.train "${arguments[@]}" --check --world-size "$((nodes * ranks))" 2>"$check_errors" | tail -n 1) ||
    checked=$?
  if [ "$checked" != 0 ] && [ "$warned$cancelled" = 00 ]; then
    tell_end refused "$(sed -n 's/^error: //p' "$check_errors" | tail -n 1)" 2>/dev/null # what the check has said, too
    cat "$check_errors" >&2
    exit "$checked"
  fi
  cat "$check_errors" >&2
fi
progress_mark() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }

# Each process gets its share of the smallest node's CPUs and sees all GPUs of its node, of which it takes its own.
resources=()
[ "$given" = 0 ] || resources+=(--gpus-per-node="$given")
cpus=$(($(fewest_cpus) / ranks))
forget_sbatch_options
run_step --nodes="$nodes" --ntasks="$((nodes * ranks))" --ntasks-per-node="$ranks" \
  --cpus-per-task="$((cpus > 0 ? cpus : 1))" "${resources[@]}" --kill-on-bad-exit=1 \
  "${python[@]}" -m pipeline.train "${arguments[@]}"
finish_job
