"""The command line: `lissom demo | compile | tune | run | generate | show | bench | sign | verify | passes | machine`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lissom import api, demo
from lissom.artifacts.directory import check_target, is_artifact
from lissom.backends import find_backends
from lissom.backends.base import Backend as BackendObject
from lissom.backends.distributed.backend import Distributed
from lissom.bench_commands import run_bench, run_machine
from lissom.cli_options import (
    Backend,
    Checks,
    Data,
    DecoderPasses,
    Device,
    GoalName,
    Html,
    MaxDrop,
    MetricName,
    Model,
    Passes,
    Quality,
    Seconds,
    Simulate,
    Ways,
    finite,
    goal_of,
)
from lissom.compiler.parallel.plan import make_plan
from lissom.compiler.pipeline.history import Interrupted
from lissom.compiler.pipeline.options import Goal, check_options
from lissom.driver.options import resolve_passes
from lissom.driver.ranks import with_world_size
from lissom.driver.torchrun import RankProcess, ending_at_once, may_speak, one_of_ranks, refuse_torchrun
from lissom.errors import LissomError, UnsupportedError, nearest
from lissom.files import check_writable, write_whole
from lissom.frontends.device import check_device
from lissom.frontends.sources import NAMES, load
from lissom.generation.directory import is_saved
from lissom.generation.prompted import Request, compile_prompted, load_prompted
from lissom.generation.stream import Speed, stream_text, stream_tokens
from lissom.inspect.catalogue import pass_page, passes_table
from lissom.inspect.machine import load_machine
from lissom.inspect.report import Report, write_stopped
from lissom.inspect.roofline import cost_table
from lissom.inspect.sharding import Link, sharding_table
from lissom.inspect.sites import amounts_table, axes_table, structure_tables
from lissom.inspect.svg.attention import TOKENS, attention_svg
from lissom.inspect.svg.sharding import sharding_svg
from lissom.inspect.tables import coloured_diff, show
from lissom.passes import RECIPES, known_passes
from lissom.passes.sites import sites as list_sites
from lissom.saved_commands import AllowNative, load_saved, run_saved, sign_saved, verify_saved
from lissom.shadowing import shadowed_install
from lissom.tune_commands import run_tune
from lissom.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console()


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
    found = demo.demonstrate(seconds)
    show(found.report, demo.similarity_table(found))
    print(f"embeddings differ from the original model's by {found.worst_error:.1e} relative")
    show(demo.latency_table(found))


@app.command("compile")
def run_compile(
    model: Model,
    passes: Passes = "exact",
    backend: Backend = "eager",
    device: Device = None,
    world_size: Annotated[int | None, typer.Option(help="With --backend distributed: how many ranks share the model.")] = None,
    checks: Checks = "numeric",
    data: Data = None,
    metric: MetricName = None,
    max_drop: MaxDrop = None,
    simulate: Simulate = False,
    full: Annotated[bool, typer.Option("--full", help="List every step, and the kernels of the hot layers.")] = False,
    history: Annotated[Path | None, typer.Option(help="Write the history to this file, as JSON.")] = None,
    text: Annotated[Path | None, typer.Option(help="Write the optimized program to this file, as text.")] = None,
    html: Html = None,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Write what was compiled to this directory.")] = None,
    goal: GoalName = "latency",
    _ways: Ways = None,
) -> None:
    """Compile a model and print what every pass did."""
    refuse_torchrun("compile")
    for path in filter(None, (history, text, html)):
        check_writable(path)
    if save is not None:
        check_target(save)
    chosen = with_world_size(backend, world_size)
    quality = Quality(data, metric, max_drop)
    compiled = _compile(model, passes, chosen, device, checks, quality, goal=goal_of(goal), simulate=simulate, html=html)
    show(compiled.report.full() if full else compiled.report)
    if save is not None:
        assert isinstance(compiled, api.CompiledModel)
        compiled.save(save)
    if history is not None:
        write_whole(history, json.dumps(compiled.report.history.to_json(), indent=1) + "\n")
    if text is not None:
        write_whole(text, compiled.program.text())
    if html is not None:
        compiled.report.to_html(html)


app.command("run")(run_saved)


@app.command("generate")
def run_generate(
    model: Annotated[str, typer.Argument(help=f"A directory that --save wrote. {NAMES}")],
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
    save: Annotated[Path | None, typer.Option(help="Write the decoder with its tokenizer to this directory too.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compile anew, also where an earlier call kept this decoder.")] = False,
    allow_native: AllowNative = False,
) -> None:
    """Continue a text with a model compiled with its KV cache, and print its speed."""
    saved = Path(model) if is_saved(model) else None
    if saved is not None and (passes not in (None, "exact") or backend != "eager" or data is not None or save is not None):
        raise typer.BadParameter("--passes, --backend, --data and --save do not go with a saved decoder")
    if saved is None and backend != Distributed.name:
        refuse_torchrun("generate")
    if save is not None:
        check_target(save)
    quality = Quality(data)
    quality.check()
    with one_of_ranks(saved, device) as rank:
        decoder, tokenizer, ids = (
            load_prompted(model, prompt, rank.device, allow_native=allow_native)
            if saved is not None
            else compile_prompted(
                model,
                prompt,
                max_new_tokens,
                Request(passes, backend, rank.device, checks, goal_of(goal), data, save is None and not fresh),
                partial(quality.batches, device=check_device(rank.device)),
                partial(Console(stderr=True).print, highlight=False, soft_wrap=True, markup=False),
            )
        )
        if save is not None:
            decoder.save(save, tokenizer)
        # The last token of the answer is not written to the KV cache.
        room = decoder.max_length - ids.shape[1] + 1
        if room < max_new_tokens and rank.speaks:
            note = f"{decoder.max_length} tokens fit into the KV cache, so the answer ends after {room}"
            Console(stderr=True).print(note, highlight=False, soft_wrap=True)
        speed, stop = Speed(), decoder.generation_config.eos_token_id
        tokens = stream_tokens(
            decoder,
            ids.to(decoder.device),
            max_new_tokens=min(max_new_tokens, room),
            temperature=temperature,
            stop=[stop] if isinstance(stop, int) else stop or (),
            seed=rank.seed(seed),
            speed=speed,
        )
        for piece in stream_text(tokens, tokenizer):
            _write(piece, rank)
        _write("\n", rank)
    if rank.speaks:
        Console(stderr=True).print(str(speed), highlight=False, soft_wrap=True, markup=False)


def _write(piece: str, rank: RankProcess) -> None:
    if rank.speaks:
        sys.stdout.write(piece)
        sys.stdout.flush()


@app.command("show")
def run_show(
    model: Model,
    passes: Passes = "exact",
    backend: Annotated[str | None, typer.Option(help="Show the program lowered for this backend.")] = None,
    data: Data = None,
    diff: Annotated[
        str | None, typer.Option(help="Show what changed between two steps of the history, 10:11; 0 is the capture.")
    ] = None,
    structure: Annotated[bool, typer.Option("--structure", help="Show layers, attention and feed-forward sites.")] = False,
    axes: Annotated[bool, typer.Option("--axes", help="Show the axes that linear layers contract.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="Show the sites for which passes take amounts, and which.")] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Show FLOPs, bytes and parameters of every site.")] = False,
    sharding: Annotated[int | None, typer.Option(help="Show the plan of `shard` for this many ranks.")] = None,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="With --sharding: shard the values between layers by token position.")
    ] = False,
    latency: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="With --sharding: microseconds one message takes.")
    ] = 10.0,
    bandwidth: Annotated[
        float, typer.Option(min=1e-6, callback=finite, help="With --sharding: GB/s of one rank's link, one way.")
    ] = 10.0,
    batch: Annotated[int | None, typer.Option(help="With --cost or --sharding: the batch; the example's by default.")] = None,
    sequence: Annotated[
        int | None, typer.Option(help="With --cost, --sharding or --attention: the tokens; the example's, or 1,024 for --attention.")
    ] = None,
    html: Html = None,
    svg: Annotated[
        Path | None,
        typer.Option(help="Draw the program to this file, as SVG; with --diff what changed, with --sharding the plan."),
    ] = None,
    only: Annotated[str, typer.Option(help="With --svg: draw this module alone, encoder.layer.0.")] = "",
    attention: Annotated[
        bool, typer.Option("--attention", help="With --svg: draw which blocks of keys each block of queries sees.")
    ] = False,
    allow_native: AllowNative = False,
) -> None:
    """Print a model's program after the passes, the difference between two steps, its structure, or what every site costs."""
    sizes = {name: size for name, size in (("batch", batch), ("sequence", sequence)) if size is not None}
    if sizes and not cost and sharding is None and not attention:
        raise typer.BadParameter("--batch and --sequence go with --cost, --sharding or --attention")
    if sharding is not None and sharding < 2:
        raise typer.BadParameter("--sharding takes 2 ranks or more")
    if svg is None and (only or attention):
        raise typer.BadParameter("--only and --attention go with --svg")
    for path in filter(None, (html, svg)):
        check_writable(path)
    steps = _read_steps(diff) if diff is not None else None
    if sequence_parallel and sharding is None:
        raise typer.BadParameter("--sequence-parallel goes with --sharding")
    # Tables show structure and sizes, which structural checks cover; a printed program is checked numerically.
    checks = "structural" if structure or axes or sites or cost or attention or sharding is not None else "numeric"
    if is_artifact(model):
        if passes != "exact" or backend is not None or data is not None:
            raise typer.BadParameter("--passes, --backend and --data do not go with a saved model")
        compiled = load_saved(Path(model), None, allow_native)
    else:
        # A program that is only shown may have layers without a kernel.
        compiled = _compile(model, passes, backend, None, checks, Quality(data), simulate=True, html=html)
    if svg is not None and attention:
        write_whole(svg, attention_svg(compiled.program, only, sequence or TOKENS))
        return
    if structure or axes or sites:
        program = compiled.program
        tables = [structure_tables] * structure + [axes_table] * axes
        show(*(table(program) for table in tables), *([amounts_table(program, list_sites(program))] if sites else []))
        return
    if sharding is not None:
        plan = make_plan(compiled.program, sharding, sequence=sequence_parallel)
        if svg is not None:
            write_whole(svg, sharding_svg(compiled.program, plan, sizes))
            return
        show(sharding_table(compiled.program, plan, sizes, Link(latency * 1e-6, bandwidth * 1e9)))
        return
    if cost:
        show(cost_table(compiled.program, sizes, load_machine()))
        return
    if html is not None:
        compiled.report.to_html(html)
    if svg is not None:
        before, after = steps or (None, None)
        compiled.report.to_svg(svg, step=after, only=only, compare=before)
    if html is not None or svg is not None:
        return
    if steps is None:
        sys.stdout.write(compiled.program.text())
        return
    changed = compiled.report.history.diff(*steps)
    console.print(coloured_diff(changed) if changed else "the two steps are the same program", soft_wrap=True)


app.command("tune")(run_tune)
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


def _read_steps(text: str) -> tuple[int, int]:
    """The two step numbers in a text such as `10:11`."""
    before, colon, after = text.partition(":")
    if not colon or not before.isdecimal() or not after.isdecimal():
        raise typer.BadParameter(f"--diff takes two steps, for example 10:11, and not '{text}'")
    return int(before), int(after)


def _compile(
    model: str,
    passes: str,
    backend: str | BackendObject | None,
    device: str | None,
    checks: str,
    quality: Quality,
    *,
    goal: Goal | None = None,
    simulate: bool = False,
    html: Path | None = None,
) -> api.CompiledModel | api.Optimized:
    """The model compiled for a backend; without a backend, only optimized by the passes.

    html: where the finished steps are written when an error ends the passes.
    """
    # Options are checked before a large model is read.
    check_options(checks)  # pyright: ignore[reportArgumentType]
    pipeline = resolve_passes(passes)
    if backend is not None:
        find_backends(backend)
    place = check_device(device)
    quality.check()
    source = load(model)
    options = {"backend": backend, "goal": goal, "simulate": simulate}
    run = api.optimize if backend is None else partial(api.compile, **options)
    try:
        compiled = run(
            source.model,
            source.example_inputs,
            passes=pipeline,
            device=device,
            checks=checks,  # pyright: ignore[reportArgumentType]
            **quality.arguments(source, place),
        )
    except Interrupted as error:
        write_stopped(html, model, error.history, "it was interrupted")
        show(Report("interrupted; finished so far", error.history))
        raise typer.Exit(130) from None
    except LissomError as error:
        write_stopped(html, model, error.history, str(error))
        raise
    for note in source.notes:
        Console(stderr=True).print(note, highlight=False, soft_wrap=True, markup=False)
    return compiled


def main() -> None:
    """Run the command line; a LissomError prints one sentence and exits with status 1."""
    shadow = shadowed_install(Path.cwd(), Path(__file__).parent)
    if shadow is not None:
        Console(stderr=True).print(f"note: {shadow}", highlight=False, soft_wrap=True, markup=False)
    with ending_at_once():
        _run()


def _run() -> None:
    try:
        app()
    except (LissomError, OSError) as error:
        if may_speak():
            Console(stderr=True).print(f"[red]error:[/red] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _escaped(error: Exception) -> str:
    # Errors of the system may quote a very long name.
    text = str(error) if isinstance(error, LissomError) else f"{error!s:.400}"
    # Errors name the arguments of `lissom.compile`, not the options of the command line.
    return text.replace("pass data=", "give --data FILE").replace("[", r"\[")
