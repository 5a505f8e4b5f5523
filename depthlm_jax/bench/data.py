"""How many images a second one core makes samples of, against a plain path and against decoding alone.

Ours is what a training row does for a sample except reading the file: encoded bytes → planned view → decoded no larger
than the view shows → one resample → marker, question and answer → tokens, positions, packed uint8 patches. The plain
path opens the same bytes, resizes the whole image to the focal length, crops, marks, and calls Hugging Face's image
processor and tokenizer; view, point and texts are given to it. Its crops are cut on the patch grid where they can be.

Time is CPU time of the process, pinned to one core: what else the machine does counts little.

The floor is decoding at the size that the view needs, and one pass over the output, about 3 MB of patches: under 1 ms.
From it about 8 × the plain path was predicted. Measured, on a shared core: 4.3 × for 640×480 PNG files, whose decoding
is 60 % of our time and in both paths, and 5.0 × for 1920×1280 JPEG files, which we decode at half size.
"""

import contextlib
import dataclasses
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import transformers
from PIL import Image

from depthlm_jax import config as config_module
from depthlm_jax.data import camera, images, pipeline, plan, reference, tasks, transforms
from depthlm_jax.data import index as record_index
from depthlm_jax.data.depth_record import DepthRecord
from depthlm_jax.data.records import Records, open_source
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry

PEER = "PIL + Hugging Face image processor"
FAMILY, SOURCE = "qwen2_5_vl", "main"
MOST_IMAGES = 32  # of --images
SYNTHETIC_IMAGES, SYNTHETIC_PX, SYNTHETIC_FOCAL_PX, SYNTHETIC_POINTS = 8, (1920, 1280), 2000.0, 64
JPEG_QUALITY = 90
CELLS_PX = (128, 64, 32, 16, 8, 4, 2)  # of the noise in them
MARKER_PX = 6  # that the arrow needs to the right of and below its point
IMAGE_TOKEN, TURN_END = "<|image_pad|>", "<|im_end|>"
HF_CONFIG = {  # only the patches' sizes matter, which are the published ones; there are no weights
    "model_type": "qwen2_5_vl", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "vision_config": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [0],
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Held:
    """Records in memory."""

    records: list[DepthRecord]
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> DepthRecord:
        return self.records[index]


@dataclasses.dataclass(frozen=True)
class Paths:
    """Both ways from a planned slot to a sample."""

    maker: pipeline.SampleMaker
    image_processor: transformers.Qwen2VLImageProcessorPil

    def plain(self, record: DepthRecord, view: camera.View, question: transforms.Question) -> tuple[dict, dict]:
        """Returns what Hugging Face's image processor and tokenizer return."""
        data, tokenizer = self.maker.config.data, self.maker.processor.tokenizer
        seen, scale = view.camera, data.geometry.focal_px / view.source.fx
        whole = round(view.source.width * scale), round(view.source.height * scale)
        image = Image.open(io.BytesIO(record.image)).convert("RGB").resize(whole, Image.Resampling.BICUBIC)
        width, height = min(seen.width, whole[0]), min(seen.height, whole[1])
        left, top = (round(edge * scale) for edge in view.box[:2])
        left, top = min(left, whole[0] - width), min(top, whole[1] - height)
        crop = np.asarray(image.crop((left, top, left + width, top + height)))
        points = np.minimum(question.pixels, np.array([width, height]) - MARKER_PX)
        marked = reference.draw(crop, points, data.reference.mode, data.reference.scale, data.reference.color)
        patches = self.image_processor(images=[Image.fromarray(marked)], return_tensors="np")
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        merged = int(np.prod(patches["image_grid_thw"])) // self.maker.processor.config.patches_per_merged
        return patches, tokenizer(f"{chat}{question.answer}{TURN_END}".replace(IMAGE_TOKEN, IMAGE_TOKEN * merged))

    def lanes(self, slot: plan.Slot) -> dict[str, Callable[[], object]]:
        """Returns what is timed of a slot; `encode` is patches and tokens together."""
        maker, record = self.maker, self.maker.sources[slot.source][slot.record]
        processor, opened = maker.processor, images.open_image(record)
        source = camera.Camera(*record.intrinsics.tolist(), *opened.size)
        view = camera.plan_view(source, maker.config.data.geometry, processor.config.grid_px, slot.chance)
        pixels, example = opened.pixels(view.reduction), maker.example(slot)
        turns = [(question.text, question.answer) for question in example.questions]
        return {
            "ours": lambda: maker(slot),
            "plain": lambda: self.plain(record, view, example.questions[0]),
            "decode": lambda: np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB")),
            "decoding": lambda: images.open_image(record).pixels(view.reduction),
            "resample": lambda: camera.apply_view(view, *pixels),
            "encode": lambda: processor.encode(example.images, turns),
            "tokens": lambda: processor.encode([], turns),
        }


def measure(source: Records, repeats: int) -> dict:
    """Returns images per second of each path, their ratio, and what our time is spent on in ms an image.

    Args:
      source: records in memory.
      repeats: passes over all of them, each with all paths in turn; medians of the passes count.

    Raises:
      InputError: no record gives a sample.
    """
    with tempfile.TemporaryDirectory() as folder, one_core():
        paths = paths_of(source, Path(folder))
        slots = planned(paths.maker, source)
        for path in paths.lanes(slots[0]).values():  # what is loaded or made once
            path()
        passes = [time_lanes(paths, slots) for _ in range(repeats)]
    ms = {lane: 1000 * statistics.median(one[lane] for one in passes) / len(slots) for lane in passes[0]}
    spent = {"decoding": ms["decoding"], "resample": ms["resample"], "patches": ms["encode"] - ms["tokens"]}
    spent["tokens"], spent["rest"] = ms["tokens"], ms["ours"] - ms["decoding"] - ms["resample"] - ms["encode"]
    return {
        "images": len(slots), "ours_images_s": 1000 / ms["ours"], "plain_images_s": 1000 / ms["plain"],
        "ratio": ms["plain"] / ms["ours"], "decode_images_s": 1000 / ms["decode"],
        "of_decoding_alone": ms["decode"] / ms["ours"], "ours_ms": ms["ours"], "parts_ms": spent,
    }  # fmt: skip


def paths_of(source: Records, folder: Path) -> Paths:
    """Returns the paths with the sizes of Qwen2.5-VL and the geometry of the 3B recipe; writes to the folder."""
    family, texts = registry.family(FAMILY), ["system\n", "user\n", "assistant\n", tasks.SYSTEM, tasks.QUESTION]
    family.write_scratch(HF_CONFIG, [*texts, tasks.answer_text(1.23)], folder)
    maker = pipeline.SampleMaker({SOURCE: source}, family.processor(folder), config_module.Config())
    return Paths(maker, transformers.Qwen2VLImageProcessorPil.from_pretrained(folder))


def planned(maker: pipeline.SampleMaker, source: Records) -> list[plan.Slot]:
    """Returns the first slots of training, one a record; those that give no sample are left out."""
    shape = pipeline.row_shape(maker.config.data, maker.processor.config)
    slots = plan.SourcePlan(SOURCE, source, plan.Sizer(maker.processor, maker.config, shape), maker.config)
    made = {draw: maker(slots.slot(draw)) for draw in range(len(source))}
    reasons = [f"{one.record_id}: {one.reason}" for one in made.values() if isinstance(one, pipeline.Dropped)]
    if len(reasons) == len(made):
        raise InputError(
            "bench data: no sample", found=reasons[0], expected="at least one record that gives a sample",
            fix="give other --images",
        )  # fmt: skip
    return [slots.slot(draw) for draw, one in made.items() if not isinstance(one, pipeline.Dropped)]


def time_lanes(paths: Paths, slots: list[plan.Slot]) -> dict[str, float]:
    """Returns CPU seconds of each lane over all slots; the lanes take turns at each slot."""
    seconds: dict[str, float] = {}
    for slot in slots:
        for lane, path in paths.lanes(slot).items():
            start = time.process_time()
            path()
            seconds[lane] = seconds.get(lane, 0.0) + time.process_time() - start
    return seconds


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this thread on one core, where the system lets it be chosen."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def real(path: str) -> Held:
    """Returns the first records of a .jsonl file or of a prepared TFDS data set; raises InputError as readers do."""
    source = open_source(config_module.Source(path=path), field="--images")
    count = min(len(source), MOST_IMAGES)
    return Held([source[number] for number in range(count)], source.index[:count])


def synthetic() -> Held:
    """Returns JPEG files of 1/f noise, which are about as large as photographs of this size."""
    (width, height), focal = SYNTHETIC_PX, SYNTHETIC_FOCAL_PX
    found = []
    for number in range(SYNTHETIC_IMAGES):
        rng = np.random.default_rng(number)
        pixel_coords = rng.uniform(0, np.array(SYNTHETIC_PX) - 1, (SYNTHETIC_POINTS, 2)).round()
        found.append(
            DepthRecord(
                f"synthetic:{number}", jpeg(rng), np.array([focal, focal, (width - 1) / 2, (height - 1) / 2]),
                pixel_coords, rng.uniform(1.0, 80.0, SYNTHETIC_POINTS), "z", "synthetic", SYNTHETIC_PX,
            )
        )  # fmt: skip
    index = np.zeros(len(found), record_index.ROW)
    for name, value in {"fx": focal, "fy": focal, "width": width, "height": height}.items():
        index[name] = value
    return Held(found, index)


def jpeg(rng: np.random.Generator) -> bytes:
    """Returns an encoded image whose detail grows with its scale, as that of photographs does."""
    width, height = (side // CELLS_PX[0] for side in SYNTHETIC_PX)
    image_3HW = np.full((3, height, width), 128.0)
    for cell in CELLS_PX:
        _, height, width = image_3HW.shape
        grey_1HW, colour_3HW = rng.normal(size=(1, height, width)), rng.normal(size=(3, height, width))
        image_3HW += 6 * cell**0.35 * (grey_1HW + 0.3 * colour_3HW)
        planes = [Image.fromarray(plane_HW) for plane_HW in image_3HW.astype(np.float32)]
        image_3HW = np.stack([plane.resize((2 * width, 2 * height), Image.Resampling.BICUBIC) for plane in planes])
    image_HW3, file = np.moveaxis(image_3HW.clip(0, 255).astype(np.uint8), 0, -1), io.BytesIO()
    Image.fromarray(image_HW3).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
