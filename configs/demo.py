"""A tiny DepthLM on rendered scenes: two CPU cores, minutes.

    bash launch/local.sh

Expected on held-out scenes: see the README.
"""

from depthlm_jax.config import default_config

SCENES = "runs/synthetic/3000_300/synthetic_depth/1.0.0"  # what curate wrote


def get_config(arg: str = ""):
    config = default_config()

    config.model.random_weights = True
    config.model.compute_dtype = "float32"  # CPUs have no fast bfloat16
    config.model.remat = "none"  # memory is no concern
    config.model.hf_config = dict(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=4096,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]}, tie_word_embeddings=True, initializer_range=0.08,
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=64, patch_size=8,
            spatial_merge_size=2, temporal_patch_size=2, window_size=32, fullatt_block_indexes=[1], in_chans=3,
            hidden_act="silu", tokens_per_second=2,
        ),
    )  # fmt: skip

    config.data.sources.main.path = SCENES
    config.eval.source.path = SCENES
    config.eval.source.split = "validation"
    config.data.geometry.focal_px = 82.0  # the scenes' images become 80 or 96 px wide and high
    config.data.geometry.crop_width = (80, 112)
    config.data.geometry.crop_height = (80, 112)
    config.data.reference.scale = 2  # an arrow large enough for 8-px patches

    config.data.global_batch_rows = 64
    config.data.max_tokens = 160
    config.data.max_patches = 144
    config.data.max_answer_tokens = 40
    config.data.read_threads = 2
    config.data.prefetch_rows = 128

    config.optim.learning_rate = 3e-3
    config.optim.max_grad_norm = 1.0
    config.optim.adam_b2 = 0.98
    config.train.max_steps = 600
    config.train.save_steps = 200
    config.train.logging_steps = 20
    config.train.digit_weight = 5.0

    config.eval.samples = 512
    config.eval.batch_rows = 64
    return config
