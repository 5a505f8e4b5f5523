"""Every weight once: its path here, its name on the hub, how one becomes the other, and its axes."""

from depthlm_jax.hf import FUSED, FUSED_BIAS, LINEAR, SAME, Rule, patch_layout
from depthlm_jax.models.qwen2_5_vl.config import Qwen25VLConfig


def _linear(path: str, tensor: str, axes: str) -> list[Rule]:
    """Kernel of axes such as 'LDH', and its bias."""
    return [
        Rule(f"{path}/kernel", f"{tensor}.weight", LINEAR, axes),
        Rule(f"{path}/bias", f"{tensor}.bias", SAME, axes.replace(axes[-2:], axes[-1])),
    ]


def rules(config: Qwen25VLConfig) -> list[Rule]:
    """Returns the table; one rule for each parameter of a model of this config."""
    v, b, t, d = "visual", "visual.blocks.{}", "model/layers", "model.layers.{}"
    patch = patch_layout(config.vision.in_channels, config.vision.patch_size)
    table = [
        Rule(f"{v}/patch_embed/proj/kernel", "visual.patch_embed.proj.weight", patch, "2CD"),
        Rule(f"{v}/blocks/norm1/scale", f"{b}.norm1.weight", SAME, "LD"),
        Rule(f"{v}/blocks/norm2/scale", f"{b}.norm2.weight", SAME, "LD"),
        Rule(f"{v}/blocks/attn/qkv/kernel", f"{b}.attn.qkv.weight", FUSED, "LD3H"),
        Rule(f"{v}/blocks/attn/qkv/bias", f"{b}.attn.qkv.bias", FUSED_BIAS, "L3H"),
        *_linear(f"{v}/blocks/attn/proj", f"{b}.attn.proj", "LHD"),
        *_linear(f"{v}/blocks/mlp/gate_proj", f"{b}.mlp.gate_proj", "LDF"),
        *_linear(f"{v}/blocks/mlp/up_proj", f"{b}.mlp.up_proj", "LDF"),
        *_linear(f"{v}/blocks/mlp/down_proj", f"{b}.mlp.down_proj", "LFD"),
        Rule(f"{v}/merger/ln_q/scale", "visual.merger.ln_q.weight", SAME, "D"),
        *_linear(f"{v}/merger/mlp_0", "visual.merger.mlp.0", "DF"),
        *_linear(f"{v}/merger/mlp_2", "visual.merger.mlp.2", "FD"),
        Rule("model/embed_tokens/embedding", "model.embed_tokens.weight", SAME, "VD"),
        Rule(f"{t}/input_layernorm/scale", f"{d}.input_layernorm.weight", SAME, "LD"),
        Rule(f"{t}/post_attention_layernorm/scale", f"{d}.post_attention_layernorm.weight", SAME, "LD"),
        *_linear(f"{t}/self_attn/q_proj", f"{d}.self_attn.q_proj", "LDH"),
        *_linear(f"{t}/self_attn/k_proj", f"{d}.self_attn.k_proj", "LDH"),
        *_linear(f"{t}/self_attn/v_proj", f"{d}.self_attn.v_proj", "LDH"),
        Rule(f"{t}/self_attn/o_proj/kernel", f"{d}.self_attn.o_proj.weight", LINEAR, "LHD"),
        Rule(f"{t}/mlp/gate_proj/kernel", f"{d}.mlp.gate_proj.weight", LINEAR, "LDF"),
        Rule(f"{t}/mlp/up_proj/kernel", f"{d}.mlp.up_proj.weight", LINEAR, "LDF"),
        Rule(f"{t}/mlp/down_proj/kernel", f"{d}.mlp.down_proj.weight", LINEAR, "LFD"),
        Rule("model/norm/scale", "model.norm.weight", SAME, "D"),
    ]
    head = Rule("lm_head/kernel", "lm_head.weight", LINEAR, "DV")
    return table if config.tie_word_embeddings else [*table, head]
