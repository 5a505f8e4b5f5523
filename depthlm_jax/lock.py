"""One run at a time on a workdir."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from depthlm_jax import log
from depthlm_jax.errors import InputError

UNSUPPORTED = "file systems without locks cannot tell that a second run uses this folder"


def hold(workdir: Path, otherwise: str = "another run trains here") -> IO[str]:
    """Returns an open file that keeps other runs away until it is closed or the process ends, however it ends.

    Args:
      workdir: that is kept.
      otherwise: what the error says.

    Raises:
      InputError: another process holds it.
    """
    file = (workdir / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
            f"{workdir}: {otherwise}", found=holder, expected="one at a time",
            fix="wait for it or end it, or give another --workdir",
        ) from error  # fmt: skip
    except OSError as error:
        log.say(f"warning: {workdir} cannot be locked ({error}): {UNSUPPORTED}")
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
    file.flush()
    return file
