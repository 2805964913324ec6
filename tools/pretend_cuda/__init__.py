"""A pretended GPU, for tests and for `tools/first_hour.py --pretend`, on any build of PyTorch.

    with pretend_cuda(capability=(8, 0)):
        fast = lissom.compile(model.to("cuda"), inputs)

Inside the block `torch.cuda` says that there is a device, tensors can be put on it, and CUDA graphs record and replay. Values
are computed on the CPU, so nothing can be said about speed, memory, or the rounding of a GPU's kernels. `tensor.py` lists what
is refused.
"""

from tools.pretend_cuda.runtime import pretend_cuda
from tools.pretend_cuda.tensor import PretendTensor

__all__ = ["PretendTensor", "pretend_cuda"]
