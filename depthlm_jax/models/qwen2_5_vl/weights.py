"""Every weight once: its path here, its name on the hub, how one becomes the other, and its axes."""

from depthlm_jax.hf import FUSED, FUSED_BIAS, Rule, patch_layout
from depthlm_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from depthlm_jax.models.weights import decoder_rules, gated_mlp_rules, linear_rules, norm_rule

MODULES = {  # beginning of a hub name → in transformers 5
    "visual.": "model.visual.",
    "model.": "model.language_model.",
    "lm_head": "lm_head",
}

PARTS = {  # beginning of paths, in the order of the computation → what they act on, one of data.work's COUNTS
    "visual/patch_embed/": "patches",
    "visual/blocks/": "patches",
    "visual/merger/": "merged",
    "model/layers/": "tokens",
}


def parts(config: Qwen25VLConfig) -> dict[str, str]:
    """Returns PARTS and the head, which may be the embedding."""
    return PARTS | {"model/embed_tokens/" if config.tie_word_embeddings else "lm_head/": "answers"}


def attended(config: Qwen25VLConfig) -> dict[str, int]:
    """Returns the channels, over heads and layers, in which pairs of patches and tokens attend."""
    vision, decoder = config.vision, config.decoder
    full = len(set(vision.fullatt_block_indexes) & set(range(vision.depth)))
    return {
        "image_pairs": full * vision.hidden_size,
        "window_pairs": (vision.depth - full) * vision.hidden_size,
        "token_pairs": decoder.num_hidden_layers * decoder.num_attention_heads * decoder.head_width,
    }


def rules(config: Qwen25VLConfig) -> list[Rule]:
    """Returns the table; one rule for each parameter of a model of this config."""
    block, theirs = "visual/blocks", "visual.blocks.{}"
    patch = patch_layout(config.vision.in_channels, config.vision.patch_size)
    table = [
        Rule("visual/patch_embed/proj/kernel", "visual.patch_embed.proj.weight", patch, "2CD"),
        norm_rule(f"{block}/norm1", f"{theirs}.norm1", "LD"),
        norm_rule(f"{block}/norm2", f"{theirs}.norm2", "LD"),
        Rule(f"{block}/attn/qkv/kernel", f"{theirs}.attn.qkv.weight", FUSED, "LD3H"),
        Rule(f"{block}/attn/qkv/bias", f"{theirs}.attn.qkv.bias", FUSED_BIAS, "L3H"),
        *linear_rules(f"{block}/attn/proj", f"{theirs}.attn.proj", "LHD", bias=True),
        *gated_mlp_rules(f"{block}/mlp", f"{theirs}.mlp", bias=True),
        norm_rule("visual/merger/ln_q", "visual.merger.ln_q"),
        *linear_rules("visual/merger/mlp_0", "visual.merger.mlp.0", "DF", bias=True),
        *linear_rules("visual/merger/mlp_2", "visual.merger.mlp.2", "FD", bias=True),
        *decoder_rules("model", "model", attention_bias=True),
    ]
    return table if config.tie_word_embeddings else [*table, *linear_rules("lm_head", "lm_head", "DV")]
