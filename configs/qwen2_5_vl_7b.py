"""DepthLM 7B: Qwen2.5-VL-7B-Instruct, focal length 1000 px, red arrow.

    python -m depthlm_jax train --config=configs/qwen2_5_vl_7b.py --workdir=runs/7b \
        --config.model.hf_dir=Qwen2.5-VL-7B-Instruct --config.data.sources.main.path=train.jsonl

The paper's result: average δ1 0.838 over eight evaluation sets.
"""

from depthlm_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()

    config.model.hf_config = dict(  # as published; the folder's own config.json is what a run reads
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=128000, vocab_size=152064,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, tie_word_embeddings=False,
        model_type="qwen2_5_vl", image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653, bos_token_id=151643, eos_token_id=151645, torch_dtype="bfloat16",
        vision_config=dict(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
            in_chans=3, hidden_act="silu", tokens_per_second=2,
        ),
    )  # fmt: skip

    # Three samples a row: crops have 900 to 2,058 image tokens, prompt and answer 110. Tokens run out first, 99 % full.
    config.data.max_tokens = 4608
    config.data.max_patches = 298 * 64
    config.data.max_answer_tokens = 192
    config.data.workers = 8  # of each host; a sample takes 15 to 20 ms of one core
    config.data.global_batch_rows = 512  # × 3.0 = 1536 samples

    # Parameters and optimizer are divided among all devices of a slice; each holds one row at a time.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.gradient_accumulation_steps = 0

    # The learning rate of the paper's run is not known. This one is VLM3's for a 4B model at batch 1344.
    config.optim.learning_rate = 5.5e-5
    config.train.max_steps = 22_000  # × 1536 = 34 M samples
    config.train.save_steps = 1000
    return config
