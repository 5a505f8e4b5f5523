"""What XLA is asked for on each platform, and where it keeps compiled programs. All of it stands here."""

from pathlib import Path

import jax

OPTIONS: dict[str, dict[str, bool | str | int]] = {
    "tpu": {
        # Parameters of the next layer are fetched, and gradients of the last one are sent, while a layer computes.
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
    },
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},  # the same, for NCCL
    "cpu": {},
}


def options(platform: str) -> dict[str, bool | str | int]:
    """Returns compiler options for jax.jit on a platform; none for one that is not known."""
    return OPTIONS.get(platform, {})


def keep_programs(folder: str) -> None:
    """Keeps compiled programs in a folder, which may be gs://…, so that the next start finds them; "" does not."""
    if folder:
        place = folder if "://" in folder else str(Path(folder).absolute())
        jax.config.update("jax_compilation_cache_dir", place)
