#!/usr/bin/env bash
# Runs what must pass before a change is submitted: ruff, then pytest in two processes, on the CPU.
#
#   bash tests/run.sh                          everything but the tests marked slow
#   bash tests/run.sh -k tokenizer -x          arguments go to pytest
#   bash tests/run.sh -m slow                  the slow ones
#
# Needs Python 3.11 or newer and, the first time, a package index (about 2.2 GB in .venv, a few minutes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment tests/requirements.txt

.venv/bin/ruff check .
# loadfile: tests of one file share what they have compiled. The tests' own settings are in tests/conftest.py.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
