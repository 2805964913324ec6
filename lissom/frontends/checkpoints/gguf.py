"""The weights of a model that a GGUF file stores in blocks, found as transformers finds them when it reads the file.

transformers dequantizes every weight, and for some models permutes rows or transposes. The same code is called here with the
numbers of the rows in place of the weights, which gives their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lissom.errors import ArtifactError
from lissom.frontends.checkpoints.stored_weights import StoredWeight, keep_stored
from lissom.ops.gguf_blocks import BLOCK_TYPES


def keep_blocks(model: nn.Module, file: Path) -> None:
    """Let every weight of a model that was read from a GGUF file remember its blocks.

    Raises:
        ArtifactError: if the file ends before its last weight.
    """
    import gguf

    reader: Any = gguf.GGUFReader(str(file))
    if reader.byte_order == "S":
        return
    bytes_ = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    weights = dict(model.named_parameters(remove_duplicate=False))
    names, processor = _names(model, reader)
    for tensor in reader.tensors:
        kind = BLOCK_TYPES.get(tensor.tensor_type.name)
        if kind is None or len(tensor.shape) != 2 or tensor.name not in names:
            continue
        columns, rows = (int(size) for size in tensor.shape)
        start, end = int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
        if end > len(bytes_):
            raise ArtifactError(f"{file} has {len(bytes_)} bytes, and '{tensor.name}' ends at byte {end}; copy the file again")
        order = block_order(processor, tensor.name, rows, columns, names)
        weight = weights.get(names[tensor.name])
        if order is not None and weight is not None:
            keep_stored(weight, StoredWeight(bytes_[start:end], kind, rows, columns, *order))


def _names(model: nn.Module, reader: Any) -> tuple[Mapping[str, str], Any]:
    """The names of the model's weights by those in the file, and what transformers changes them with."""
    from transformers import modeling_gguf_pytorch_utils as loading

    architecture = loading.read_field(reader, "general.architecture")[0]
    config: Any = model.config
    processor = loading.TENSOR_PROCESSORS.get(architecture, loading.TensorProcessor)(config=config.to_dict())
    return loading.get_gguf_hf_weights_map(model, processor), processor


def block_order(
    processor: Any, name: str, rows: int, columns: int, names: Mapping[str, str]
) -> tuple[torch.Tensor | None, bool] | None:
    """The stored row of each row of a weight, and whether the weight is transposed; None where it is not made of these rows."""
    numbers = np.arange(rows)
    spread = np.broadcast_to(numbers[:, None], (rows, columns))
    changed = processor.process(weights=spread, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": {}})
    processed = changed.weights
    if changed.name != name or processed.shape not in ((rows, columns), (columns, rows)):
        return None
    for order, transposed in ((processed[:, 0], False), (processed[0], True)):
        if len(order) == rows and np.array_equal(np.sort(order), numbers):
            return None if np.array_equal(order, numbers) else torch.from_numpy(order.copy()), transposed
    return None
