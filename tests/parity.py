"""torch and transformers for the parity tests: without them those are skipped, and an error when CI=true."""

import os

import numpy as np
import pytest

try:
    import safetensors.torch
    import torch
    import transformers
except ImportError:
    if os.environ.get("CI", "").lower() == "true":
        raise
    pytest.skip("no torch and transformers; pip install '.[parity]'", allow_module_level=True)

__all__ = ["safetensors", "their_logits", "torch", "transformers"]


def their_logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Returns transformers' float32 logits [B, T, V] of int tokens [B, T]."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.long)).logits.float().numpy()
