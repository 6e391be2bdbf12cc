"""The training step as one would write it: a plain PEFT loop, the yardstick beside which train.py's step is timed."""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

PREFIX = "Instruct: Given a description of music, find the recordings that it describes\nQuery:"


class PlainLoop:
    """LoRA on all linear layers, bf16 base, gradient checkpointing, batches of 32, 8 of them a step, AdamW."""

    def __init__(self, folder: Path, audio_dim: int, device: torch.device):
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            base = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        base.config.use_cache = False
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
        self.model = get_peft_model(base, lora).train()
        width = base.config.hidden_size
        self.head = nn.Sequential(nn.Linear(width, 1024), nn.GELU(), nn.Dropout(0.1), nn.Linear(1024, audio_dim))
        self.head.to(device)
        trained = [each for each in (*self.model.parameters(), *self.head.parameters()) if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.1)

    def step(self, texts: list[list[str]], audio: list[torch.Tensor]) -> float:
        """One optimizer step over micro-batches of texts and their recordings (micro-batch, audio_dim)."""
        total = 0.0
        for batch, vectors in zip(texts, audio, strict=True):
            prefixed = [PREFIX + text for text in batch]
            tokens = self.tokenizer(prefixed, padding=True, return_tensors="pt", truncation=True, max_length=192)
            tokens = tokens.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                hidden = self.model(**tokens).last_hidden_state
                last = tokens["attention_mask"].sum(1) - 1
                text = self.head(hidden[torch.arange(len(last), device=self.device), last])
            scores = F.normalize(text.float(), dim=-1) @ F.normalize(vectors.to(self.device).float(), dim=-1).T / 0.07
            own = torch.arange(len(scores), device=self.device)
            loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2 / len(texts)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total
