"""The peer of `bench train` and `bench decode`: transformers on PyTorch, used as its documentation does."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from depthlm_jax.batch import Sample
from depthlm_jax.errors import InputError

NAME = "Hugging Face transformers + PyTorch"
LEARNING_RATE, MAX_NORM = 1e-5, 0.1
WEIGHTS = "weights"


def torch_and_transformers() -> tuple:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "bench: the peer needs PyTorch", found="torch is not installed", expected="torch beside transformers",
            fix="pip install torch",
        ) from error  # fmt: skip
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return torch, transformers, Qwen2VLImageProcessorPil


def versions() -> dict[str, str]:
    """Returns those of both lanes' packages."""
    torch, transformers, _ = torch_and_transformers()
    return {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def free_memory() -> None:
    """Gives back what PyTorch keeps of a GPU's memory."""
    torch, _, _ = torch_and_transformers()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Step:
    """Called, it takes a step, waits for it and returns the loss."""

    def __init__(self, run: Callable, torch, device: str):
        self.run, self.torch, self.device = run, torch, device

    def __call__(self) -> float:
        return float(self.run())  # waits

    def peak_gb(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else None


def make_model(folder: Path):
    """Returns (torch, model on its device, device); its random weights are written to the folder's `weights`."""
    torch, transformers, _ = torch_and_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.Qwen2_5_VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with torch.device(device):  # 3B random numbers
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        )
    model.save_pretrained(folder / WEIGHTS)
    return torch, model.to(device), device


def batch_of(folder: Path, images: list[np.ndarray], samples: list[Sample], image_token: int, torch, device: str):
    """Returns the model's inputs: samples padded on the right to the longest one."""
    _, _, processor = torch_and_transformers()
    pixels = processor.from_pretrained(folder)(images, do_resize=False, return_tensors="pt")
    length = max(len(sample.tokens_T) for sample in samples)
    ids, mask = (torch.zeros((len(samples), length), dtype=torch.long) for _ in range(2))
    labels = torch.full((len(samples), length), -100)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.tokens_T)] = torch.tensor(sample.tokens_T)
        mask[row, : len(sample.tokens_T)] = 1
        inside = sample.answer_index_A + 1 < len(sample.tokens_T)  # a prompt has nothing after it
        labels[row, sample.answer_index_A[inside] + 1] = torch.tensor(sample.targets_A[inside]).long()
    inputs = {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"], "mm_token_type_ids": (ids == image_token).int(),
    }  # fmt: skip
    return inputs


def training_step(folder: Path, images: list[np.ndarray], samples: list[Sample], image_token: int, dtype: str) -> Step:
    """Returns the step of a model of this folder's config.json on these samples."""
    torch, model, device = make_model(folder)
    model.train()
    if device == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = batch_of(folder, images, samples, image_token, torch, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device == "cuda")

    def run():
        placed = {name: value.to(device) for name, value in inputs.items()}
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**placed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.detach()

    return Step(run, torch, device)


class Asked:
    """Called, it decodes the answers of a batch of prompts of equal length, greedily, and returns [B, G]."""

    def __init__(
        self, folder: Path, images: list[np.ndarray], prompts: list[Sample], image_token: int, new_tokens: int
    ):
        self.torch, self.model, self.device = make_model(folder)
        self.model.eval()
        self.inputs = batch_of(folder, images, prompts, image_token, self.torch, self.device)
        del self.inputs["labels"]
        self.new_tokens = new_tokens

    def __call__(self) -> np.ndarray:
        placed = {name: value.to(self.device) for name, value in self.inputs.items()}
        with self.torch.no_grad():
            out = self.model.generate(
                **placed, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens, do_sample=False
            )
        return out[:, self.inputs["input_ids"].shape[1] :].cpu().numpy()
