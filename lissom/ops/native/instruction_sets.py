"""The instruction sets that the kernels are built for, best first, and which of them this processor has.

One library is built for each set, with the compiler flags of exactly its features. So a library is the same on every machine
that has them, and one cache or container serves unlike machines.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lissom.errors import UnsupportedError

SWITCH = "LISSOM_NATIVE_ISA"
"""Set this environment variable to the name of an instruction set to use it in place of the best one."""


@dataclass(frozen=True)
class InstructionSet:
    """A set of processor features.

    Attributes:
        features: as Linux lists them in /proc/cpuinfo.
        flags: of the compiler, `-march=native` where there are no features.
    """

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        """The features that this processor lacks."""
        return [feature for feature in self.features if feature not in processor_features()]


def _with(name: str, base: InstructionSet | None, **flags: str) -> InstructionSet:
    """A set with further features, each with its compiler flag."""
    before = base or InstructionSet("", (), ())
    return InstructionSet(name, (*before.features, *flags), (*before.flags, *flags.values()))


_AVX2 = _with(
    "avx2", None, avx2="-mavx2", fma="-mfma", f16c="-mf16c", bmi1="-mbmi", bmi2="-mbmi2", abm="-mlzcnt", popcnt="-mpopcnt"
)
_AVX_VNNI = _with("avx_vnni", _AVX2, avx_vnni="-mavxvnni")
_AVX512 = _with(
    "avx512",
    _AVX2,
    avx512f="-mavx512f",
    avx512bw="-mavx512bw",
    avx512dq="-mavx512dq",
    avx512vl="-mavx512vl",
    avx512cd="-mavx512cd",
)
_AVX512_VNNI = _with("avx512_vnni", _AVX512, avx512_vnni="-mavx512vnni")
_AVX512_BF16 = _with("avx512_bf16", _AVX512_VNNI, avx512_bf16="-mavx512bf16", avx512vbmi="-mavx512vbmi")
_AMX = _with("amx", _AVX512_BF16, amx_tile="-mamx-tile", amx_int8="-mamx-int8", amx_bf16="-mamx-bf16")
_GENERIC = InstructionSet("generic", (), ())
_ARMV8 = InstructionSet("armv8", ("asimd",), ("-march=armv8-a",))
_ARMV8_2 = InstructionSet("armv8_2", ("asimd", "atomics", "asimdhp", "asimddp"), ("-march=armv8.2-a+fp16+dotprod",))
_NATIVE = InstructionSet("native", (), ("-march=native",))

SETS_OF_MACHINES = {
    "x86_64": (_AMX, _AVX512_BF16, _AVX512_VNNI, _AVX512, _AVX_VNNI, _AVX2, _GENERIC),
    "aarch64": (_ARMV8_2, _ARMV8),
}
INSTRUCTION_SETS = SETS_OF_MACHINES.get(platform.machine(), (_NATIVE,))


def usable_sets() -> list[InstructionSet]:
    """The sets that this processor has, best first; only the one that `LISSOM_NATIVE_ISA` names, where it is set.

    Raises:
        UnsupportedError: when that names none, or one that this processor lacks.
    """
    usable = [isa for isa in INSTRUCTION_SETS if not isa.missing]
    given = os.environ.get(SWITCH, "")
    if not given:
        return usable
    named = next((isa for isa in INSTRUCTION_SETS if isa.name == given), None)
    names = ", ".join(isa.name for isa in usable)
    if named is None:
        raise UnsupportedError(f"{SWITCH}={given} names no instruction set; this processor has {names}")
    if named.missing:
        raise UnsupportedError(f"{SWITCH}={given} needs {', '.join(named.missing)}, and this processor has {names}")
    return [named]


@cache
def processor_features() -> frozenset[str]:
    """The processor's features, as Linux lists them; none where the system does not."""
    first = next(iter(processors()), {})
    return frozenset((first.get("flags") or first.get("Features") or "").split())


def processors() -> list[dict[str, str]]:
    """The properties that Linux lists of every logical processor, by name; none on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    blocks = (re.findall(r"^(.*?)\s*:[ \t]*(.*)$", block, re.MULTILINE) for block in text.split("\n\n"))
    return [dict(block) for block in blocks if block]
