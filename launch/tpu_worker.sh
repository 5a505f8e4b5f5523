#!/usr/bin/env bash
# What tpu_vm.sh asks of each worker of a TPU slice, over ssh.
#
# Needs   a Cloud TPU VM (Ubuntu, sudo, pip) and the repository in ~/depthlm_jax, where tpu_vm.sh puts it.
# Does    prepare VOLUME: mounts VOLUME at /volume, makes .venv with jax[tpu]; start COMMAND…: runs a command of
#         depthlm_jax that outlives the connection; state: says running, ended STATUS or none; stop: tells it to save.
# Takes   prepare some minutes the first time, the others seconds.
# Costs   nothing beside the TPU that it runs on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=runs/tpu_vm  # log, pid and status

prepare() {
  local volume=$1
  if ! mountpoint -q /volume; then
    sudo mkdir -p /volume
    if [[ $volume == gs://* ]]; then
      if ! command -v gcsfuse >/dev/null; then
        echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
          sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
        sudo apt-get update -qq
        sudo apt-get install -y -qq gcsfuse
      fi
      sudo chown "$(id -u):$(id -g)" /volume
      # A checkpoint becomes valid by renaming its folder, which a bucket without folders has to be allowed.
      gcsfuse --implicit-dirs --rename-dir-limit=200000 "${volume#gs://}" /volume
    else
      sudo apt-get install -y -qq nfs-common
      sudo mount -t nfs "$volume" /volume
    fi
  fi
  if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m pip install --quiet --user uv  # images come with Python 3.10
    "$HOME/.local/bin/uv" python install --quiet 3.12
    PYTHON=$("$HOME/.local/bin/uv" python find 3.12)
  fi
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  prepare_environment launch/requirements_tpu.txt
}

state() {
  if [[ -f $run/pid ]] && kill -0 "$(<"$run/pid")" 2>/dev/null; then
    echo running
  elif [[ -f $run/status ]]; then
    echo "ended $(<"$run/status")"
  else
    echo none
  fi
}

start() {
  if [[ $(state) == running ]]; then
    echo "it runs already" >&2
    return
  fi
  mkdir -p "$run"
  rm -f "$run/status"
  # shellcheck disable=SC2016  # $ is meant for the inner shell
  setsid nohup bash -c '
    trap "" HUP
    bash launch/task.sh .venv/bin/python -m depthlm_jax "$@" &
    echo $! >"$0/pid"
    wait $!
    echo $? >"$0/status"' "$run" "$@" >>"$run/log" 2>&1 </dev/null &
  while [[ ! -s $run/pid || ! -f $run/status ]] && [[ $(state) == none ]]; do
    sleep 0.1
  done
}

stop() {
  [[ $(state) != running ]] || kill -TERM "$(<"$run/pid")"
}

action=${1:-}
case $action in
  prepare | start | state | stop)
    shift
    "$action" "$@"
    ;;
  *)
    echo "usage: tpu_worker.sh prepare VOLUME | start COMMAND… | state | stop" >&2
    exit 2
    ;;
esac
