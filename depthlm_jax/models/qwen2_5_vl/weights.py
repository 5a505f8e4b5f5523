"""Every weight once: its path here, its name on the hub, how one becomes the other, and its axes."""

from depthlm_jax.hf import FUSED, FUSED_BIAS, Rule, patch_layout
from depthlm_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from depthlm_jax.models.weights import decoder_rules, gated_mlp_rules, linear_rules, norm_rule

MODULES = {  # beginning of a hub name → in transformers 5
    "visual.": "model.visual.",
    "model.": "model.language_model.",
    "lm_head": "lm_head",
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
