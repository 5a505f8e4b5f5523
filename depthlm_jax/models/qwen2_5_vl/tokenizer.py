"""Qwen2.5's tokenizer, apart from its vocabulary."""

from depthlm_jax.models.tokenizer import Format

# One turn: <|im_start|>role, newline, content, <|im_end|>, newline. Source: Qwen2.5-VL's model card and config files.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}"
    "{% else %}{{ raise_exception('a content item is an image or a text, not: ' + item['type']) }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMAT = Format(
    # Source: transformers, tokenization_qwen2.py. Each digit (\p{N}) is a piece of its own.
    pieces=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    composed=True,
    whole_words=False,
    special_tokens=(
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
        "<|image_pad|>", "<|video_pad|>",
    ),
    roles={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    chat_template=CHAT_TEMPLATE,
    tokenizer_class="Qwen2Tokenizer",
)  # fmt: skip
