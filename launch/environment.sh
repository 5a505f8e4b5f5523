# shellcheck shell=bash
# Sourced from the repository root by the scripts that need Python packages.

# prepare_environment FILE: makes .venv where there is none and installs the requirements FILE into it, again only when
# they or the interpreter have changed. PYTHON names the interpreter (default python3).
prepare_environment() {
  local requirements=$1 python=${PYTHON:-python3} stamp wanted
  if [[ ! -x .venv/bin/python ]]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "depthlm_jax needs Python 3.11 or newer; '$python' is $("$python" --version 2>/dev/null || echo "not there")." >&2
      echo "Name another one: PYTHON=python3.12 bash $0" >&2
      return 1
    fi
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv || { rm -rf .venv; return 1; }
  fi
  stamp=.venv/installed-${requirements//\//-}
  wanted=$(cat requirements.txt "$requirements" .venv/pyvenv.cfg | cksum)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "Installing $requirements into .venv (the first time takes some minutes)"
    .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$requirements" || return 1
    echo "$wanted" >"$stamp"
  fi
}
