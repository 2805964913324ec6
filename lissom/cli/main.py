"""The command line, `lissom`: its commands, and how errors end them."""

from __future__ import annotations

import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lissom.artifacts.directory import check_target
from lissom.backends.distributed.backend import Distributed
from lissom.cli import demo
from lissom.cli.bench.commands import run_bench, run_machine
from lissom.cli.compile import run_compile
from lissom.cli.doctor import run_doctor
from lissom.cli.export import run_export
from lissom.cli.opt import run_opt
from lissom.cli.options import (
    Backend,
    Checks,
    Data,
    DecoderPasses,
    Device,
    GoalName,
    Quality,
    SavedOrModel,
    Seconds,
    finite,
    goal_of,
)
from lissom.cli.saved import AllowNative, TrustedKey, check_saved, run_saved, sign_saved, verify_saved, warnings_told
from lissom.cli.show import views
from lissom.cli.tune import run_tune
from lissom.driver.torchrun import RankProcess, ending_at_once, may_speak, one_of_ranks, refuse_torchrun
from lissom.errors import LissomError, UnsupportedError, nearest
from lissom.frontends.capture.device import check_device
from lissom.generation.directory import is_saved
from lissom.generation.prompted import Request, compile_prompted, load_prompted
from lissom.generation.sampling import end_tokens
from lissom.generation.speculate import Drafts
from lissom.generation.stream import Speed, stream_text, stream_tokens
from lissom.inspect.catalogue import pass_page, passes_table
from lissom.inspect.tables import show
from lissom.inspect.terminal import Terminal
from lissom.io.fields import visible
from lissom.passes import RECIPES, known_passes
from lissom.shadowing import shadowed_install
from lissom.version import __version__

# An error may quote a file, and typer's own tracebacks leave control characters in.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Terminal()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lissom {__version__}")
        raise typer.Exit


@app.callback()
def take_options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """A compiler-style graph optimizer for transformers."""


@app.command("demo")
def run_demo(
    seconds: Seconds = 2.0,
) -> None:
    """Compile all-MiniLM-L6-v2, check it on real sentences, and time it beside PyTorch."""
    demonstration = demo.demonstrate(seconds)
    show(demonstration.report, demo.similarity_table(demonstration))
    print(f"embeddings differ from the original model's by {demonstration.worst_error:.1e} relative")
    show(demo.latency_table(demonstration))


app.command("compile")(run_compile)
app.command("run")(run_saved)


@app.command("generate")
def run_generate(
    model: SavedOrModel,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="0 takes the most likely token; above 0 tokens are sampled.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=-(1 << 63), max=(1 << 64) - 1, help="Of sampling.")] = 0,
    passes: DecoderPasses = None,
    backend: Backend = "eager",
    device: Device = None,
    checks: Checks = "numeric",
    data: Data = None,
    goal: GoalName = "latency",
    draft: Annotated[
        str | None,
        typer.Option(
            help="Proposes tokens that the model verifies, several per call; the text is the same up to rounding. "
            "'prompt-lookup', the pipeline text of a smaller decoder of the same model, or the directory of a saved one."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the decoder with its tokenizer to this directory too.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compile anew, also where an earlier call kept this decoder.")] = False,
    allow_native: AllowNative = False,
    trusted_key: TrustedKey = None,
) -> None:
    """Continue a text with a model compiled with its KV cache, and print its speed."""
    saved = Path(model) if is_saved(model) else None
    check_saved(saved is not None, trusted_key)
    asked = passes not in (None, "exact") or backend != "eager" or data is not None or save is not None
    if saved is not None and (asked or checks != "numeric" or goal != "latency" or fresh):
        raise typer.BadParameter(
            "--passes, --backend, --checks, --data, --goal, --save and --fresh do not go with a saved decoder"
        )
    if saved is None and backend != Distributed.name:
        refuse_torchrun("generate")
    if save is not None:
        check_target(save)
    quality = Quality(data)
    quality.check()
    with one_of_ranks(saved, device) as rank:
        with warnings_told():
            decoder, tokenizer, ids = (
                load_prompted(
                    model, prompt, rank.device, allow_native=allow_native, trusted_keys=trusted_key or None, draft=draft
                )
                if saved is not None
                else compile_prompted(
                    model,
                    prompt,
                    max_new_tokens,
                    Request(passes, backend, rank.device, checks, goal_of(goal), data, save is None and not fresh, draft),
                    partial(quality.batches, device=check_device(rank.device)),
                    partial(Terminal(stderr=True).print, highlight=False, soft_wrap=True, markup=False),
                    save,
                )
            )
        # The last token of the answer is not written to the KV cache.
        room = decoder.max_length - decoder.slots(ids) + 1
        if room < max_new_tokens and rank.speaks:
            note = f"{decoder.max_length} tokens fit into the KV cache, so the answer ends after {room}"
            Terminal(stderr=True).print(note, highlight=False, soft_wrap=True)
        speed = Speed()
        tokens = stream_tokens(
            decoder,
            ids.to(decoder.device),
            max_new_tokens=min(max_new_tokens, room),
            temperature=temperature,
            stop=end_tokens(decoder.generation_config.eos_token_id),
            seed=rank.seed(seed),
            speed=speed,
        )
        for piece in stream_text(tokens, tokenizer):
            _write(piece, rank)
        _write("\n", rank)
    if rank.speaks:
        _print_counts(speed, decoder.drafts)


def _print_counts(*counts: Speed | Drafts | None) -> None:
    for each in counts:
        if each is not None:
            Terminal(stderr=True).print(str(each), highlight=False, soft_wrap=True, markup=False)


def _write(piece: str, rank: RankProcess) -> None:
    if rank.speaks:
        sys.stdout.write(visible(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


app.add_typer(views, name="show")
app.command("opt")(run_opt)
app.command("tune")(run_tune)
app.command("export")(run_export)
app.command("bench")(run_bench)
app.command("sign")(sign_saved)
app.command("verify")(verify_saved)


@app.command("passes")
def run_passes(
    name: Annotated[str | None, typer.Argument(help="A pass, to see its options and an example.")] = None,
) -> None:
    """List the passes and the recipes, or show one pass."""
    known = known_passes()
    if name is None:
        show(passes_table(known, RECIPES))
    elif name in known:
        show(pass_page(known[name]))
    elif name in RECIPES:
        show(f"{name}: a recipe, the same as --passes '{RECIPES[name]}'")
    else:
        hint = nearest(name, [*known, *RECIPES]) or ";"
        raise UnsupportedError(f"there is no pass '{name}'{hint} `lissom passes` lists them all")


app.command("machine")(run_machine)
app.command("doctor")(run_doctor)


def main() -> None:
    """Run the command line; a LissomError prints one sentence and exits with status 1."""
    shadow = shadowed_install(Path.cwd(), Path(__file__).parent.parent)
    if shadow is not None:
        Terminal(stderr=True).print(f"note: {shadow}", highlight=False, soft_wrap=True, markup=False)
    with ending_at_once():
        _run()


def _run() -> None:
    try:
        app()
    except (LissomError, OSError) as error:
        if may_speak():
            words = Text.assemble(("error:", "red"), f" {_worded(error)}")
            Terminal(stderr=True).print(words, highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception:
        if may_speak():
            Terminal(stderr=True).print(Text(traceback.format_exc()), highlight=False, soft_wrap=True)
        sys.exit(1)


def _worded(error: Exception) -> str:
    """The text of an error for the command line."""
    # Errors of the system may quote a very long name.
    text = str(error) if isinstance(error, LissomError) else f"{error!s:.400}"
    # Errors name the arguments of `lissom.compile`, not the options of the command line.
    return text.replace("pass data=", "give --data FILE")
