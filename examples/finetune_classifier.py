"""A small transformer that reads handwritten digits row by row: trained, pruned, and recovered, each as a pass."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lissom

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16  # 1,797 of 8 x 8 pixels: eight tokens of eight numbers
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1500], order[1500:]


class Reader(nn.Module):
    """Classifies [batch, 8, 8] into ten digits."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.positions = nn.Parameter(torch.randn(8, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classes = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(self.encoder(self.rows(x) + self.positions).mean(1))


def accuracy(model: lissom.CompiledModel) -> float:
    """The fraction of test digits that are classified right."""
    with torch.no_grad():
        return float((model(images[test]).argmax(-1) == labels[test]).float().mean())


torch.manual_seed(0)
data = [{"x": images[rows], "labels": labels[rows]} for rows in train.split(50)]
example = {"x": images[:4]}
trained = lissom.optimize(Reader().eval(), example, passes="finetune{steps=300,learning_rate=0.003}", data=data).program
print(f"trained: {accuracy(lissom.compile(trained, example)):.2f} of the test digits are right")

for recovery in ("", ",distill{steps=100,learning_rate=0.001}"):
    passes = f"prune-heads{{keep=0.5}},prune-neurons{{keep=0.25}}{recovery}"
    pruned = lissom.compile(trained, example, passes=passes, data=data, goal="memory")
    kept = pruned.program.parameter_count / trained.parameter_count
    print(f"{kept:.0%} of the weights{', distilled' if recovery else ''}: {accuracy(pruned):.2f}")
