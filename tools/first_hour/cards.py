"""Published peak figures of cards, for predictions: dense products, without sparsity, at boost clocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        names: parts of the name that PyTorch gives, all of which must be in it.
        fp32: float32 on CUDA cores, 10¹² operations per second, as PyTorch does not use TF32 by default.
        half: float16 and bfloat16 on tensor cores with sums in float32, 10¹² operations per second.
        eight: int8, 10¹² operations per second.
        fp8: the same for fp8; None where there is no such product, and the weights are multiplied in half precision.
        bandwidth: of memory, 10⁹ bytes per second.
        source: where the figures are published.
    """

    names: tuple[str, ...]
    fp32: float
    half: float
    eight: float
    fp8: float | None
    bandwidth: float
    source: str


_NVIDIA = "https://www.nvidia.com"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
CARDS = {
    "A100 80GB": Card(("A100", "80GB"), 19.5, 312, 624, None, 2039, f"{_NVIDIA}/en-us/data-center/a100/"),
    "H100 SXM": Card(("H100", "HBM3"), 67, 989, 1979, 1979, 3350, f"{_NVIDIA}/en-us/data-center/h100/"),
    "H200": Card(("H200",), 67, 989, 1979, 1979, 4800, f"{_NVIDIA}/en-us/data-center/h200/"),
    "L4": Card(("L4",), 30.3, 121, 242, 242, 300, f"{_NVIDIA}/en-us/data-center/l4/"),
    "RTX 4090": Card(("RTX", "4090"), 82.6, 165.2, 660.6, 330.3, 1008, _ADA),
}
"""Most pages give products with sparsity, which are twice these. The fp8 figure of RTX 4090 is with sums in float32."""


def find_card(name: str) -> str | None:
    """The card of this name, as PyTorch gives it; None for one without figures."""
    words = name.upper().replace("-", " ").split()
    return next((card for card, facts in CARDS.items() if all(part.upper() in words for part in facts.names)), None)
