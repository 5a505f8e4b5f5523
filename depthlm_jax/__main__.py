"""The command line: python -m depthlm_jax <command> --config=… --workdir=…"""

import importlib
import os
import sys
import traceback

COMMANDS = {
    "train": "fine-tune on a mesh, from a Hugging Face folder or from random weights; continues by itself",
    "evaluate": "greedy answers on an evaluation set: metrics, predictions, pictures",
    "export": "checkpoint (or Hugging Face folder) → Hugging Face folder that PyTorch loads",
    "verify": "a Hugging Face folder in PyTorch and in JAX, side by side",
    "preview": "training samples exactly as the model sees them, mixture and fill of rows, as one HTML page",
    "report": "one HTML page about a run: curves, scores, answers, mixture, time; several runs are compared",
    "plan": "the training step, compiled for a TPU slice that need not be there: memory, traffic, best speed",
    "launch": "train on a cluster: a SLURM job, a JobSet on Kubernetes, Cloud TPU slices; or print what would run",
    "sweep": "many runs of a recipe, here or on a cluster, and the table and pictures that compare them",
    "curate": "a data set → records on disk",
    "bench": "the measurements that the README quotes, each against a named peer: bench train, decode, data, …",
}


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 done, 1 a named error, 2 wrong usage."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        lines = [f"  {command:10} {text}" for command, text in COMMANDS.items()]
        print("\n".join(["usage: python -m depthlm_jax <command> [--help] [--flag=value …]", "", *lines]))
        if name in ("", "--help", "-h"):
            return 0
        print(f"\nunknown command {name!r}", file=sys.stderr)
        return 2
    return importlib.import_module("depthlm_jax.cli.command").run(name, COMMANDS[name], arguments[1:])


def leave(status: int) -> None:
    """Ends the program; after an error at once: threads, and JAX for other processes, may wait for what never comes."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)


if __name__ == "__main__":
    try:
        leave(main(sys.argv[1:]))
    except Exception:  # noqa: BLE001 is shown as Python would, which then would wait
        traceback.print_exc()
        leave(1)
