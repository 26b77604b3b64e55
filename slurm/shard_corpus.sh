#!/bin/bash
# A corpus to shards as a Slurm job, one of:
#
#   INPUT="raw/web raw/code" OUTPUT=data/corpus TOKENIZER=tokenizer.json sbatch slurm/shard_corpus.sh
#   sbatch slurm/shard_corpus.sh configs/data/mixture.yaml                  # one node, all its cores
#   sbatch --nodes=4 slurm/shard_corpus.sh configs/data/mixture.yaml        # MPI: a rank per core
#   sbatch --array=0-31 slurm/shard_corpus.sh configs/data/mixture.yaml     # tasks that share OUTPUT only
#
# Every way gives the same bytes. An array needs no MPI and starts as soon as any node is free; tasks that die
# or never start are made up for by the others, and the last one commits. OUTPUT must be on a file system that
# all nodes share.
#
# Options before the script are Slurm's and win over the lines below (add --partition, --account, --time);
# what follows it is a YAML file with sources and options (configs/data/), if there is one, and arguments of
# data_prep/shard.py, for example --glob '*.md'. The same command again does what is missing. Shortly before
# the time limit the job queues again and goes on.
#
# Environment:
#   CONFIG          the YAML file, if none is given as argument; or, and over it:
#   INPUT           files and directories, split at blanks; patterns are expanded
#   OUTPUT          folder of the shard set
#   TOKENIZER       a tokenizer.json, train:SIZE or bytes
#   RANKS_PER_NODE  MPI ranks on each node (its CPUs)
#   MPIRUN          launcher of the MPI that mpi4py uses (beside PYTHON, else in PATH)
#   PYTHON, SRUN_ARGS, CONTAINER_IMAGE, APPTAINER, MAX_IDLE_REQUEUES, HEADWAY_ROOT   as in pretrain_7b.sh
#
#SBATCH --job-name=shard
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
warned=0 cancelled=0
trap 'warned=1' USR1 # before anything that takes time: untrapped, a signal would end the job
trap 'cancelled=1' TERM
set -euo pipefail

# sbatch runs a copy of this script; Slurm knows where the original lies.
submitted=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's#^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*#\1#p') || submitted=""
for code in "${HEADWAY_ROOT:-$submitted}" "$PWD" "${SLURM_SUBMIT_DIR:-}" ""; do
  [ ! -f "$code/data_prep/shard.py" ] || break
done
if [ -z "$code" ] || { [ -n "${HEADWAY_ROOT:-}" ] && [ "$code" != "$HEADWAY_ROOT" ]; }; then
  echo "error: ${HEADWAY_ROOT:-$PWD} is not the checkout (no data_prep/shard.py in it); call sbatch there or set HEADWAY_ROOT" >&2
  exit 2
fi
cd "${HEADWAY_ROOT:-$PWD}"
. "$code/slurm/supervise.sh"

# The first argument is the YAML file, unless it is an option.
case ${1:--} in
  -*) config=${CONFIG:-} ;;
  *)
    config=$1
    shift
    ;;
esac
[ -z "$config" ] || [ -f "$config" ] || [ ! -f "$code/$config" ] || config=$code/$config
[ -z "$config" ] || [ -f "$config" ] || refuse "CONFIG=$config does not exist in $PWD"
if [ -z "$config" ] && [ $# = 0 ]; then
  for name in INPUT OUTPUT TOKENIZER; do
    [ -n "${!name:-}" ] ||
      refuse "$name is not set, nor CONFIG; for example: INPUT=raw OUTPUT=data/corpus TOKENIZER=train:32000 sbatch $0"
  done
fi
choose_python

command=("${python[@]}" "$code/data_prep/shard.py")
[ -z "$config" ] || command+=(--config "$config")
# shellcheck disable=SC2206  # INPUT is a list
[ -z "${INPUT:-}" ] || command+=(--input $INPUT)
[ -z "${OUTPUT:-}" ] || command+=(--output "$OUTPUT")
[ -z "${TOKENIZER:-}" ] || command+=(--tokenizer "$TOKENIZER")
command+=("$@")

# Finished units are the progress of a job that is queued again.
output=${OUTPUT:-}
[ -n "$output" ] || [ -z "$config" ] || output=$(sed -n 's/^output: *\([^ ]*\).*/\1/p' "$config" | head -n 1)
while [[ $output =~ \$\{([A-Za-z_0-9]+)\} ]]; do output=${output/"${BASH_REMATCH[0]}"/"${!BASH_REMATCH[1]:-}"}; done
for ((i = 1; i < $#; i++)); do [ "${!i}" != --output ] || output=${*:i + 1:1}; done
progress_mark() { { find "$output/journal" -name '[0-9]*[0-9].json' 2>/dev/null || true; } | wc -l; }

forget_sbatch_options
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  mpirun=${MPIRUN:-$(dirname "${python[-1]}")/mpirun}
  [ -n "${MPIRUN:-}" ] || [ -x "$mpirun" ] || mpirun=mpirun
  command -v "$mpirun" >/dev/null ||
    refuse "no mpirun for $SLURM_JOB_NUM_NODES nodes; set MPIRUN, pip install mpich, or use sbatch --nodes=1 --array=0-$((SLURM_JOB_NUM_NODES - 1))"
  ranks=${RANKS_PER_NODE:-$(fewest_cpus)}
  case $("$mpirun" --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *PRRTE*) placement=(--map-by "ppr:$ranks:node:OVERSUBSCRIBE" --bind-to none) ;;
    *) placement=(-n $((ranks * SLURM_JOB_NUM_NODES)) -ppn "$ranks") ;;
  esac
  run_supervised TERM "$mpirun" "${placement[@]}" "${command[@]}"
  # Ended by our TERM, a launcher reports one of several statuses; 1 to 3 are the shard command's own.
  [ "$warned" = 0 ] || [ "$status" -le 3 ] || status=143
else
  run_step --nodes=1 --ntasks=1 --cpus-per-task="$(fewest_cpus)" "${command[@]}"
fi
finish_job
