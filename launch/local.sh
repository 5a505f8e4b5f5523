#!/usr/bin/env bash
# The whole way on one machine: render data, train a tiny model, evaluate it, export it to a Hugging Face folder.
#
# Needs   Python 3.11 or newer, 2 CPU cores, 4 GB of memory, 3 GB of disk; a package index for the first run.
# Does    makes .venv, renders synthetic scenes to runs/synthetic, trains configs/demo.py into runs/demo, writes a table
#         and pictures to runs/demo/evaluation and the model to runs/demo/hf. Run again, it goes on where it stopped.
# Takes   some minutes to install, then what configs/demo.py says at its head.
# Costs   nothing: no accelerator, no account, no download but packages.
#
#   bash launch/local.sh                                    with the recipe as it stands
#   bash launch/local.sh --config.train.seed=1              arguments go to train and evaluate
#   WORKDIR=runs/other bash launch/local.sh                 another folder, counted from the repository
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
workdir=${WORKDIR:-runs/demo}

step() {
  printf '\n=== %s\n' "$1"
}

step "1/5 Python packages"
prepare_environment requirements.txt

step "2/5 data: runs/synthetic"
.venv/bin/python -m depthlm_jax curate --dataset=synthetic --output=runs/synthetic

step "3/5 training: $workdir"
.venv/bin/python -m depthlm_jax train --config=configs/demo.py --workdir="$workdir" "$@"

step "4/5 evaluation: $workdir/evaluation"
.venv/bin/python -m depthlm_jax evaluate --config=configs/demo.py --workdir="$workdir" --output="$workdir/evaluation" "$@"

step "5/5 export: $workdir/hf"
.venv/bin/python -m depthlm_jax export --workdir="$workdir" --output="$workdir/hf"

step "done"
echo "Loss curve:           $workdir/loss.png"
echo "Held-out images:      $workdir/evaluation/answers.png (marker, truth, answer)"
echo "Answer against truth: $workdir/evaluation/scatter.png"
echo "Table, predictions:   $workdir/evaluation/metrics.json, predictions.jsonl"
echo "Hugging Face folder:  $workdir/hf"
