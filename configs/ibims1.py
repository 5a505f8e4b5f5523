"""A tiny model on real photographs: shows that real records go the whole way; it does not learn to measure from them.

    python -m depthlm_jax train --config=configs/ibims1.py --workdir=runs/ibims1 \
        --config.data.sources.main.path=FOLDER/ibims1_subset.jsonl

Any .jsonl of DepthLM records will do. Patches, windows and packing are those of the 3B recipe, at a third of its focal
length. Two CPU cores, about a minute; the loss falls below 2 in 60 steps.
"""

from depthlm_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()

    config.model.random_weights = True
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.model.hf_config = dict(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=4096,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=False, initializer_range=0.05,
        vision_config=dict(
            depth=4, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=64, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1, 3], in_chans=3,
            hidden_act="silu", tokens_per_second=2,
        ),
    )  # fmt: skip

    config.data.geometry.focal_px = 333.0
    config.data.geometry.crop_width = (224, 336)
    config.data.geometry.crop_height = (168, 252)
    config.data.global_batch_rows = 4
    config.data.max_tokens = 2 * (12 * 9 + 116)
    config.data.max_patches = 2 * 9 * 64
    config.data.max_answer_tokens = 84
    config.data.read_threads = 2

    config.optim.learning_rate = 3e-3
    config.optim.max_grad_norm = 1.0
    config.train.max_steps = 60
    config.train.save_steps = 60
    config.train.logging_steps = 5

    config.eval.samples = 40
    config.eval.batch_rows = 4
    return config
