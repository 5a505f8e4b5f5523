"""Which mixture of two sources is best on held-out scenes of both? Near: wide angles, rooms; far: long lenses, halls.

    python -m depthlm_jax curate --dataset=synthetic --world=near --train=1000 --validation=100 --output=runs/synthetic
    python -m depthlm_jax curate --dataset=synthetic --world=far --train=1000 --validation=100 --output=runs/synthetic
    python -m depthlm_jax sweep --sweep=configs/sweeps/demo_mixture.py --workdir=runs/demo_mixture
"""

from configs import demo
from depthlm_jax.config import eval_sets, sources
from depthlm_jax.sweep.spec import Sweep, cross, seeds, simplex

SCENES = {name: f"runs/synthetic/{name}_1000_100/synthetic_depth/1.0.0" for name in ("near", "far")}


def get_config(arg: str = ""):
    """Returns the recipe of the runs: the demo's, with two sources and a small budget."""
    config = demo.get_config()
    config.data.sources = sources({name: {"path": path} for name, path in SCENES.items()})
    config.eval.sets = eval_sets(
        {name: {"path": path, "split": "validation", "samples": 256} for name, path in SCENES.items()}
    )
    config.eval.answer_prefix = "<think> The point is around "  # so that only the number is decoded
    config.eval.max_new_tokens = 8
    config.data.geometry.focal_px = 50.0  # images of 48 px: nine image tokens
    config.data.geometry.crop_width = config.data.geometry.crop_height = (48, 48)
    config.data.reference.scale = 1
    config.data.max_tokens = 125
    config.data.max_patches = 64
    config.data.global_batch_rows = 16
    config.optim.learning_rate = 6e-3
    config.train.max_steps = 600
    config.train.save_steps = 200
    return config


def get_sweep() -> Sweep:
    weights = [f"data.sources.{name}.weight" for name in SCENES]
    return Sweep(recipe=__file__, runs=cross(simplex(weights, steps=4), seeds(3)), metric="mean/delta1")
