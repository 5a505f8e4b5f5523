"""A Hugging Face folder in PyTorch and in JAX, side by side, float32."""

import importlib.util
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from depthlm_jax import sharding
from depthlm_jax.batch import RowShape, Sample
from depthlm_jax.config import Mesh
from depthlm_jax.data import packing, tasks
from depthlm_jax.errors import InputError
from depthlm_jax.eval import decode
from depthlm_jax.models import registry
from depthlm_jax.run import host_device, import_parameters
from depthlm_jax.train.step import answer_loss

CELLS = ((9, 13), (11, 8))  # rows and columns of merged patches of the two test images
DEPTHS_M = (1.87, 24.6)
NEW_TOKENS = 32
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}  # whatever
# generation_config.json says


def verify(folder: Path) -> dict[str, float | bool]:
    """Returns how far JAX is from PyTorch: max_abs_logit_diff, kl (nat), loss_diff, greedy_equal.

    Compared at every text position of two conversations with images of different sizes.

    Raises:
      InputError: torch is not installed, or the folder is not complete.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "verify needs PyTorch", found="no package torch", expected="torch beside jax",
            fix="pip install torch (the CPU build is enough)",
        )  # fmt: skip
    family_name = registry.family_of(folder)
    processor = registry.family(family_name).processor(folder)
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (rows * processor.config.grid_px, columns * processor.config.grid_px, 3), dtype=np.uint8)
        for rows, columns in CELLS
    ]
    ours, ours_greedy = _run_jax(folder, family_name, processor, images)
    theirs, theirs_greedy = _run_torch(folder, processor, images)
    pairs = list(zip(ours, theirs, strict=True))
    losses = [
        [_loss(side, processor, image, m) for side in pair]
        for pair, image, m in zip(pairs, images, DEPTHS_M, strict=True)
    ]
    return {
        "max_abs_logit_diff": float(max(np.abs(a - b).max() for a, b in pairs)),
        "kl": float(np.mean([_kl(b, a) for a, b in pairs])),
        "loss_diff": float(max(abs(a - b) for a, b in losses)),
        "greedy_equal": ours_greedy == theirs_greedy,
    }


def _sample(processor, image: np.ndarray, depth_m: float) -> Sample:
    return processor.encode([image], [(tasks.QUESTION, tasks.answer_text(depth_m))], loss_on="official")


def _row(sample: Sample, processor) -> dict[str, np.ndarray]:
    shape = RowShape(len(sample.tokens_T), len(sample.patches_PC), len(sample.targets_A), processor.config.channels)
    return packing.stack([packing.pack([sample], shape, processor.config.patches_per_merged)])


def _run_jax(folder: Path, family_name: str, processor, images) -> tuple[list[np.ndarray], list[list[int]]]:
    network = registry.build(family_name, processor.config)
    mesh = sharding.make_mesh(Mesh(1, 1, 1), host_device(), rows=1, heads={})  # accelerators round float32
    parameters = import_parameters(network, folder, mesh)
    greedy = decode.make_greedy(network, jnp.float32, NEW_TOKENS, processor.stop_tokens)
    logits, tokens = [], []
    for image, depth_m in zip(images, DEPTHS_M, strict=True):
        logits.append(
            np.asarray(jax.jit(network.logits)(parameters, _row(_sample(processor, image, depth_m), processor))[0])
        )
        prompt = _row(processor.encode([image], [(tasks.QUESTION, None)]), processor)
        tokens.append(decode.cut(np.asarray(greedy(parameters, prompt))[0], processor.stop_tokens))
    return logits, tokens


def _run_torch(folder: Path, processor, images) -> tuple[list[np.ndarray], list[list[int]]]:
    import torch

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    logits, tokens = [], []
    for image, depth_m in zip(images, DEPTHS_M, strict=True):
        seen = {name: torch.tensor(value) for name, value in pixels(images=[image], return_tensors="np").items()}
        whole, prompt = _sample(processor, image, depth_m), processor.encode([image], [(tasks.QUESTION, None)])
        with torch.no_grad():
            row = model(**_torch_inputs(model, whole, processor), **seen).logits[0].numpy()
            said = model.generate(
                **_torch_inputs(model, prompt, processor), **seen, max_new_tokens=NEW_TOKENS, **GREEDY,
                eos_token_id=list(processor.stop_tokens), pad_token_id=processor.pad_token,
            )  # fmt: skip
        logits.append(row[whole.answer_index_A])
        tokens.append(said[0, len(prompt.tokens_T) :].tolist())
    return logits, tokens


def _torch_inputs(model, sample: Sample, processor) -> dict:
    import torch

    ids = torch.tensor(sample.tokens_T[None])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == processor.config.image_token_id).long()
    return inputs


def _loss(logits_AV: np.ndarray, processor, image: np.ndarray, depth_m: float) -> float:
    sample = _sample(processor, image, depth_m)
    sums = answer_loss(jnp.asarray(logits_AV[None]), sample.targets_A[None], sample.weights_A[None])
    return float(sums["loss"] / sums["weight"])


def _kl(p_AV: np.ndarray, q_AV: np.ndarray) -> float:
    """Returns the mean over positions of KL(p ‖ q), in nat; float64, since it is smaller than float32 resolves."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (np.float64(p_AV), np.float64(q_AV)))
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))
