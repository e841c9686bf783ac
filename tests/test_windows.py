"""Ragged windows against the cyclic shift, zero padding and mask that they replace."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from swinv2_mm.windows import axis_segments, gather, partition, scatter


@st.composite
def window_and_shift(draw, largest):
    window = draw(st.integers(1, largest))
    return window, draw(st.one_of(st.sampled_from([0, window // 2]), st.integers(0, window - 1)))


def segments_in_order(length, window, shift):
    segments = axis_segments(length, window, shift)
    return sorted((start, start + size) for size, starts in segments.items() for start in starts)


@given(st.integers(1, 200), window_and_shift(40))
def test_segments_tile_the_axis_without_gap_or_overlap(length, window_shift):
    segments = segments_in_order(length, *window_shift)
    assert [token for start, end in segments for token in range(start, end)] == list(range(length))
    assert all(start < end for start, end in segments)


@given(st.integers(1, 200), window_and_shift(40))
def test_a_longer_axis_is_cut_where_the_shifted_grid_lies(length, window_shift):
    window, shift = window_shift
    cuts = {start for start, _ in segments_in_order(length + window, window, shift)} - {0}
    assert cuts == {token for token in range(1, length + window) if token % window == shift}


@given(st.integers(1, 200), window_and_shift(40))
def test_segments_come_in_at_most_three_sizes(length, window_shift):
    segments = axis_segments(length, *window_shift)
    assert len(segments) <= 3
    assert all(starts == sorted(starts) for starts in segments.values())


@given(window_and_shift(40), st.data())
def test_an_axis_that_fits_is_one_unshifted_segment(window_shift, data):
    window, shift = window_shift
    length = data.draw(st.integers(1, window))
    assert axis_segments(length, window, shift) == {length: [0]}


def classical_windows(height, width, window, shift):
    """For each token of an image those it may attend to, by pad, roll, partition and mask.

    Region slices and mask as in `models/swin_transformer_v2.py` of the official code and, for padded maps, in
    `Swin-Transformer-Object-Detection`. An axis that fits into the window is its own window and is not shifted.
    """
    windows = [min(size, window) for size in (height, width)]
    shifts = [shift if size > window else 0 for size in (height, width)]
    labels = np.arange(height * width).reshape(height, width)
    labels = np.pad(labels, [(0, -n % w) for n, w in zip(labels.shape, windows)], constant_values=-1)
    labels = np.roll(labels, [-s for s in shifts], axis=(0, 1))
    regions = np.zeros_like(labels)
    slices = [(slice(0, -w), slice(-w, -s), slice(-s, None)) for w, s in zip(windows, shifts)]
    for i, rows in enumerate(slices[0]):
        for j, columns in enumerate(slices[1]):
            regions[rows, columns] = 3 * i + j

    attends_to = {}
    for top in range(0, labels.shape[0], windows[0]):
        for left in range(0, labels.shape[1], windows[1]):
            cut = np.s_[top : top + windows[0], left : left + windows[1]]
            members = list(zip(labels[cut].ravel().tolist(), regions[cut].ravel().tolist()))
            for token, region in members:
                if token >= 0:
                    attends_to[token] = {t for t, r in members if r == region and t >= 0}
    return attends_to


@given(st.integers(1, 35), st.integers(1, 35), window_and_shift(13))
@example(25, 13, (8, 4))
@example(7, 5, (5, 2))  # one axis fits, the other does not
@example(16, 16, (8, 4))
@example(9, 17, (8, 4))  # one token more than the windows hold
@example(35, 1, (2, 1))
def test_tokens_attend_to_the_same_tokens_as_under_shift_padding_and_mask(height, width, window_shift):
    batch, expected = 2, classical_windows(height, width, *window_shift)
    windows = partition(batch, height, width, *window_shift)
    attends_to, places = {}, windows.order.tolist()
    for group in windows.groups:
        for _ in range(group.count):
            window, places = places[: group.height * group.width], places[group.height * group.width :]
            attends_to.update({token: set(window) for token in window})
    assert places == []
    assert attends_to == {
        image * height * width + token: {image * height * width + t for t in tokens}
        for image in range(batch)
        for token, tokens in expected.items()
    }


@given(st.integers(1, 35), st.integers(1, 35), window_and_shift(13))
def test_windows_come_in_at_most_nine_groups_of_row_major_rectangles(height, width, window_shift):
    windows = partition(2, height, width, *window_shift)
    assert len(windows.groups) <= 9
    assert len({(group.height, group.width) for group in windows.groups}) == len(windows.groups)
    assert sum(group.num_tokens for group in windows.groups) == 2 * height * width
    tokens = windows.order.split([group.num_tokens for group in windows.groups])
    for group, order in zip(windows.groups, tokens):
        order = order.view(group.count, group.height, group.width)
        offsets = torch.arange(group.height)[:, None] * width + torch.arange(group.width)
        assert torch.equal(order - order[:, :1, :1], offsets.expand_as(order))


@pytest.mark.parametrize('shape', [(2, 7, 5), (1, 1, 9), (2, 13, 16), (3, 4, 4)])
@pytest.mark.parametrize('window, shift', [(4, 0), (4, 2), (5, 2), (16, 8)])
def test_scatter_undoes_gather(shape, window, shift):
    windows = partition(*shape, window, shift)
    x = torch.randn(*shape, 3)
    tokens = gather(x, windows)
    assert torch.equal(tokens, torch.stack([x.view(-1, 3)[i] for i in windows.order.tolist()]))
    assert torch.equal(scatter(tokens, windows, *shape), x)


def test_gradients_of_gather_and_scatter_are_those_of_finite_differences():
    windows = partition(2, 5, 3, 2, 1)
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(30, 2, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda x: gather(x, windows) ** 2, x),
        (lambda tokens: scatter(tokens, windows, 2, 5, 3) ** 2, tokens),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
