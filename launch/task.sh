#!/usr/bin/env bash
# Runs a command so that a scheduler can tell "stopped, start me again" from "done": status 75 if SIGTERM came while it
# ran, whatever its own status was (train saves and ends with 0), else the command's own.
#
# Needs   nothing but bash. slurm.sbatch, tpu_vm.sh and gke_jobset.yaml start each of their processes with it.
# Does    starts the command, hands SIGTERM on to it, waits for its end.
# Takes   no time of its own.
# Costs   nothing.
#
#   bash launch/task.sh python -m depthlm_jax train --config=… --workdir=…
told=0 command=""
trap 'told=1; [[ -z $command ]] || kill -TERM "$command" 2>/dev/null' TERM
"$@" &
command=$!
((told == 0)) || kill -TERM "$command"  # it came before there was a command to tell
while kill -0 "$command" 2>/dev/null; do
  wait "$command"  # which a signal ends early
done
wait "$command"
status=$?
if ((told)); then
  echo "stopped by SIGTERM: ends with status 75, to be started again (the command's own: $status)" >&2
  exit 75
fi
exit "$status"
