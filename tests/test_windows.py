"""Ragged windows against the cyclic shift, zero padding and mask that they replace."""

import numpy as np
import pytest
import torch
from across_versions import strict_zip
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from swinv2_mm.windows import axis_segments, gather, map_windows, partition, scatter


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


@given(st.integers(1, 35), st.integers(1, 35), window_and_shift(13), st.integers(1, 300))
def test_parts_are_whole_windows_in_order_up_to_a_number_of_tokens(height, width, window_shift, max_tokens):
    windows = partition(2, height, width, *window_shift)
    parts = windows.split(max_tokens)
    assert torch.equal(torch.cat([part.order for part in parts]), windows.order)
    for part in parts:
        assert part.images.tolist() == [token // (height * width) for token in part.order.tolist()]

    def shapes(part):
        return [(group.height, group.width) for group in part.groups for _ in range(group.count)]

    assert [shape for part in parts for shape in shapes(part)] == shapes(windows)
    for part, following in zip(parts, [*parts[1:], None]):
        tokens = sum(group.num_tokens for group in part.groups)
        assert len(part.order) == tokens
        assert tokens <= max_tokens or len(shapes(part)) == 1
        if following is not None:
            height, width = shapes(following)[0]
            assert tokens + height * width > max_tokens  # no part ends early


@given(st.integers(1, 90), st.integers(1, 90), window_and_shift(13), st.integers(1, 3000), st.sampled_from([16, 256]))
def test_a_part_that_ends_inside_a_group_has_an_even_number_of_tokens(height, width, window_shift, most, multiple):
    windows = partition(2, height, width, *window_shift)
    parts = windows.split(most, multiple)
    assert torch.equal(torch.cat([part.order for part in parts]), windows.order)
    for part, following in zip(parts, parts[1:]):
        last, first = part.groups[-1], following.groups[0]
        if last[:2] != first[:2]:
            continue
        before = sum(group.num_tokens for group in part.groups[:-1])
        possible = range(1, (most - before) // (last.height * last.width) + 1)
        even = [n for n in possible if n * last.height * last.width % multiple == 0]
        assert last.count == max(even or possible or [1])


@given(st.integers(1, 35), st.integers(1, 35), window_and_shift(13))
def test_the_largest_window_has_the_longest_segments(height, width, window_shift):
    assert partition(1, height, width, *window_shift).largest == (
        max(axis_segments(height, *window_shift)),
        max(axis_segments(width, *window_shift)),
    )


def test_a_partition_is_made_once_and_serves_a_forward_pass_with_gradients():
    shape = (2, 41, 43)  # no other test has it
    with torch.inference_mode():
        windows = partition(*shape, 6, 2)
    assert not windows.order.is_inference() and not windows.images.is_inference()
    assert partition(*shape, 6, 2) is windows
    x = torch.randn(*shape, 3, requires_grad=True)
    (gather(x, [windows])[0] ** 2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_a_partition_of_fake_tensors_is_not_kept():
    with FakeTensorMode():
        partition(2, 37, 43, 6, 2)
    assert type(partition(2, 37, 43, 6, 2).order) is torch.Tensor


def test_tokens_know_their_image():
    for part in partition(3, 7, 5, 4, 2).split(30):
        assert part.images.tolist() == [place // 35 for place in part.order.tolist()]


@pytest.mark.parametrize('shape', [(2, 7, 5), (1, 1, 9), (2, 13, 16), (3, 4, 4)])
@pytest.mark.parametrize('window, shift', [(4, 0), (4, 2), (5, 2), (16, 8)])
@pytest.mark.parametrize('max_tokens', [1000, 20, 1])
def test_scatter_undoes_gather(shape, window, shift, max_tokens):
    windows = partition(*shape, window, shift)
    parts = windows.split(max_tokens)
    x = torch.randn(*shape, 3)
    tokens = gather(x, parts)
    assert torch.equal(torch.cat(tokens), torch.stack([x.view(-1, 3)[i] for i in windows.order.tolist()]))
    assert torch.equal(scatter(tokens, parts, *shape), x)


@pytest.mark.parametrize('max_tokens', [1000, 5])
def test_gradients_of_gather_and_scatter_are_those_of_finite_differences(max_tokens):
    parts = partition(2, 5, 3, 2, 1).split(max_tokens)
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    tokens = [torch.randn(len(part.order), 2, dtype=torch.float64, requires_grad=True) for part in parts]
    for function, inputs in (
        (lambda x: tuple(t**2 for t in gather(x, parts)), (x,)),
        (lambda *tokens: scatter(tokens, parts, 2, 5, 3) ** 2, tokens),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('max_tokens', [1000, 20])
@pytest.mark.parametrize('contiguous', [True, False])
def test_a_function_of_windows_is_applied_part_by_part(gradients, max_tokens, contiguous):
    parts = partition(2, 7, 5, 3, 1).split(max_tokens)
    x = torch.randn(2, 7, 5, 4) if contiguous else torch.randn(2, 4, 7, 5).permute(0, 2, 3, 1)
    before, seen = x.clone(), []
    x.requires_grad_(gradients)

    def weighted(tokens, part):
        """A function of the tokens and of their places on the map."""
        seen.append(part)
        return tokens**2 * part.order[:, None]

    with torch.set_grad_enabled(gradients):
        out = map_windows(weighted, x, parts)
    weights = torch.arange(70).view(2, 7, 5, 1)
    assert all(part is given for part, given in strict_zip(seen, parts))
    assert torch.equal(x.detach(), before)
    torch.testing.assert_close(out, before**2 * weights)
    if gradients:
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, 2 * before * weights)


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('max_tokens', [1000, 20])
def test_a_function_of_windows_may_work_in_place_without_changing_the_map(gradients, max_tokens):
    parts = partition(2, 7, 5, 3, 1).split(max_tokens)
    x = torch.randn(2, 7, 5, 4, requires_grad=gradients)
    before = x.detach().clone()
    with torch.set_grad_enabled(gradients):
        out = map_windows(lambda tokens, part: tokens.mul_(3), x, parts)
    assert torch.equal(x.detach(), before)
    assert torch.equal(out, 3 * before)
