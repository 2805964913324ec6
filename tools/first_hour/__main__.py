"""Run the first hour: `python -m tools.first_hour --out DIR`, again to go on where it ended, `--pretend` without a GPU."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from lissom.errors import nearest
from tools.first_hour.device import card_name
from tools.first_hour.report import problems, write_report
from tools.first_hour.results import Results, UsageError
from tools.first_hour.tasks import STEPS, Step, run


def main() -> None:
    """Run the steps; a task that fails does not end the run."""
    # A batch system ends a run by SIGTERM; what was finished is kept either way.
    signal.signal(signal.SIGTERM, _interrupt)
    options = _parser().parse_args()
    try:
        steps = chosen_steps(options.only)
        again = chosen_steps(options.again) if options.again else []
        card = card_name(options.pretend)
        results = Results(options.out, card)
    except UsageError as error:
        sys.exit(str(error))
    for step in again:
        results.forget(step.name)
    try:
        for step in steps:
            run_step(step, results, card, options.pretend)
    except KeyboardInterrupt:
        print(f"interrupted; start it again to go on: {_page(results)}", file=sys.stderr)
        sys.exit(130)
    finally:
        write_report(results, card, options.pretend)
    print(_page(results))


def run_step(step: Step, results: Results, card: str, pretend: bool) -> None:
    """Run the tasks without a result, as long as the step's time lasts."""
    end = time.monotonic() + step.seconds
    for task in step.tasks(pretend):
        if results.find(step.name, task.name) is not None:
            continue
        left = end - time.monotonic()
        if left < min(20.0, task.seconds):
            print(f"{step.name}: its {step.seconds:.0f} seconds are over; start it again for the rest", file=sys.stderr)
            return
        result = run(step.name, task, min(task.seconds, left))
        # The step's time was over, not the task's, which has all of it at the next start.
        if result.status == "late" and left < min(task.seconds, step.seconds - 1):
            print(f"{step.name}: its {step.seconds:.0f} seconds ended during {task.name}", file=sys.stderr)
            return
        results.add(result)
        write_report(results, card, pretend)
        found = len(problems(result))
        print(f"{step.name}: {task.name}: {result.status} in {result.seconds:.0f} s" + (f", {found} faults" if found else ""))


def chosen_steps(names: str) -> list[Step]:
    """The steps of a list, in their order; all without one."""
    known = {step.name: step for step in STEPS}
    chosen = [name.strip() for name in names.split(",") if name.strip()] if names else list(known)
    for name in chosen:
        if name not in known:
            raise UsageError(f"there is no step '{name}' among {', '.join(known)}{nearest(name, known)}")
    return [step for step in STEPS if step.name in chosen]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _page(results: Results) -> str:
    return str(results.folder / "report.md")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.first_hour", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results and report.md are kept")
    parser.add_argument("--only", default="", metavar="STEPS", help="steps, separated by commas")
    parser.add_argument("--again", default="", metavar="STEPS", help="steps to forget first, separated by commas")
    parser.add_argument("--pretend", action="store_true", help="pretend that there is a GPU; nothing is timed")
    return parser


if __name__ == "__main__":
    main()
