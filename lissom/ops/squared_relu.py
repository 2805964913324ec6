"""`lissom::squared_relu`: the squared ReLU, max(x, 0)², the activation of Primer and Nemotron.

So et al. 2021 (Primer), arXiv:2109.08668
"""

from __future__ import annotations

import torch

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define


def squared_relu_reference(x: torch.Tensor) -> torch.Tensor:
    """The reference implementation."""
    return x.relu().square()


squared_relu = define("squared_relu(Tensor x) -> Tensor", squared_relu_reference, dimensions=Dimensions("... -> ..."))
"""The operator. x: [...]. Returns a tensor like x. Differentiable; any device."""
