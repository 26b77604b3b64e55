#!/bin/bash
# A checkpoint as a Hugging Face model, as a Slurm job on one node without GPUs:
#
#   sbatch slurm/export.sh runs/7b export
#   sbatch --time=2:00:00 slurm/export.sh runs/7b/checkpoints/step_00005000 export --dtype bf16
#   sbatch --dependency=afterok:JOB slurm/export.sh runs/7b export      # when the run JOB is done
#
# Options before the script are Slurm's; what follows it goes to pipeline.export. The export is checked against
# the checkpoint before it gets its name, and reads a layer at a time. A job that is stopped begins anew.
#
# Environment: PYTHON, SRUN_ARGS, CONTAINER_IMAGE, APPTAINER, HEADWAY_ROOT   as in pretrain_7b.sh
#
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --open-mode=append
#SBATCH --requeue
warned=0 cancelled=0
trap 'warned=1' USR1 # before anything that takes time: untrapped, a signal would end the job
trap 'cancelled=1' TERM
set -euo pipefail

# sbatch runs a copy of this script; Slurm knows where the original lies.
submitted=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's#^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*#\1#p') || submitted=""
for code in "${HEADWAY_ROOT:-$submitted}" "$PWD" "${SLURM_SUBMIT_DIR:-}" ""; do
  [ ! -f "$code/pipeline/export.py" ] || break
done
if [ -z "$code" ] || { [ -n "${HEADWAY_ROOT:-}" ] && [ "$code" != "$HEADWAY_ROOT" ]; }; then
  echo "error: ${HEADWAY_ROOT:-$PWD} is not the checkout (no pipeline/export.py in it); call sbatch there or set HEADWAY_ROOT" >&2
  exit 2
fi
cd "${HEADWAY_ROOT:-$PWD}"
. "$code/slurm/supervise.sh"

[ $# -ge 2 ] || refuse "give a run or checkpoint and a folder: sbatch slurm/export.sh runs/7b export"
choose_python
cpus=${SLURM_CPUS_PER_TASK:-$(fewest_cpus)}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_task 1)}
export OMP_NUM_THREADS
forget_sbatch_options
run_step --nodes=1 --ntasks=1 --cpus-per-task="$cpus" "${python[@]}" -m pipeline.export "$@"
finish_job
