"""The last part of a search: programs that lose more than allowed, or the best for a target, are distilled and ranked again.

Distillation is counted in steps, since only then two runs give the same weights; how many fit into the time is measured first.
"""

from __future__ import annotations

import math

from lissom.driver.compile import optimize_model
from lissom.driver.options import Settings
from lissom.errors import LissomError
from lissom.tuning.build import Variant, silent
from lissom.tuning.search import Choice, Search

_COUNT = 3
_LEAST_STEPS, _PROBE_STEPS = 8, 4
_FACTOR, _UP, _DOWN = 3.0, 1.8, 1.6
"""The factor on the allowed loss before distillation, and its changes after a program met the bound, or did not."""


def distil(search: Search, until: float) -> None:
    """Verify finalists with distillation, each in an equal part of the time until a fraction of the whole."""
    trials, factor, tried = search.trials, _FACTOR, list[str]()
    for turn in range(sum(candidate.distilled for candidate in trials.candidates), _COUNT):
        finalist = _finalist(search, factor)
        if finalist is None or (pipeline := search.candidate(*finalist).pipeline) in tried:
            return
        tried.append(pipeline)
        seconds = trials.clock.until(until) / (_COUNT - turn) - trials.pace
        pace = _seconds_a_step(search, *finalist) if seconds > 0 else math.inf
        steps = int(seconds / pace)
        if steps < _LEAST_STEPS:
            return
        usual = trials.pace
        distilled = search.verify(*finalist, steps)
        # Training is planned for by itself.
        trials.pace = usual
        factor = factor * _UP if trials.aim.meets(distilled) else factor / _DOWN


def _finalist(search: Search, factor: float) -> tuple[Variant, Choice] | None:
    """The best solution with `factor` times the loss that is allowed without distillation; for a target the solution.

    None where nothing that can be distilled is lossy.
    """
    aim = search.trials.aim
    loss = factor * search.law.inverse(aim.max_drop) if aim.target is None else math.inf
    # A target that the last one missed is aimed at more closely.
    cost = math.inf if aim.target is None else search.ratios.inverse(aim.target) * (0.97 if factor < _FACTOR else 1.0)
    finalist = search.best_of(dict.fromkeys(search.tables, (loss, cost)))
    return finalist if finalist is not None and search.candidate(*finalist, _PROBE_STEPS).distilled else None


def _seconds_a_step(search: Search, variant: Variant, choice: Choice) -> float:
    """The time of a training step, from a few of them; infinite if the program cannot be trained."""
    trials, candidate = search.trials, search.candidate(variant, choice, _PROBE_STEPS)
    trials.clock.show("time of a distillation step")
    settings = Settings(passes=candidate.pipeline, checks="off", data=trials.workshop.data, progress=silent)
    try:
        _, history, _ = optimize_model(trials.workshop.program, trials.workshop.example, settings)
    except LissomError as error:
        trials.fail(candidate, error)
        return math.inf
    curve = next((step.curve for step in history.steps if step.curve), ())
    return curve[-1].seconds / curve[-1].step if curve and curve[-1].step else math.inf
