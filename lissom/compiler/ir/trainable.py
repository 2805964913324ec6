"""A program as an ordinary module with parameters, for a training loop outside Lissom."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn


class TrainableModule(nn.Module):
    """A program with weights of its own as a module: parameters under their names, called as the model is called.

    `Program.with_weights` takes the trained weights back.

    Examples:
        >>> import torch, lissom
        >>> module = lissom.optimize(torch.nn.Linear(4, 2), torch.randn(3, 4)).program.trainable()
        >>> [name for name, _ in module.named_parameters()]
        ['weight', 'bias']
    """

    def __init__(self, graph_module: fx.GraphModule, call: Callable[..., object]) -> None:
        super().__init__()
        for name, module in graph_module.named_children():
            self.add_module(name, module)
        # The same dictionaries, so that a weight of the outermost module that is exchanged here is exchanged in the program.
        self._parameters, self._buffers = graph_module._parameters, graph_module._buffers
        self._call = call

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's outputs, with gradients.

        Raises:
            InputError: if the arguments do not fit the signature.
        """
        return self._call(*args, **kwargs)
