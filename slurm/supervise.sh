# shellcheck shell=bash
# shellcheck disable=SC2154  # `warned`, `cancelled` and `code` are set by the job scripts
# Sourced by the job scripts: one job step under supervision, and what becomes of the job afterwards.
#
# Slurm warns a job script before its time is up (--signal=B:USR1@300), and sends TERM on scancel and
# preemption. bash runs a trap only between commands or in `wait`, so the step runs in the background.
# The scripts have set their first traps themselves, before anything that takes time.

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # a task, not its whole array
job=${job:-$SLURM_JOB_ID}
max_idle_requeues=${MAX_IDLE_REQUEUES:-3}
launcher_pid="" step_errors=""
run_dir="" # where the run leaves its verdict

# sbatch --export=NONE would take away the tasks' environment, too.
export SLURM_EXPORT_ENV=ALL PYTHONUNBUFFERED=1

# Without another process, which a signal of Slurm's to all of them would end.
say() { printf '%(%F %T)T %s: %s\n' -1 "${SLURM_JOB_NAME:-job}" "$*"; }

# Ends the job with an error of the user's; the line is the log's last.
refuse() {
  echo "error: $*" >&2
  exit 2
}

# Finds the interpreter, and sets `python` to the words that call it, in a container if there is one.
choose_python() {
  local interpreter=${PYTHON:-}
  if [ -z "$interpreter" ]; then
    interpreter=python3
    if [ -z "${CONTAINER_IMAGE:-}${APPTAINER:-}" ]; then # the checkout's own is not for a container
      for folder in "$code" "$PWD"; do # a snapshot has the one of its submission
        [ ! -x "$folder/.venv/bin/python" ] || { interpreter=$folder/.venv/bin/python; break; }
      done
    fi
  fi
  python=("$interpreter")
  # shellcheck disable=SC2206  # APPTAINER is a list
  [ -z "${APPTAINER:-}" ] || python=(apptainer exec $APPTAINER "$interpreter")
  # shellcheck disable=SC2206  # SRUN_ARGS is a list
  srun_options=(${SRUN_ARGS:-})
  [ -z "${CONTAINER_IMAGE:-}" ] || srun_options+=(--container-image="$CONTAINER_IMAGE")
  # The code is this checkout's or snapshot's, whatever folder relative paths count from.
  export PYTHONSAFEPATH=1 PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
}

# Runs the interpreter once on this node, in the container of the step.
call_python() {
  local command=("${python[@]}" "$@")
  [ -z "${CONTAINER_IMAGE:-}" ] ||
    command=(srun --nodes=1 --ntasks=1 "${srun_options[@]}" "${command[@]}")
  "${command[@]}"
}

# A step inherits neither GPUs nor tasks from the words of the sbatch line: both are said to srun.
forget_sbatch_options() {
  unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK \
    SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU
}

# The CPUs of the node that has fewest: "16(x2),8" is 8.
fewest_cpus() {
  local count fewest=0 counts=${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}
  for count in ${counts//,/ }; do
    count=${count%%(*}
    [ "$fewest" -gt 0 ] && [ "$fewest" -le "$count" ] || fewest=$count
  done
  echo "$fewest"
}

# Threads for each of $1 tasks on this node: of the cores that exist, however many Slurm counts.
threads_per_task() {
  local threads=$(($(nproc) / $1))
  echo $((threads > 0 ? threads : 1))
}

# Runs srun with the given arguments and waits for it, handing signals on to its tasks.
run_step() { run_supervised USR1 srun "${srun_options[@]}" "$@"; }

# run_supervised SIGNAL COMMAND...: runs a launcher and waits for it; USR1 and TERM reach it as SIGNAL.
# Sets `status` to its exit status.
run_supervised() {
  local interrupted=0 copier watcher signal=$1
  shift
  status=0 first_mark=$(progress_mark)
  # srun hands USR1 on to every task; TERM would make it end the step itself, after the grace period.
  # (The tasks get scancel's TERM from Slurm directly; a second signal changes nothing.)
  trap 'warned=1 interrupted=1; say "USR1: the time limit is near, stopping the tasks"; forward_signal' USR1
  trap 'cancelled=1 interrupted=1; say "TERM: stopping the tasks"; forward_signal' TERM
  if [ "$warned$cancelled" != 00 ]; then
    say "the signal came before the tasks were started; nothing was done"
    status=75
    return
  fi
  say "$*"
  # srun names the node of a task that was killed, which says nothing itself. TERM is for the tasks.
  step_errors=$(mktemp)
  exec 3> >(trap '' TERM USR1 && exec tee "$step_errors" >&2)
  copier=$!
  "$@" 2>&3 3>&- &
  launcher_pid=$!
  end_hanging_step "$launcher_pid" 3>&- &
  watcher=$!
  [ "$interrupted" = 0 ] || forward_signal # it came before there was a step
  while :; do
    interrupted=0 status=0
    wait "$launcher_pid" 2>/dev/null || status=$?
    [ "$interrupted" = 1 ] || break # a trap ends `wait` early, with the signal's status
  done
  launcher_pid=""
  kill "$watcher" 2>/dev/null || true
  exec 3>&-
  for _ in 1 2 3 4 5 6 7 8 9 10; do # what the launcher left behind may hold the other end for long
    kill -0 "$copier" 2>/dev/null || break
    sleep 0.1
  done
  say "${1##*/} ended with status $status"
}

# Ends a launcher that goes on for a minute after the run has ended: srun waits for the tasks of a node
# that is gone, until Slurm has noticed that, too.
end_hanging_step() {
  trap - USR1 TERM
  # A sleep that outlives this must not hold the log open.
  while [ -z "$(verdict_value outcome)" ]; do sleep 5 >/dev/null 2>&1; done
  sleep 60 >/dev/null 2>&1
  say "the run has ended, but some tasks do not answer: the step is given up"
  kill -KILL "$1"
}

forward_signal() {
  [ -z "${launcher_pid:-}" ] || kill -s "$signal" "$launcher_pid" 2>/dev/null || true
}

# A value of the run's own verdict on this start of the job; empty when it has none.
verdict_value() {
  local file=$run_dir/verdict.json start="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
  [ -n "$run_dir" ] && grep -qs "^ *\"start\": \"$start\"" "$file" || return 0
  sed -n "s/^ *\"$1\": //p" "$file" | sed 's/,$//; s/^"\(.*\)"$/\1/; s/^null$//; s/\\"/"/g; s/\\\\/\\/g'
}

# The node of the first task that srun saw die, if it was killed and did not end by itself, or the first
# node that srun could not reach to start its tasks.
killed_on() {
  [ -n "$step_errors" ] || return 0
  sed -n -e 's/^srun: error: \([^ :]*\): tasks\{0,1\} [0-9,-]*: \(.*\)/\1 \2/p' \
    -e 's/^srun: error: Node failure on \(.*\)/\1 Killed/p' \
    -e 's/^srun: error: Task launch for [^ ]* failed on node \([^ ]*\): \(.*\)/\1 \2/p' "$step_errors" |
    head -n 1 |
    sed -n 's/^\([^ ]*\) \(Killed\|Bus error\|Segmentation fault\|Aborted\|Out Of Memory\|Communication connection failure\|Socket timed out\|Zero Bytes\).*/\1/p'
}

# What a task has said that could not leave a verdict, or has none to leave.
first_error() {
  [ -z "$step_errors" ] || sed -n 's/^error: //p' "$step_errors" | head -n 1
}

# A field of what Slurm says of this job.
job_field() {
  scontrol show job "$job" 2>/dev/null | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d = -f 2-
}

# What is told of the end of a job that is not queued again; scripts of runs define their own.
tell_end() { :; } # OUTCOME REASON, as in a verdict

# Ends the job: with the step's status and the reason as the log's last line, or in the queue again.
# 75: stopped on a signal after saving (EX_TEMPFAIL). 138, 143: ended by USR1 or TERM before it could save;
# the newest checkpoint, or the finished units of work, are the point to go on from.
finish_job() {
  local outcome message node exit_code notes
  notes=$(job_field StdOut || true).requeues # beside the job's output, which all nodes see
  if [ "$status" = 0 ]; then
    rm -f "$notes" "$notes.excluded"
    tell_end "done" "$(verdict_value message)"
    exit 0
  fi
  outcome=$(verdict_value outcome) message=$(verdict_value message)
  if [ "$cancelled" = 1 ]; then # by TERM, which also comes when the time is over
    is_over_time || leave_to_slurm
    warned=1
  fi
  if [ "$outcome" = "done" ]; then # whatever became of a task that had nothing left to do
    tell_end "done" "$message"
    exit 0
  fi
  # Of the tasks that srun ends after one has failed some report 75: what the run says comes first.
  if [ "$outcome" = failed ] || [ "$outcome" = refused ]; then
    tell_end "$outcome" "$message"
    echo "error: $message"
    exit_code=$(verdict_value exit_code)
    exit "${exit_code:-$status}"
  fi
  if [ "$warned" = 1 ]; then
    case "$outcome:$status" in
      lost:* | *:75 | *:138 | *:143) queue_again "the time limit is near" ;;
    esac
  fi
  node=$(killed_on)
  if [ "$outcome" = lost ] || [ -n "$node" ]; then
    node=${node:-$(verdict_value host)}
    [ -n "$message" ] || message="a task on $node was killed or could not be started"
    queue_again "$message" "$node"
  elif ended_for_the_start_before; then
    queue_again "the step was ended by nobody known, soon after the job was started again"
  elif [ "$status" = 75 ]; then
    # Preemption with a time of grace sends TERM to the tasks only.
    case $(job_field PreemptTime || true) in
      "" | None)
        say "stopped on request; the same sbatch command goes on where it stopped"
        tell_end stopped "stopped on request"
        ;;
      *) queue_again "the job is being preempted" ;;
    esac
  elif [ -z "$outcome" ] && [ "$status" = 137 ]; then
    queue_again "srun was killed"
  else
    [ -n "$message" ] || message=$(first_error)
    [ -n "$message" ] || message="the step ended with status $status; its own lines above say why"
    tell_end failed "$message"
    echo "error: $message"
  fi
  exit "$status"
}

# Whether the step was signalled, but neither through this script nor with the job, soon after a new
# start. Its step has the number of the start before, whose end Slurm may notice up to a minute late,
# when a node hung, and take for that of this one. A person ends the job: `scancel JOB`.
ended_for_the_start_before() {
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$SECONDS" -lt 120 ] || return 1
  case $status in 75 | 143) ;; *) return 1 ;; esac
  [ "$(job_field JobState || true)" = RUNNING ]
}

# TERM came: from scancel, or because Slurm takes the job off its nodes and has queued it again.
leave_to_slurm() {
  local restarts
  restarts=$(job_field Restarts || true)
  if [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
    say "Slurm has queued job $job again; it goes on by itself where it stopped"
  else
    say "stopped on request; the same sbatch command goes on where it stopped"
    tell_end stopped "stopped on request"
  fi
  exit "$status"
}

# How far the work is; a job that is queued again must get beyond it. Scripts define their own.
progress_mark() { echo none; }

# queue_again REASON [NODE]: puts the job back into the queue, without the node. Does not return.
queue_again() {
  local reason=$1 node=${2:-} mark before="" count=0
  mark=$(progress_mark)
  # Slurm's own requeues are not counted: a sound job may be preempted at the same step again and again.
  [ ! -f "$notes" ] || read -r count before <"$notes" || true
  [ "$before" = "$mark" ] && count=$((count + 1)) || count=1
  say "$reason"
  if [ "$count" -gt "$max_idle_requeues" ]; then
    reason="queued again $max_idle_requeues times without progress (it is at: $mark), now stopped: $reason"
    tell_end failed "$reason"
    echo "error: $reason." \
      "Give a longer --time, a shorter --signal=B:USR1@SECONDS, or save more often; MAX_IDLE_REQUEUES changes the number"
    exit 1
  fi
  refuse_early_warning
  echo "$count $mark" >"$notes" || true
  local excluded=""
  [ -z "$node" ] || excluded=$(nodes_to_exclude "$node") || true
  ended=0
  trap '' USR1
  trap 'ended=1' TERM # Slurm ends this script as soon as it has queued the job
  if deaf scontrol requeue "$job"; then
    say "job $job is queued again and will go on where it stopped"
    # A job that runs cannot be changed: this is done between its end and that of this script.
    if [ -n "$excluded" ] && deaf scontrol update JobId="$job" ExcNodeList="$excluded"; then
      say "$node is excluded from the next start; scontrol update JobId=$job ExcNodeList= brings it back" || true
    fi
    sleep $((ended ? 0 : 600)) & # ending before Slurm says so would make the job count as failed
    wait $! || true
    exit "$status"
  fi
  say "job $job could not be queued again; the same sbatch command goes on where it stopped"
  tell_end failed "$reason; job $job could not be queued again"
  echo "error: $reason"
  exit "$status"
}

# Runs a command to its end, whatever signals Slurm sends to all of the script's processes.
# One that comes before the trap is set ends the subshell before it has done anything: then once more.
deaf() {
  local code
  for _ in 1 2 3; do
    code=0
    (trap '' TERM USR1 && exec "$@") || code=$?
    case $code in 138 | 143) ;; *) break ;; esac
  done
  return "$code"
}

# A warning that is due before the job begins would come again at each start. A --signal of the sbatch
# line cannot be seen here: a start that got further is taken for one that has a shorter one.
refuse_early_warning() {
  local lead limit
  [ "$warned" = 1 ] && [ "$SECONDS" -lt 45 ] && [ "$mark" = "$first_mark" ] || return 0
  lead=$(sed -n 's/^#SBATCH --signal=.*@\([0-9]*\)$/\1/p' "$0" | head -n 1)
  limit=$(seconds_of "$(job_field TimeLimit || true)")
  [ -n "$limit" ] && [ -n "$lead" ] && [ "$limit" -le "$lead" ] || return 0
  limit="the time limit of $limit s is not above the $lead s of --signal, so the job is warned as soon as it starts"
  tell_end refused "$limit"
  echo "error: $limit; give sbatch a longer --time, or a shorter --signal=B:USR1@SECONDS"
  exit 2
}

# Whether the job has run for as long as it may.
is_over_time() {
  local limit run
  limit=$(seconds_of "$(job_field TimeLimit || true)")
  run=$(seconds_of "$(job_field RunTime || true)")
  [ -n "$limit" ] && [ -n "$run" ] && [ "$run" -ge "$limit" ]
}

# D-HH:MM:SS as seconds; nothing for UNLIMITED.
seconds_of() {
  [[ $1 =~ ^(([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)$ ]] || return 0
  local days=${BASH_REMATCH[2]:-0} hours=${BASH_REMATCH[3]} minutes=${BASH_REMATCH[4]} seconds=${BASH_REMATCH[5]}
  echo $((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
}

# The nodes to keep the job off: those that sbatch was asked for, and as many of the ones where tasks were
# lost, $1 and the latest before it, as leave a node to spare. Nothing if too few would be left for the job.
nodes_to_exclude() {
  local node=$1 lost=$notes.excluded asked excluded others
  touch "$lost"
  asked=$(hosts_of "$(job_field ExcNodeList || true)" | grep -vxFf "$lost" || true)
  echo "$node" >>"$lost"
  while :; do
    excluded=$(printf '%s\n' "$asked" "$(<"$lost")" | sort -u | grep .)
    others=$(usable_nodes | grep -cvxFf <(echo "$excluded") || true)
    if [ "$others" -gt "$SLURM_JOB_NUM_NODES" ] || [ "$(wc -l <"$lost")" -le 1 ]; then break; fi
    say "$(head -n 1 "$lost") is not excluded any more: without it there is no node to spare" >&2
    sed -i 1d "$lost"
  done
  if [ "$others" -ge "$SLURM_JOB_NUM_NODES" ]; then
    paste -sd, <<<"$excluded"
  else
    sed -i 1d "$lost"
    say "$node is not excluded: without it partition $SLURM_JOB_PARTITION has $others nodes, and the job needs $SLURM_JOB_NUM_NODES" >&2
  fi
}

# The names in a list of Slurm's, a line each.
hosts_of() {
  [ -z "$1" ] || [ "$1" = "(null)" ] || scontrol show hostnames "$1"
}

# The nodes of the partition that a job can be put on.
usable_nodes() {
  sinfo --noheader --Node --responding --partition="$SLURM_JOB_PARTITION" --format='%N %t' |
    awk '$2 !~ /^(down|drain|drng|fail|maint|unk)/ {print $1}' | sort -u
}
