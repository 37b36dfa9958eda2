"""What a spawned DataLoader worker must be able to import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import fastlm
from fastlm import extension

VOCAB = 50


class Documents(torch.utils.data.Dataset):
    """Token arrays as a memory-mapped file holds them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, VOCAB, 9).astype(np.uint16)


def collate(documents: list[np.ndarray]) -> dict[str, Any]:
    batch = np.stack(documents)
    worker = torch.utils.data.get_worker_info()
    return {
        "tokens": torch.from_numpy(batch.astype(np.int64)),
        "plan": fastlm.token_plan(batch, VOCAB),
        "worker": -1 if worker is None else worker.id,
        "compiled": extension.tokens is not None,
    }


def collate_out_of_range(documents: list[np.ndarray]) -> Any:
    return fastlm.token_plan(np.stack(documents) + VOCAB, VOCAB)
