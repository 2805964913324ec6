"""The curves of training passes as a picture: the loss of the steps and that of the data held out, over minutes."""

from __future__ import annotations

from pathlib import Path

from lissom.compiler.pipeline.history import History
from lissom.errors import UnsupportedError
from lissom.inspect.pictures import save_figure


def plot_training(history: History, path: Path) -> None:
    """One panel for each training pass. Raises: UnsupportedError, see `Report.plot_training`."""
    trained = [step for step in history.steps if step.curve]
    if not trained:
        raise UnsupportedError("no training pass ran, so there is no curve to draw; add `distill` or `finetune` to the passes")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("drawing a curve needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6.4, 3.2 * len(trained)), layout="constrained")
    for number, step in enumerate(trained, 1):
        axes = figure.add_subplot(len(trained), 1, number)
        losses = [(point.seconds / 60, point.loss) for point in step.curve if point.loss is not None]
        axes.plot([at for at, _ in losses], [loss for _, loss in losses], label="steps", color="#bbbbbb")
        axes.plot([point.seconds / 60 for point in step.curve], [point.held_out for point in step.curve], label="held out")
        axes.set(title=step.spelling, xlabel="minutes", ylabel="loss", yscale="log")
        axes.legend()
    save_figure(figure, path)
