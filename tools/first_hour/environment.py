"""What the machine has: driver, cards, MIG, and the versions that decide which kernels run. Prints it as JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from tools.first_hour.device import device

PACKAGES = ("torch", "triton", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "lissom")
_FIELDS = ("name", "driver_version", "memory.total", "mig.mode.current", "power.limit", "clocks.max.sm", "clocks.max.memory")


def describe(pretend: bool) -> dict[str, object]:
    """Facts by name, and `notes`: sentences on what may go wrong or differ."""
    with device(pretend):
        count = torch.cuda.device_count()
        cards = [torch.cuda.get_device_properties(index) for index in range(count)]
        capability = torch.cuda.get_device_capability()
        facts: dict[str, object] = {
            "card": cards[0].name,
            "compute capability": f"{capability[0]}.{capability[1]}",
            "memory, GB": round(cards[0].total_memory / 1e9, 1),
            "multiprocessors": cards[0].multi_processor_count,
            "CUDA of torch": torch.version.cuda,
            "kernels in torch for": " ".join(torch.cuda.get_arch_list()),
            **{name: _version(name) for name in PACKAGES},
            "python": sys.version.split()[0],
            "C++ compiler": shutil.which("c++") or shutil.which("g++") or "none",
        }
        facts |= {} if pretend else _from_driver()
        facts["notes"] = _notes(facts, capability, [card.name for card in cards])
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _from_driver() -> dict[str, object]:
    """What nvidia-smi says of the first card."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"failed: {error}"}
    values = ran.stdout.splitlines()[0].split(", ")
    return {f"nvidia-smi {name}": value for name, value in zip(_FIELDS, values, strict=False)}


def _notes(facts: dict[str, object], capability: tuple[int, int], cards: list[str]) -> list[str]:
    notes = list[str]()
    if capability < (8, 0):
        notes.append("The card is older than compute capability 8.0: no bfloat16 products, no int4 products, no 2:4 weights.")
    if (8, 0) <= capability < (8, 9):
        notes.append("The card has no fp8 products, which need compute capability 8.9: fp8 layers are simulated.")
    if len(set(cards)) > 1:
        notes.append(f"There are cards of unlike kind, {', '.join(cards)}; only the first is used.")
    elif len(cards) > 1:
        notes.append(f"There are {len(cards)} cards; only the first is used.")
    if "Enabled" in str(facts.get("nvidia-smi mig.mode.current", "")):
        notes.append("MIG is enabled: the card is a slice, and published figures of the whole card do not hold.")
    if facts["triton"] == "not installed":
        notes.append("Triton is not installed: torch.compile, the inductor backend and FlexAttention cannot run.")
    if facts["C++ compiler"] == "none":
        notes.append("There is no C++ compiler, which Triton needs for its launcher; install g++.")
    if facts["onnxruntime-gpu"] == "not installed":
        notes.append("onnxruntime-gpu is not installed: ONNX Runtime runs on the CPU.")
    return notes


if __name__ == "__main__":
    print(json.dumps(describe("--pretend" in sys.argv)))
