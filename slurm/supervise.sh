# shellcheck shell=bash
# Sourced by the job scripts: one job step under supervision.
#
# Slurm warns a job script before its time is up (--signal=B:USR1@300), and sends TERM on scancel and
# preemption. bash runs a trap only between commands or in `wait`, so the step runs in the background.

# Runs srun with the given arguments and waits for it, handing signals on to its tasks.
run_step() { run_supervised USR1 srun "$@"; }

# run_supervised SIGNAL COMMAND...: runs a launcher and waits for it; USR1 and TERM reach it as SIGNAL.
# Sets `status` to its exit status and `warned` to 1 when the time limit was announced.
run_supervised() {
  local launcher_pid interrupted signal=$1
  shift
  warned=0 status=0 interrupted=0
  # srun hands USR1 on to every task; TERM would make it end the step itself, after the grace period.
  # (The tasks get scancel's TERM from Slurm directly; a second signal changes nothing.)
  trap 'warned=1 interrupted=1; say "USR1: the time limit is near, stopping the tasks"; forward_signal' USR1
  trap 'interrupted=1; say "TERM: stopping the tasks"; forward_signal' TERM
  say "$*"
  "$@" &
  launcher_pid=$!
  [ "$interrupted" = 0 ] || forward_signal # it came before there was a step
  while :; do
    interrupted=0 status=0
    wait "$launcher_pid" || status=$?
    [ "$interrupted" = 1 ] || break # a trap ends `wait` early, with the signal's status
  done
  trap - USR1 TERM
  say "${1##*/} ended with status $status"
}

forward_signal() {
  [ -z "${launcher_pid:-}" ] || kill -s "$signal" "$launcher_pid" 2>/dev/null || true
}

# Ends the job with the step's status; puts it back into the queue instead when the time limit stopped it.
# 75: stopped on a signal after saving (EX_TEMPFAIL). 138, 143: ended by USR1 or TERM before it could save;
# the newest checkpoint, or the finished units of work, are the point to go on from.
finish_job() {
  case "$warned:$status" in
    1:75 | 1:138 | 1:143)
      if scontrol requeue "$SLURM_JOB_ID"; then
        say "job $SLURM_JOB_ID is queued again and will go on where it stopped"
        sleep 600 # Slurm ends this script; ending it here would make the job count as failed
      fi
      say "job $SLURM_JOB_ID could not be queued again; the same sbatch command goes on where it stopped"
      ;;
    0:75) say "stopped on request; the same sbatch command goes on where it stopped" ;;
  esac
  exit "$status"
}

say() { printf '%s %s: %s\n' "$(date '+%F %T')" "${SLURM_JOB_NAME:-job}" "$*"; }

# Threads for each of $1 tasks on this node: of the cores that exist, however many Slurm counts.
threads_per_task() {
  local threads=$(($(nproc) / $1))
  [ "$threads" -ge 1 ] || threads=1
  echo "$threads"
}
