"""Where values are zero whatever the inputs are."""

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.axes.zeros import is_zero, zero_at, zeros
from lissom.frontends.capture.export import capture
from tests.support.models import normal, seeded

FUNCTIONS = {
    "linear": lambda self, x: self.layer(x),
    "relu": lambda self, x: torch.relu(self.layer(x)),
    "sigmoid": lambda self, x: torch.sigmoid(self.layer(x)),
    "product": lambda self, x: self.layer(x) * self.other(x),
    "sum": lambda self, x: self.layer(x) + self.other(x),
    "scaled": lambda self, x: self.layer(x) * 2.0,
    "shifted": lambda self, x: self.layer(x) + 1.0,
    "heads": lambda self, x: self.layer(x).unflatten(-1, (4, 2)).transpose(1, 2),
    "half": lambda self, x: self.layer(x)[..., :4],
    "joined": lambda self, x: torch.cat((self.layer(x), self.other(x)), -1),
    "chunk": lambda self, x: self.layer(x).chunk(2, -1)[1],
    "rms_norm": lambda self, x: self.rms_norm(self.layer(x)),
    "layer_norm": lambda self, x: self.layer_norm(self.layer(x)),
    "softmax": lambda self, x: torch.softmax(self.layer(x), -1),
}
FOUND = {
    "linear": [0, 1, 5],
    "relu": [0, 1, 5],
    "sigmoid": [],
    "product": [0, 1, 2, 5],
    "sum": [1],
    "scaled": [0, 1, 5],
    "shifted": [],
    "heads": [],
    "half": [0, 1],
    "joined": [0, 1, 5, 9, 10],
    "chunk": [1],
    "rms_norm": [0, 1, 5],
    "layer_norm": [],
    "softmax": [],
}


class Model(nn.Module):
    """`layer` is zero in 0, 1 and 5, `other` in 1 and 2."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = FUNCTIONS[name]
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.rms_norm, self.layer_norm = nn.RMSNorm(8), nn.LayerNorm(8)
        with torch.no_grad():
            for layer, dead in ((self.layer, [0, 1, 5]), (self.other, [1, 2])):
                layer.weight[dead] = 0
                layer.bias[dead] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zeros_of_the_last_dimension(name: str) -> None:
    program = capture(seeded(lambda: Model(name)), (normal(2, 5, 8),)).program
    output = program.output.all_input_nodes[0]
    found = zero_at(program.fact(zeros), output, -1)
    assert found.nonzero().flatten().tolist() == FOUND[name]
    # What is told from the weights is so in the values.
    (value,) = program.run([normal(2, 5, 8, seed=1)])
    assert bool((value[..., found] == 0).all())


def test_whole_heads_are_zero_where_all_their_features_are() -> None:
    program = capture(seeded(lambda: Model("heads")), (normal(2, 5, 8),)).program
    found = zero_at(program.fact(zeros), program.output.all_input_nodes[0], 1)
    assert found.tolist() == [True, False, False, False]


def test_a_product_with_zero_is_zero_everywhere() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * self.layer(x)

    program = capture(Zero(), (normal(2, 5, 8),)).program
    found = program.fact(zeros)
    assert is_zero(found, program.nodes(torch.ops.aten.mul.Tensor)[0])
    assert not is_zero(found, program.nodes(torch.ops.aten.add.Tensor)[0])
