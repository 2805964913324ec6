"""What tests of backends share that run all-MiniLM-L6-v2."""

from __future__ import annotations

from copy import deepcopy

import torch

from lissom.compiler.verify.divergence import relative_error
from lissom.frontends.models.huggingface import Checkpoint
from lissom.runtime.compiled_model import CompiledModel


def assert_as_exact_as_pytorch(minilm: Checkpoint, fast: CompiledModel) -> None:
    """Batches of one row and of three, with padding, against the model in float64."""
    exact = deepcopy(minilm.model).double()
    for texts in (["one"], ["a longer sentence than the first", "short", "of three, the last"]):
        inputs = minilm.encode(texts)
        with torch.inference_mode():
            wanted = exact(**inputs).last_hidden_state
            own = relative_error(wanted, minilm.model(**inputs).last_hidden_state.double())
        # Six layers of float32 that sum 384 and 1536 terms: PyTorch's own are up to 1.7e-5 from float64, by the processor.
        assert relative_error(wanted, fast(**inputs).last_hidden_state.double()) < max(1e-5, 2 * own)
