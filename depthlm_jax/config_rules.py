"""What values the fields of a recipe may have."""

TASKS = ("distance", "axis_distance", "speed", "time", "two_points", "translation")
MARKERS, TEXT_MODES = ("arrow", "dot", "cross", "square"), ("text_raw", "text_norm")
COLORS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "magenta": (255, 0, 255),
    "cyan": (0, 255, 255), "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
CHOICES = {  # "*" stands for such a name
    **dict.fromkeys(("model.compute_dtype", "train.accumulation_dtype"), ("bfloat16", "float32")),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
    "model.remat": ("full", "attended", "dots", "none"),
    "optim.name": ("adamw", "adafactor", "lion", "muon"),
    **dict.fromkeys(("data.sources.*.depth_kind", "eval.source.depth_kind", "eval.sets.*.depth_kind"), ("z", "ray")),
    "eval.task": TASKS,
    "data.geometry.mode": ("corrected", "official"),
    "data.geometry.crop_position": ("random", "centred"),
    "data.label_kind": ("z", "ray", "official"),
    "data.camera_hint": ("none", "intrinsics", "ray"),
    "data.reference.mode": (*MARKERS, *TEXT_MODES),
    "data.reference.color": tuple(COLORS),
    "data.reference.layout": ("independent", "conversation"),
    "train.loss_on": ("answer", "official"),
}
COUNT, AMOUNT = (1, 2**31 - 1), (0, 2**31 - 1)
COUNTS = (
    "data.reference.scale", "data.reference.questions", "data.global_batch_rows", "data.max_tokens",
    "data.max_patches", "data.max_answer_tokens", "train.max_steps", "train.save_steps", "train.logging_steps",
    "eval.samples", "eval.sets.*.samples", "eval.batch_rows", "eval.max_new_tokens", "model.lora.rank", "model.unroll",
    "train.keep_last", "faults.skipped_steps", "faults.failed_saves", "faults.start_seconds",
)  # fmt: skip
AMOUNTS = (
    "model.seed", "train.seed", "eval.seed", "data.max_bad_records", "data.read_threads", "data.prefetch_rows",
    "data.geometry.focal_px", "train.digit_weight", "optim.learning_rate", "optim.weight_decay", "data.workers",
    "data.mixture.size_cap", "data.sources.*.weight", "model.lora.alpha", "train.gradient_accumulation_steps",
    "mesh.replica", "optim.groups.*.factor", "faults.silent_seconds",
    "train.keep_every", "eval.sets.*.every_steps",
)  # fmt: skip
RANGES = {  # of numbers, both ends included
    **dict.fromkeys(COUNTS, COUNT),
    **dict.fromkeys([*AMOUNTS, *(f"data.tasks.{name}" for name in TASKS)], AMOUNT),
    "data.mixture.size_exponent": (0, 1), "data.geometry.flip": (0, 1), "eval.source.fov_degrees": (0, 179),
    "data.sources.*.fov_degrees": (0, 179), "eval.sets.*.fov_degrees": (0, 179), "optim.warmup_ratio": (0, 1),
    "optim.adam_b1": (0, 1),
    "optim.adam_b2": (0, 1), "optim.adam_eps": (0, 1), "optim.max_grad_norm": (1e-12, 2**31 - 1),
}  # fmt: skip
# What an evaluation measures, and which way is better.
HIGHER = ("delta1", "delta2", "delta3", "delta1_per_image")
LOWER = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "parse_failure_rate")
