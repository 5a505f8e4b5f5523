"""Every weight once: its path here, its name on the hub, how one becomes the other, and its axes."""

from depthlm_jax.hf import Layout, Rule
from depthlm_jax.models.pixtral.config import PixtralConfig
from depthlm_jax.models.weights import decoder_rules, gated_mlp_rules, linear_rules, norm_rule

MODULES = {  # beginning of a hub name → in transformers 5
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
}

PARTS = {  # beginning of paths, in the order of the computation → what they act on, one of data.work's COUNTS
    "vision_tower/patch_conv/": "patches",
    "vision_tower/transformer/": "patches",
    "multi_modal_projector/": "merged",
    "language_model/model/layers/": "tokens",
    "language_model/lm_head/": "answers",
}


def parts(config: PixtralConfig) -> dict[str, str]:
    return PARTS


def attended(config: PixtralConfig) -> dict[str, int]:
    """Returns the channels, over heads and layers, in which pairs of patches and tokens attend."""
    vision, decoder = config.vision, config.decoder
    return {
        "image_pairs": vision.num_hidden_layers * vision.hidden_size,
        "token_pairs": decoder.num_hidden_layers * decoder.num_attention_heads * decoder.head_width,
    }


def patch_layout(channels: int, patch: int) -> Layout:
    """Returns Conv2d [D, colour, p, p] ↔ [colour·p·p, D]."""
    return Layout(
        lambda x, s: x.reshape(s[::-1]).T, lambda x, s: x.T.reshape(s), lambda s: (s[1], channels, patch, patch)
    )


def rules(config: PixtralConfig) -> list[Rule]:
    """Returns the table; one rule for each parameter of a model of this config."""
    tower, layer, theirs = "vision_tower", "vision_tower/transformer/layers", "vision_tower.transformer.layers.{}"
    projector = "multi_modal_projector"
    patch = patch_layout(config.vision.num_channels, config.vision.patch_size)
    axes = {"q_proj": "LDH", "k_proj": "LDH", "v_proj": "LDH", "o_proj": "LHD"}
    return [
        Rule(f"{tower}/patch_conv/kernel", f"{tower}.patch_conv.weight", patch, "CD"),
        norm_rule(f"{tower}/ln_pre", f"{tower}.ln_pre"),
        norm_rule(f"{layer}/attention_norm", f"{theirs}.attention_norm", "LD"),
        norm_rule(f"{layer}/ffn_norm", f"{theirs}.ffn_norm", "LD"),
        *(
            rule
            for name, letters in axes.items()
            for rule in linear_rules(f"{layer}/attention/{name}", f"{theirs}.attention.{name}", letters)
        ),
        *gated_mlp_rules(f"{layer}/feed_forward", f"{theirs}.feed_forward"),
        *linear_rules(f"{projector}/linear_1", f"{projector}.linear_1", "DF", bias=True),
        *linear_rules(f"{projector}/linear_2", f"{projector}.linear_2", "FD", bias=True),
        *decoder_rules("language_model/model", "language_model.model", attention_bias=False),
        *linear_rules("language_model/lm_head", "language_model.lm_head", "DV"),
    ]
