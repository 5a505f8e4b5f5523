"""What opening a source of many records costs in time and memory, against reading the JSONL into dictionaries.

Each way runs in a process of its own, which says by how much its peak memory grew after the imports.
"""

import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from depthlm_jax.errors import InputError

ROOT = Path(__file__).parents[2]
STATUS = Path("/proc/self/status")
POINTS = 4
PEERS = {"pandas": "pandas.read_json(lines=True).to_dict", "json": "json.loads of each line (pandas is not installed)"}


def measure(records: int) -> dict:
    """Returns seconds and MiB of building the index, opening it again, and the peer; and how much faster opening is.

    Raises:
      InputError: one of them ended early.
    """
    peer = "pandas" if importlib.util.find_spec("pandas") else "json"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        write(file, records)
        built, opened, read = (in_a_process(way, file) for way in ("build", "open", peer))
        file_mib = file.stat().st_size / 2**20
    figures = {"records": records, "file_mib": file_mib, "bytes_per_record": opened["bytes"] / opened["records"]}
    for name, way in (("build", built), ("open", opened), ("peer", read)):
        figures |= {f"{name}_s": way["seconds"], f"{name}_mib": way["mib"]}
    return {"ratio": read["seconds"] / opened["seconds"], "peer": PEERS[peer], **figures}


def write(file: Path, records: int) -> None:
    """Writes a JSONL file of short records; there are no images."""
    with file.open("w") as lines:
        for number in range(records):
            points = [[(37 * number + 411 * k) % 1920, (53 * number + 307 * k) % 1280] for k in range(POINTS)]
            depth_m = [round(1 + (number + k) % 7919 / 97, 3) for k in range(POINTS)]
            camera = [2000 + number % 89, 2000 + number % 97, 959.5, 639.5, 1920, 1280]
            image = f"images/{number // 1000:05}/{number:08}.jpg"
            fields = {"image": image, "intrinsics": camera, "pixel_coords": points, "depth": depth_m}
            lines.write(json.dumps(fields) + "\n")


def in_a_process(way: str, file: Path) -> dict:
    """Returns {"seconds", "mib", "records", "bytes" (of our index)}; what the way imports does not count."""
    command = [sys.executable, "-m", "depthlm_jax.bench.index", way, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(
            f"bench index: {way} ended early", found=f"exit status {done.returncode}: {done.stderr.strip()[-400:]}",
            expected="exit status 0", fix="give fewer --records, or use a machine with more memory",
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _index_reader() -> Callable:
    from depthlm_jax import config
    from depthlm_jax.data import records

    return lambda file: records.open_source(config.Source(path=file)).index


def _pandas_reader() -> Callable:
    import pandas

    return lambda file: pandas.read_json(file, lines=True).to_dict("records")


def _json_reader() -> Callable:
    def read(file: str) -> list[dict]:
        with open(file, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    return read


WAYS = {"build": _index_reader, "open": _index_reader, "pandas": _pandas_reader, "json": _json_reader}


def _run(way: str, file: str) -> dict:
    read = WAYS[way]()  # imports
    before, start = _peak_mib(), time.perf_counter()
    result = read(file)
    seconds = time.perf_counter() - start
    size = 0
    if way in ("build", "open"):
        result["offset"].sum()  # reads each page of a mapped index
        size = result.nbytes
    return {"seconds": seconds, "mib": _peak_mib() - before, "records": len(result), "bytes": size}


def _peak_mib() -> float:
    """Linux hands getrusage's peak down from the parent process, so that it hides all that is smaller."""
    if STATUS.is_file():
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10  # kB there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: in bytes


if __name__ == "__main__":
    print(json.dumps(_run(*sys.argv[1:])))
