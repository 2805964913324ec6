"""Tests of kernels as two convolutions: the oracles are NumPy's decomposition slice by slice, and dense least squares."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch.nn import functional

from lissom.passes.lightweight.depthwise_separable.convolution import Window
from lissom.passes.lightweight.depthwise_separable.factors import (
    ORDERS,
    Fit,
    Layout,
    Order,
    covariance,
    decompose,
    energy,
    factors,
    of_slices,
    roots,
)
from tests.support.models import normal

SHAPES = [((3,), 1), ((4,), 2), ((3, 3), 1), ((2, 5), 3), ((1, 3, 2), 1)]


def layout_of(order: Order, size: tuple[int, ...], groups: int, channels_in: int = 6, channels_out: int = 12) -> Layout:
    window = Window(size, (1,) * len(size), ((0, 0),) * len(size), (1,) * len(size))
    return Layout(order, channels_in, channels_out, groups, window)


def kernel_of(layout: Layout, seed: int = 0) -> torch.Tensor:
    return normal(layout.channels_out, layout.inputs, *layout.window.size, seed=seed).double()


def best(layout: Layout, kernel: torch.Tensor, terms: int) -> torch.Tensor:
    """The kernel with each slice cut to so many terms, by a loop over channels."""
    found, given = numpy.zeros(kernel.flatten(2).shape), kernel.flatten(2).numpy()
    outputs = layout.channels_out // layout.groups

    def cut(matrix: numpy.ndarray) -> numpy.ndarray:
        U, S, Vt = numpy.linalg.svd(matrix, full_matrices=False)
        return (U[:, :terms] * S[:terms]) @ Vt[:terms]

    if layout.order == "pointwise-first":
        for channel in range(layout.channels_out):
            found[channel] = cut(given[channel])
    else:
        for group in range(layout.groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            for channel in range(layout.channels_in // layout.groups):
                found[rows, channel] = cut(given[rows, channel])
    return torch.from_numpy(found).reshape(kernel.shape)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "groups"), SHAPES)
def test_factors_are_those_of_least_error(size: tuple[int, ...], groups: int, order: Order) -> None:
    layout = layout_of(order, size, groups)
    kernel = kernel_of(layout)
    found = decompose(layout.slices(kernel))
    for terms in range(1, layout.most_terms + 1):
        made = layout.kernel(*layout.weights(*factors(found, terms)))
        wanted = best(layout, kernel, terms)
        torch.testing.assert_close(made, wanted)
        missing = float((kernel - wanted).square().sum() / kernel.square().sum())
        assert float(1 - energy(found[1])[terms - 1]) == pytest.approx(missing, abs=1e-12)
    torch.testing.assert_close(made, kernel)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "groups"), SHAPES)
def test_both_convolutions_are_the_one(size: tuple[int, ...], groups: int, order: Order) -> None:
    layout = layout_of(order, size, groups)
    kernel = kernel_of(layout)
    first, last = layout.weights(*factors(decompose(layout.slices(kernel)), 2))
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(size) - 1]
    x = normal(2, 6, 8, 7, 6)[(..., *[0] * (3 - len(size)))].double()
    found = convolve(convolve(x, first, groups=layout.first_groups), last, groups=layout.last_groups)
    torch.testing.assert_close(found, convolve(x, layout.kernel(first, last), groups=groups))


def test_zero_kernel_has_all_energy_in_one_term() -> None:
    layout = layout_of("depthwise-first", (3,), 1)
    found = decompose(layout.slices(torch.zeros(12, 6, 3)))
    assert energy(found[1])[0] == 1
    assert all(torch.isfinite(item).all() and not item[0].isnan().any() for item in factors(found, 1))


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 2, 2)])
def test_patches_are_what_unfold_gives(stride: int, padding: int, dilation: int) -> None:
    window = Window((3, 2), (stride,) * 2, ((padding, padding),) * 2, (dilation,) * 2)
    x = normal(2, 3, 11, 9)
    wanted = functional.unfold(x, (3, 2), dilation, padding, stride).unflatten(1, (3, 6)).transpose(2, 3)
    assert torch.equal(window.patches(x), wanted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_terms_are_chosen_by_their_effect_on_slices(groups: int, order: Order) -> None:
    """One channel, or one group, at a time: no other factor of rank one errs less on the values met."""
    layout = layout_of(order, (3,), groups)
    kernel, x = kernel_of(layout), (normal(4, 6, 40, seed=1).cumsum(2) * normal(6, 1, seed=2).exp()).double()
    root, inverse = (of_slices(layout, item) for item in roots(covariance(layout, x)))
    slices = layout.slices(kernel)
    first, last = factors(decompose(slices, root), 1, inverse)
    plain = factors(decompose(slices), 1)
    if order == "depthwise-first":
        met = layout.window.patches(x).transpose(0, 1).flatten(1, 2)
    else:
        met = x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2).repeat_interleave(12 // groups, 0)

    def error(first: torch.Tensor, last: torch.Tensor, index: int) -> float:
        return float((met[index] @ (last[index] @ first[index] - slices[index]).T).norm())

    for index in range(len(slices)):
        _, S, _ = numpy.linalg.svd((slices[index] @ met[index].T).numpy(), full_matrices=False)
        least = float(numpy.linalg.norm(S[1:]))
        # A covariance has a ten-thousandth of its mean variance added to each.
        assert error(first, last, index) == pytest.approx(least, rel=1e-3)
        assert error(first, last, index) <= error(*plain, index) * (1 + 1e-3)


def test_a_channel_that_is_always_zero_leaves_finite_factors() -> None:
    layout = layout_of("depthwise-first", (3,), 1)
    x = normal(2, 6, 9)
    x[:, 2] = 0
    root, inverse = (of_slices(layout, item) for item in roots(covariance(layout, x)))
    found = factors(decompose(layout.slices(kernel_of(layout)), root), 2, inverse)
    assert all(torch.isfinite(item).all() for item in found)


def fit_of(layout: Layout, x: torch.Tensor, noise: float) -> tuple[Fit, torch.Tensor, torch.Tensor]:
    """A fit to what a kernel of other numbers gives, the last factor it starts from, and what is wanted."""
    first, last = layout.weights(*factors(decompose(layout.slices(kernel_of(layout))), 1))
    wanted = (
        functional.conv1d(x, kernel_of(layout, seed=5), groups=layout.groups) + noise * normal(len(x), 12, 8, seed=6).double()
    )
    fit = Fit(layout, first, last)
    for index, (value, target) in enumerate(zip(x.split(1), wanted.split(1), strict=True)):
        fit.add(value, target, index % 2 if len(x) > 1 else None)
    return fit, last, wanted


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("samples", [1, 30])
def test_the_last_kernel_is_fitted_by_least_squares(samples: int, groups: int, order: Order) -> None:
    """The oracle convolves with each number of the last kernel in turn, and solves for all of a channel at once."""
    layout = layout_of(order, (3,), groups)
    x = normal(samples, 6, 10, seed=3).double()
    fit, last, wanted = fit_of(layout, x, noise=3.0)
    found, error = fit.solve()
    z = functional.conv1d(x, fit.first, groups=layout.first_groups)
    outputs = len(last) // layout.last_groups
    ridges: list[float] = []
    held_out: dict[float, float] = dict.fromkeys((0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), 0.0)
    solutions: dict[float, torch.Tensor] = {ridge: torch.zeros_like(last) for ridge in held_out}
    for group in range(layout.last_groups):
        channels = z.unflatten(1, (layout.last_groups, -1))[:, group]
        design = channels.unfold(2, last.shape[2], 1).permute(0, 2, 1, 3).flatten(2)
        targets = wanted.unflatten(1, (layout.last_groups, -1))[:, group].transpose(1, 2)
        rows = slice(group * outputs, (group + 1) * outputs)
        start = last[rows].flatten(1)
        parts = (slice(None, 4), slice(4, None))
        halves = [(design[:, part].flatten(0, 1), targets[:, part].flatten(0, 1)) for part in parts]
        if samples > 1:
            halves = [(design[part::2].flatten(0, 1), targets[part::2].flatten(0, 1)) for part in (0, 1)]
        whole = design.flatten(0, 1), targets.flatten(0, 1)
        for ridge in held_out:
            for (a, b), (c, d) in (halves, halves[::-1]):
                fitted = start if ridge == 0 else damped(a, b, start, ridge)
                held_out[ridge] += float((c @ fitted.T - d).square().sum())
            solutions[ridge][rows] = (start if ridge == 0 else damped(*whole, start, ridge)).reshape(last[rows].shape)
    ridges = sorted(held_out, key=held_out.__getitem__)
    torch.testing.assert_close(found, solutions[ridges[0]])
    assert error == pytest.approx((held_out[ridges[0]] / float(wanted.square().sum())) ** 0.5)


def damped(z: torch.Tensor, y: torch.Tensor, start: torch.Tensor, ridge: float) -> torch.Tensor:
    """min ‖zWᵀ - y‖² + λ‖W - start‖² with λ as rows of its own; W: [outputs, features]."""
    pull = (ridge * z.square().sum(0).mean()).sqrt() * torch.eye(z.shape[1], dtype=z.dtype)
    return torch.linalg.lstsq(torch.cat([z, pull]), torch.cat([y, pull @ start.T])).solution.T


@pytest.mark.parametrize("order", ORDERS)
def test_uninformative_data_leave_last_kernel_unchanged(order: Order) -> None:
    layout = layout_of(order, (3,), 1)
    first, last = layout.weights(*factors(decompose(layout.slices(kernel_of(layout))), 1))
    fit = Fit(layout, first, last)
    fit.add(torch.zeros(1, 6, 10).double(), torch.zeros(1, 12, 8).double(), None)
    found, error = fit.solve()
    assert torch.equal(found, last) and error == 0
