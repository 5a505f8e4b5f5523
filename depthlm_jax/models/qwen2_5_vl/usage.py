"""Asks the model how far away a pixel is. Needs torch, numpy, Pillow and transformers 4.51 or newer; nothing else."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file

# Yours: this folder, or its name on the hub; an undistorted image; its fx, fy, cx, cy in px; the x, y of a pixel.
FOLDER = "."
IMAGE = "photo.jpg"
INTRINSICS = (1000.0, 1000.0, 639.5, 479.5)
PIXEL = (640, 480)

# The model's: what it was trained with.
FOCAL_PX = 1000.0
GEOMETRY = "corrected"
MARKER = ((-1, 0), (-2, 0), (-3, 0), (-4, 0), (-5, 0), (-2, -1), (-2, 1), (-3, -2), (-3, 2))
MARKER_SCALE = 1
MARKER_COLOR = (255, 0, 0)
QUESTION = (
    "Given this image, how far is the point pointed by the red arrow from the camera? Output the thinking process in "
    "<think> </think> and final answer (the meter number only, without the unit) in <answer> </answer> tags."
)
MAX_NEW_TOKENS = 64


def prepare(image, intrinsics, pixel, grid):
    """Returns the image at the model's focal length, the marker drawn on the pixel, and the question about it."""
    focal, centre, pixel, sides = (np.array(pair) for pair in (intrinsics[:2], intrinsics[2:], pixel, image.size))
    scale = FOCAL_PX / focal if FOCAL_PX else np.ones(2)
    if GEOMETRY == "official":  # fx scales both axes, and fractions are cut off
        scale = scale[[0, 0]]
        size, place, centre = (sides * scale).astype(int), (pixel * scale).astype(int), centre * scale
    else:  # sides are multiples of the grid; the number of a pixel is that of its centre
        size = grid * np.maximum(1, np.floor(sides * scale / grid + 0.5)).astype(int)
        scale = size / sides
        place, centre = ((at + 0.5) * scale - 0.5 for at in (pixel, centre))
        place = np.clip(np.floor(place + 0.5).astype(int), 0, size - 1)
    (width, height), (x, y), (fx, fy), (cx, cy) = (pair.tolist() for pair in (size, place, focal * scale, centre))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    for dx, dy in MARKER:
        left, top = x + dx * MARKER_SCALE - MARKER_SCALE // 2, y + dy * MARKER_SCALE - MARKER_SCALE // 2
        image.paste(MARKER_COLOR, (left, top, left + MARKER_SCALE, top + MARKER_SCALE))
    nx, ny = (2 * x + 1) * 1000 // width, (2 * y + 1) * 1000 // height  # in [0, 2000)
    words = {"x": x, "y": y, "nx": nx, "ny": ny, "width": width, "height": height}
    return image, QUESTION.format(**words, fx=fx, fy=fy, cx=cx, cy=cy)


def load():
    """Returns the model, its image processor and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, torch_dtype="auto").eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    if not tokenizer.chat_template:  # it has a file of its own
        template = Path(cached_file(FOLDER, "chat_template.json")).read_text()
        tokenizer.chat_template = json.loads(template)["chat_template"]
    return model, AutoImageProcessor.from_pretrained(FOLDER), tokenizer


def ask(model, processor, tokenizer, image, question):
    """Returns the model's answer, token by token the likeliest."""
    resize = {} if GEOMETRY == "official" else {"do_resize": False}
    seen = processor(images=[image], return_tensors="pt", **resize).to(model.device, model.dtype)
    said = {"type": "text", "text": question, "content": question}  # templates know it by either name
    message = {"role": "user", "content": [{"type": "image"}, said]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    merged = seen["image_grid_thw"].prod().item() // model.config.vision_config.spatial_merge_size**2
    prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * merged)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # transformers 5
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        said = model.generate(**inputs, **greedy, max_new_tokens=MAX_NEW_TOKENS)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def parse(answer):
    """Returns the number that fills the last answer tag; None: there is none."""
    numbers = re.findall(r"<answer>\s*(\d+\.?\d*|\.\d+)\s*</answer>", answer)
    return float(numbers[-1]) if numbers else None


if __name__ == "__main__":
    model, processor, tokenizer = load()
    vision = model.config.vision_config
    photo = ImageOps.exif_transpose(Image.open(IMAGE)).convert("RGB")
    seen, question = prepare(photo, INTRINSICS, PIXEL, vision.patch_size * vision.spatial_merge_size)
    answer = ask(model, processor, tokenizer, seen, question)
    print(answer)
    print(parse(answer), "m")
