#!/usr/bin/env bash
# Trains on one Cloud TPU slice, or several, through queued resources; after a preemption asks for new ones and goes on.
#
# Needs   gcloud, logged in, with a project that has TPU quota; a volume that all workers see (an NFS share such as
#         Filestore, or a bucket, best one with hierarchical namespace); --workdir, records and weights below /volume.
# Does    asks for the queued resource NAME, or takes the one there is; waits for it; copies this folder to all workers,
#         makes their .venv; starts the command on all of them and follows it. Preempted: deletes, asks again, goes on.
#         At the end it copies logs to LOGS. Ended by Ctrl-C, the run goes on; the same command follows it again.
# Takes   from minutes to days until the slice is there, some 5 minutes to prepare, then what the command takes.
# Costs   the price of the slice from ACTIVE until it is deleted, used or not: a forgotten v5e-256 costs as much as a
#         busy one. DELETE=1 deletes it when the command has ended, well or not. What else deletes it:
#         gcloud compute tpus queued-resources delete NAME --project=… --zone=… --force
#
#   NAME=depthlm-3b PROJECT=my-project ZONE=us-west4-a ACCELERATOR=v5litepod-64 VOLUME=10.0.0.2:/share SPOT=1 DELETE=1 \
#     bash launch/tpu_vm.sh train --config=configs/qwen2_5_vl_3b.py --workdir=/volume/runs/3b --distributed
#
# NAME         of the queued resource; several slices are NAME-0, NAME-1, …
# ACCELERATOR  v4-8, v5litepod-16, v5p-128, v6e-256, …: one slice
# SLICES       how many (1)
# RUNTIME      image of the VMs (by ACCELERATOR)
# VOLUME       SERVER:/SHARE or gs://BUCKET, mounted at /volume
# SPOT         1: cheap, and may be taken away (0)
# DELETE       1: delete at the end (0)
# LOGS         folder for the workers' logs (runs/NAME-logs)
# POLL_SECONDS between two looks (30)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

for setting in NAME PROJECT ZONE ACCELERATOR VOLUME; do
  [[ -n ${!setting:-} ]] || fail "$setting is not set; the head of launch/tpu_vm.sh says what it means" 2
done
(($#)) || fail "no command: bash launch/tpu_vm.sh train --config=… --workdir=/volume/… --distributed" 2
case $ACCELERATOR in
  v4-*) image=tpu-ubuntu2204-base ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) fail "ACCELERATOR=$ACCELERATOR; expected v4-…, v5litepod-…, v5p-… or v6e-… (TPU7x: gke_jobset.yaml)" 2 ;;
esac
image=${RUNTIME:-$image} slices=${SLICES:-1} spot=${SPOT:-0} delete=${DELETE:-0}
logs=${LOGS:-runs/$NAME-logs} poll=${POLL_SECONDS:-30}
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$slices; expected a number from 1 on" 2
[[ $spot =~ ^[01]$ ]] || fail "SPOT=$spot; expected 0 or 1" 2
[[ $delete =~ ^[01]$ ]] || fail "DELETE=$delete; expected 0 or 1" 2
[[ $VOLUME =~ ^(gs://[^/]+|[^/]+:/.*)$ ]] || fail "VOLUME=$VOLUME; expected SERVER:/SHARE or gs://BUCKET" 2
command -v gcloud >/dev/null || fail "gcloud is not on PATH; install the Google Cloud CLI (cloud.google.com/sdk)"

place=("--project=$PROJECT" "--zone=$ZONE")
worker="bash depthlm_jax/launch/tpu_worker.sh"
patience=10  # looks, in which a resource that is being taken away says so
if ((slices == 1)); then
  nodes=("$NAME") shape=("--node-id=$NAME")
else
  nodes=() shape=("--node-count=$slices" "--node-prefix=$NAME")
  for ((slice = 0; slice < slices; slice++)); do nodes+=("$NAME-$slice"); done
fi

queued() {
  gcloud compute tpus queued-resources "$1" "$NAME" "${place[@]}" "${@:2}"
}

# Says ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, …; ABSENT: there is none; UNKNOWN: it could not be asked.
state() {
  local said
  if said=$(queued describe "--format=value(state.state)" 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then
    echo ABSENT
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

create() {
  local more=()
  ((spot)) && more=(--spot)
  echo "asks for $slices × $ACCELERATOR as $NAME"
  queued create "${shape[@]}" "--accelerator-type=$ACCELERATOR" "--runtime-version=$image" --quiet "${more[@]}"
}

remove() {
  echo "deletes $NAME"
  queued delete --force --quiet
}

# Returns when NAME is ACTIVE; asks for it where there is none, or only what is left of one.
obtain() {
  local now before="" asked=0
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || echo "$NAME is $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      ABSENT)
        create || fail "$NAME could not be asked for: see above"
        asked=1 ;;
      SUSPENDED | FAILED)
        if ((asked)); then  # it never came: asking again would not help
          queued describe "--format=yaml(state)" >&2 || true
          fail "$NAME is $now before it was ever ACTIVE: see above; delete it when you have read it"
        fi
        remove ;;
      UNKNOWN) ((reached)) || fail "gcloud cannot say how $NAME is: see above" ;;
    esac
    reached=1
    sleep "$poll"
  done
}

# Runs a command on all workers of one slice; more options of gcloud may follow.
on_slice() {
  gcloud compute tpus tpu-vm ssh "$1" "${place[@]}" --worker=all --quiet "--command=$2" "${@:3}"
}

# Runs a command on all workers of all slices at once; fails if it failed on one of them.
on_all() {
  local node running=() failed=0
  for node in "${nodes[@]}"; do
    on_slice "$node" "$1" &
    running+=($!)
  done
  for node in "${running[@]}"; do wait "$node" || failed=1; done
  return "$failed"
}

prepare() {
  local archive node
  archive=$(mktemp -d)/depthlm_jax.tgz
  git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -czf "$archive" -T -
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm scp "$archive" "$node:depthlm_jax.tgz" "${place[@]}" --worker=all --quiet || return 1
  done
  rm -r "$(dirname "$archive")"
  on_all "mkdir -p depthlm_jax && tar -xzf depthlm_jax.tgz -C depthlm_jax && $worker prepare $(printf %q "$VOLUME")"
}

start() {
  local command slice address running=() failed=0
  command="$worker start$(printf ' %q' "${arguments[@]}")"
  if ((slices == 1)); then
    on_all "$command"
    return
  fi
  address=$(gcloud compute tpus tpu-vm describe "${nodes[0]}" "${place[@]}" "--format=value(networkEndpoints[0].ipAddress)")
  for ((slice = 0; slice < slices; slice++)); do
    on_slice "${nodes[slice]}" "MEGASCALE_COORDINATOR_ADDRESS=$address MEGASCALE_NUM_SLICES=$slices \
MEGASCALE_SLICE_ID=$slice $command" &
    running+=($!)
  done
  for slice in "${running[@]}"; do wait "$slice" || failed=1; done
  return "$failed"
}

# Whether the slices are gone, or going.
lost() {
  local now node
  now=$(state)
  [[ $now == ACTIVE || $now == UNKNOWN ]] || { echo "$NAME is $now"; return 0; }
  for node in "${nodes[@]}"; do
    now=$(gcloud compute tpus tpu-vm describe "$node" "${place[@]}" "--format=value(state)" 2>/dev/null) || continue
    case $now in PREEMPTED | TERMINATED | STOPPED) echo "$node is $now"; return 0 ;; esac
  done
  return 1
}

# Says running, ended STATUS or none, of the first worker; nothing if it cannot be reached.
first_worker() {
  gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=0 --quiet "--command=$worker state" 2>/dev/null |
    grep -Eo '^(running|none|ended [0-9]+)' || true
}

# Waits for the end and sets `ending`: done, again (stopped, and the slices are still there), lost or failed.
follow() {
  local said looks unreached=0
  while :; do
    said=$(first_worker)
    case $said in
      running) unreached=0 ;;
      ended*) break ;;
      *) ((++unreached < patience)) || break ;;
    esac
    if lost; then ending=lost; return; fi
    sleep "$poll"
  done
  said=$(on_all "$worker state" 2>/dev/null) || said+=$'\nunreached'
  said=$(grep -Eo 'running|none|ended [0-9]+|unreached' <<<"$said" | sort | uniq -c | sed 's/^ *//')
  echo "workers: ${said//$'\n'/, }"
  if ! grep -qv ' ended 0$' <<<"$said"; then ending="done"; return; fi
  for ((looks = 0; looks < patience; looks++)); do
    if lost; then ending=lost; return; fi
    sleep "$poll"
  done
  if grep -Eq ' (ended 75|unreached|none)$' <<<"$said"; then ending=again; else ending=failed; fi
}

collect() {
  local node
  for node in "${nodes[@]}"; do
    mkdir -p "$logs/$node"
    on_slice "$node" "cat depthlm_jax/runs/tpu_vm/log" "--output-directory=$logs/$node" ||
      echo "the logs of $node could not be had" >&2
  done
  echo "logs: $logs"
}

arguments=("$@") reached=0 ending="" tries=0
while :; do
  obtain
  if [[ $(first_worker) != running ]]; then
    if ! { prepare && start; }; then
      if ! lost; then
        ((++tries < 3)) || fail "the workers of $NAME could not be prepared: see above; $NAME is still there, and costs"
        continue
      fi
      remove
      continue
    fi
  fi
  tries=0
  follow
  case $ending in
    lost) remove ;;
    again) echo "stopped, and the slices are still there: starts again" ;;
    *) break ;;
  esac
done
collect
if ((delete)); then
  remove
else
  echo "$NAME is still there, and costs until: gcloud compute tpus queued-resources delete $NAME ${place[*]} --force"
fi
[[ $ending == "done" ]] || fail "the run has failed: see $logs"
