"""The commands that artifacts alone are given to: `lissom run | sign | verify`."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lissom.artifacts.arrays import named_tensors, read_inputs, write_tensors
from lissom.artifacts.directory import read_directory, sign_directory
from lissom.compiler.ir.types import format_type, type_of
from lissom.driver.torchrun import one_of_ranks
from lissom.inspect.terminal import Terminal
from lissom.io.files import check_writable
from lissom.runtime.compiled_model import CompiledModel, load

console = Terminal()

Directory = Annotated[Path, typer.Argument(help="What `lissom compile --save` or CompiledModel.save wrote.")]
AllowNative = Annotated[
    bool, typer.Option("--allow-native", help="Load native code that a saved model holds; only from who you trust.")
]

TrustedKey = Annotated[
    list[Path] | None,
    typer.Option(help="Load a saved model only if it is signed by this public key, a PEM file; may be given several times."),
]


def run_saved(
    directory: Directory,
    inputs: Annotated[Path, typer.Option("--input", help="An .npz file with an array for every argument, by its name.")],
    output: Annotated[Path | None, typer.Option(help="Write the tensors of the answer to this .npz file.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs, for example cuda:0; where it ran by default.")] = None,
    allow_native: AllowNative = False,
    trusted_key: TrustedKey = None,
) -> None:
    """Run a saved model on arrays from a file."""
    if output is not None:
        check_writable(output)
    with one_of_ranks(directory, device) as rank:
        compiled = load_saved(directory, rank.device, allow_native, trusted_key)
        args, kwargs = read_inputs(compiled.program.signature, inputs)
        outputs = named_tensors(compiled(*args, **kwargs))
    if not rank.speaks:
        return
    for name, tensor in outputs.items():
        console.print(f"{name}: {format_type(type_of(tensor), str)}", highlight=False, soft_wrap=True, markup=False)
    if output is not None:
        write_tensors(outputs, output)


def sign_saved(
    directory: Directory,
    key: Annotated[Path, typer.Option(help="Your private key: a PEM file, from `openssl genpkey -algorithm ed25519`.")],
) -> None:
    """Sign a saved model, so that others can check that it is yours."""
    sign_directory(directory, key)
    console.print(f"signed {directory}", highlight=False, soft_wrap=True, markup=False)


def verify_saved(
    directory: Directory,
    key: Annotated[list[Path], typer.Option(help="A public key you trust, as a PEM file; may be given several times.")],
) -> None:
    """Check that a saved model is whole, and signed by a key you trust."""
    read_directory(directory, trusted_keys=tuple(key))
    console.print(f"{directory} is whole, and signed by a trusted key", highlight=False, soft_wrap=True, markup=False)


def check_saved(saved: bool, trusted_key: list[Path] | None) -> None:
    """Refuse `--trusted-key` for a model that is not a saved one, and so not signed."""
    if trusted_key and not saved:
        raise typer.BadParameter("--trusted-key goes with a saved model, and this is none")


def load_saved(directory: Path, device: str | None, allow_native: bool, trusted_key: list[Path] | None = None) -> CompiledModel:
    """A saved model; what is not as it was where it was made is said on standard error."""
    with warnings_told():
        return load(directory, device, allow_native=allow_native, trusted_keys=trusted_key or None)


@contextmanager
def warnings_told() -> Generator[None]:
    """Say the warnings of the block on standard error, at its end, as plain sentences."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        Terminal(stderr=True).print(str(warning.message), highlight=False, soft_wrap=True, markup=False)
