"""Rules of the parts that the families share; a rule is explained in hf.py."""

from depthlm_jax.hf import LINEAR, SAME, Rule


def linear_rules(path: str, tensor: str, axes: str, *, bias: bool = False) -> list[Rule]:
    """Returns the rule of a kernel of axes such as 'LDH', and of its bias."""
    kernel = Rule(f"{path}/kernel", f"{tensor}.weight", LINEAR, axes)
    return [kernel, Rule(f"{path}/bias", f"{tensor}.bias", SAME, axes[:-2] + axes[-1])] if bias else [kernel]


def norm_rule(path: str, tensor: str, axes: str = "D") -> Rule:
    return Rule(f"{path}/scale", f"{tensor}.weight", SAME, axes)


def decoder_rules(path: str, tensor: str, *, attention_bias: bool) -> list[Rule]:
    """Returns the rules of a Decoder that stands at `path` here and at `tensor` there."""
    layer, theirs = f"{path}/layers", f"{tensor}.layers.{{}}"
    return [
        Rule(f"{path}/embed_tokens/embedding", f"{tensor}.embed_tokens.weight", SAME, "VD"),
        norm_rule(f"{layer}/input_layernorm", f"{theirs}.input_layernorm", "LD"),
        norm_rule(f"{layer}/post_attention_layernorm", f"{theirs}.post_attention_layernorm", "LD"),
        *(
            rule
            for name in ("q_proj", "k_proj", "v_proj")
            for rule in linear_rules(
                f"{layer}/self_attn/{name}", f"{theirs}.self_attn.{name}", "LDH", bias=attention_bias
            )
        ),
        *linear_rules(f"{layer}/self_attn/o_proj", f"{theirs}.self_attn.o_proj", "LHD"),
        *gated_mlp_rules(f"{layer}/mlp", f"{theirs}.mlp"),
        norm_rule(f"{path}/norm", f"{tensor}.norm"),
    ]


def gated_mlp_rules(path: str, tensor: str, *, bias: bool = False) -> list[Rule]:
    axes = {"gate_proj": "LDF", "up_proj": "LDF", "down_proj": "LFD"}
    return [
        rule
        for name, letters in axes.items()
        for rule in linear_rules(f"{path}/{name}", f"{tensor}.{name}", letters, bias=bias)
    ]
