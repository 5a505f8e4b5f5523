"""DepthLM 12B: Pixtral-12B in transformers' format, focal length 750 px, red arrow.

    python -m depthlm_jax train --config=configs/pixtral_12b.py --workdir=runs/12b \
        --config.model.hf_dir=pixtral-12b --config.data.sources.main.path=train.jsonl

The paper's model: average δ1 0.771 over eight evaluation sets, where the 3B reaches 0.824.
"""

from depthlm_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()

    config.model.family = "pixtral"
    config.model.hf_config = dict(  # as published; the folder's own config.json is what a run reads
        model_type="llava", image_token_index=10, projector_hidden_act="gelu", vision_feature_layer=-1,
        vision_feature_select_strategy="full", torch_dtype="bfloat16",
        text_config=dict(
            model_type="mistral", hidden_size=5120, intermediate_size=14336, num_hidden_layers=40, head_dim=128,
            num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000000.0,
            max_position_embeddings=1024000, vocab_size=131072, sliding_window=None,
        ),
        vision_config=dict(
            model_type="pixtral", head_dim=64, hidden_act="silu", image_size=1024, patch_size=16, rope_theta=10000.0
        ),
    )  # fmt: skip

    # The paper's focal length. Its crops are not known: these are those of 1000 px, scaled; the image processor takes
    # no side above 1024 px.
    config.data.geometry.focal_px = 750.0
    config.data.geometry.crop_width = (750, 1024)
    config.data.geometry.crop_height = (525, 900)

    # Three samples a row: crops have 1,504 to 3,640 image tokens, prompt and answer 110.
    config.data.max_tokens = 8192
    config.data.max_patches = 63 * 128
    config.data.max_answer_tokens = 192
    config.data.workers = 8
    config.data.global_batch_rows = 512

    # Parameters and optimizer are divided among all devices of a slice; each holds one row at a time.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.gradient_accumulation_steps = 0

    # The learning rate of the paper's run is not known. VLM3 uses 5.5e-5 for a 4B model at batch 1344, and wider
    # models want less.
    config.optim.learning_rate = 2e-5
    config.train.max_steps = 22_000
    config.train.save_steps = 1000
    return config
