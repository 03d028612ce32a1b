"""The search finds what was planted, in tables and in attention; keeps its recall; sums are those of brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.kernels.tile_mass import tile_counts, tile_mass, tile_order
from graphwright.kernels.window_lists import window_lists
from graphwright.profiles.shrink_windows import HeadShape, classify, frame_groups, measure, shrink, union

GRID = (4, 6, 10)
FULL = (9, 5, 9, 5)
DROPPED = (-1, -1, -1, -1)


def planted(density, grid=GRID):
    """A table of mass 1 in all that has this density at each offset, and the counts."""
    counts = tile_counts(*grid, (1, 1, 1))
    values = [density(*offset) for offset in itertools.product(*map(range, grid))]
    mass = counts * torch.tensor(values, dtype=torch.float64).view(grid)
    return mass / mass.sum(), counts


def random_tables(seed, grid, sharpness=4):
    generator = torch.Generator().manual_seed(seed)
    counts = tile_counts(*grid, (1, 1, 1))
    mass = counts * torch.rand(grid, dtype=torch.float64, generator=generator) ** sharpness
    return mass / mass.sum(), counts


# Density by offset in time, height and width; windows by group; shape.
PLANTED = {
    "global": (lambda t, h, w: 1.0, [FULL] * 4, HeadShape("global", False)),
    "cross": (lambda t, h, w: 1.0 if h == 0 or w == 0 else 1e-3, [(9, 0, 0, 5)] * 4, HeadShape("cross", False)),
    "thick cross": (lambda t, h, w: 1.0 if h == 0 or w <= 1 else 1e-3, [(9, 0, 1, 5)] * 4, HeadShape("cross", False)),
    "box": (lambda t, h, w: 1.0 if h <= 1 and w <= 2 else 1e-4, [(2, 1, 2, 1)] * 4, HeadShape("local", False)),
    "band": (lambda t, h, w: 1.0 if h <= 1 else 1e-4, [(9, 1, 9, 1)] * 4, HeadShape("local", False)),
    "own frame": (lambda t, h, w: 1.0 if t == 0 else 1e-4, [FULL, *[DROPPED] * 3], HeadShape("global", True)),
    "far frames": (lambda t, h, w: 1.0 if t > 1 else 1e-4, [DROPPED, DROPPED, FULL, FULL], HeadShape("global", True)),
    "narrowing": (
        lambda t, h, w: 1.0 if h <= 3 - t and w <= 4 - t else 1e-4,
        [(4, 3, 4, 3), (3, 2, 3, 2), (2, 1, 2, 1), (1, 0, 1, 0)],
        HeadShape("local", True),
    ),
}


def same_cover(a, b, grid=GRID):
    """Whether windows keep the same offsets; their numbers may differ where one rectangle holds the other."""
    offsets = list(itertools.product(range(grid[1]), range(grid[2])))
    return all(covers(p, offset) == covers(q, offset) for p, q in zip(a, b, strict=True) for offset in offsets)


def covers(window, offset):
    (outer_w, inner_h, inner_w, outer_h), (dh, dw) = window, offset
    return (dw <= outer_w and dh <= inner_h) or (dw <= inner_w and dh <= outer_h)


@pytest.mark.parametrize("cost", [0.011, 0.04])
@pytest.mark.parametrize("name", PLANTED)
def test_finds_what_was_planted_in_a_table(name, cost):
    density, windows, shape = PLANTED[name]
    mass, counts = planted(density)
    found = shrink(mass, 0.0, counts, [0, 1, 2, 3], cost=cost)
    assert same_cover(found.windows, windows), found
    assert classify(found.windows, GRID, [0, 1, 2, 3]) == shape
    expected = measure(windows, mass, 0.0, counts, [0, 1, 2, 3])
    assert found.recall == pytest.approx(expected.recall, abs=1e-12)
    assert found.sparsity == pytest.approx(expected.sparsity, abs=1e-12)


def plain_search(mass, counts, recall, cost):
    """One group's search as the paper's description reads, with sums over all offsets at each trial."""
    height, width = mass.shape

    def totals(window):
        kept = [(h, w) for h in range(height) for w in range(width) if covers(window, (h, w))]
        return sum(float(mass[at]) for at in kept), sum(float(counts[at]) for at in kept)

    window, live = (width - 1, height - 1, width - 1, height - 1), {0, 1, 2, 3}
    whole_mass, whole_pairs = totals(window)
    while True:
        now, trials = totals(window), []
        outer_w, inner_h, inner_w, outer_h = window
        lowered = [
            (outer_w - 1, inner_h, min(inner_w, outer_w - 1), outer_h),
            (outer_w, min(inner_h, outer_h - 1), inner_w, outer_h - 1),
            (outer_w, inner_h, inner_w - 1, outer_h),
            (outer_w, inner_h - 1, inner_w, outer_h),
        ]
        for side in sorted(live):
            for trial in (lowered[side], (outer_w, inner_h - 1, inner_w - 1, outer_h)):
                if min(trial) >= -1 and totals(trial)[1] < now[1]:
                    lost, saved = now[0] - totals(trial)[0], now[1] - totals(trial)[1]
                    trials.append((lost / whole_mass / (saved / whole_pairs), side, trial))
                    break
                if side < 2:
                    break
        if not trials:
            return window
        least = min(trials)[0]
        price, side, trial = next(each for each in trials if each[0] <= least + 1e-9)
        if price <= cost and totals(trial)[0] / whole_mass >= recall:
            window = trial
        else:
            live.remove(side)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 6)),
    seed=st.integers(0, 2**31),
    sharpness=st.sampled_from([1, 4, 12]),
    recall=st.floats(0.2, 0.99),
    cost=st.sampled_from([0.011, 0.3, 2.0]),
)
def test_one_group_is_searched_as_the_description_reads(grid, seed, sharpness, recall, cost):
    mass, counts = random_tables(seed, grid, sharpness)
    found = shrink(mass, 0.0, counts, [0], recall=recall, cost=cost)
    assert same_cover(found.windows, [plain_search(mass[0], counts[0], recall, cost)], grid)


FRAMES, HEIGHT, WIDTH, TILE = 5, 8, 12, (1, 2, 2)


def attention_heads():
    """Query and key [1, 5, N, D] of a local, a cross, a row, a global and a next-frame head, and 3 text tokens."""
    t, h, w = torch.unravel_index(torch.arange(FRAMES * HEIGHT * WIDTH), (FRAMES, HEIGHT, WIDTH))
    one = torch.nn.functional.one_hot
    rows, columns, places = one(h, HEIGHT), one(w, WIDTH), one(h * WIDTH + w, HEIGHT * WIDTH)
    ones = torch.ones(len(t), 1)
    xy = torch.stack((h, w), 1).float()
    step = (t - (FRAMES - 1) / 2)[:, None] ** 2
    near = torch.cat((xy, ones), 1), torch.cat((xy, -xy.square().sum(1, keepdim=True) / 2), 1)
    cross = torch.cat((rows, columns, -places), 1).float() * 8, torch.cat((rows, columns, places), 1).float()
    row = rows.float() * 9, rows.float()
    # Its score is 9 where the frames are the same or neighbours, and 0 else.
    frames = one(t, FRAMES).float()
    around = 9 * ((torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs() <= 1).float()
    heads = [near, cross, row, (ones * 0, step), (frames @ around, frames)]
    size = max(head[0].shape[1] for head in heads)
    query, key = (
        torch.stack([torch.nn.functional.pad(head[side], (0, size - head[side].shape[1], 0, 3)) for head in heads])
        for side in (0, 1)
    )
    return query[None], key[None]


def test_finds_what_was_planted_in_attention_and_recall_is_the_mask_s():
    query, key = attention_heads()
    sizes = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "tile": list(TILE)}
    order = tile_order(FRAMES, HEIGHT, WIDTH, TILE, protected=3)
    mass, rest = tile_mass(query, key, order, **sizes, scale=1.0)
    counts = tile_counts(FRAMES, HEIGHT, WIDTH, TILE)
    grid, groups = (5, 4, 6), frame_groups(5)
    heads = [shrink(mass[0, head], float(rest[0, head]), counts, groups) for head in range(5)]
    kinds = [classify(head.windows, grid, groups) for head in heads]
    assert kinds == [("local", False), ("cross", False), ("local", False), ("global", False), ("global", True)]
    assert same_cover(heads[1].windows, [(5, 0, 0, 3)] * 5, grid)
    assert same_cover(heads[2].windows, [(5, 0, 5, 0)] * 5, grid)
    assert heads[3].sparsity == 0
    assert same_cover(heads[4].windows, [(5, 3, 5, 3)] * 2 + [DROPPED] * 3, grid)

    windows = torch.tensor([head.windows for head in heads], dtype=torch.int32)
    lists, blocks = window_lists(windows, torch.tensor(groups, dtype=torch.int32), tiles=grid)
    shares = (query[0] @ key[0].mT).softmax(-1)[:, order.long()][:, :, order.long()]
    tiles, volume = math.prod(grid), math.prod(TILE)
    blocked = shares[:, : tiles * volume, : tiles * volume].view(5, tiles, volume, tiles, volume).sum(-1).mean(2)
    for head, found in enumerate(heads):
        kept = sum(float(blocked[head, q, blocks[head, q, : lists[head, q]].long()].sum()) for q in range(tiles))
        text = float(shares[head, : tiles * volume, tiles * volume :].sum(-1).mean())
        assert found.recall >= 0.9
        # Two float32 sums of the same shares, over 480 keys, 480 queries.
        assert kept / tiles + text == pytest.approx(found.recall, abs=1e-4)
        assert 1 - float(lists[head].sum()) / tiles**2 == pytest.approx(found.sparsity, abs=1e-12)


grids = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))
windows_of_a_group = st.tuples(*[st.integers(-2, 6)] * 4)


@settings(max_examples=80, deadline=None)
@given(grid=grids, data=st.data(), rest=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**31))
def test_measure_is_the_sum_over_the_offsets_that_are_kept(grid, data, rest, seed):
    mass, counts = random_tables(seed, grid)
    groups = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    windows = data.draw(st.lists(windows_of_a_group, min_size=max(groups) + 1, max_size=max(groups) + 1))
    inside = pairs = 0.0
    for dt, dh, dw in itertools.product(*map(range, grid)):
        if covers(windows[groups[min(dt, len(groups) - 1)]], (dh, dw)):
            inside += float(mass[dt, dh, dw])
            pairs += float(counts[dt, dh, dw])
    found = measure(windows, mass.numpy(), rest, counts.numpy(), groups)
    assert found.recall == pytest.approx((inside + rest) / (1 + rest), abs=1e-12)
    assert found.sparsity == pytest.approx(1 - pairs / float(counts.sum()), abs=1e-12)


def test_the_full_windows_keep_everything():
    mass, counts = random_tables(0, GRID)
    for window in (FULL, (99, 99, 99, 99)):
        full = measure([window] * 4, mass, 0.2, counts, [0, 1, 2, 3])
        assert (full.recall, full.sparsity) == (1.0, 0.0)
    nothing = measure([DROPPED] * 4, mass, 0.25, counts, [0, 1, 2, 3])
    assert (nothing.recall, nothing.sparsity) == (pytest.approx(0.2), 1.0)


@settings(max_examples=60, deadline=None)
@given(
    grid=grids,
    seed=st.integers(0, 2**31),
    sharpness=st.sampled_from([1, 4, 12]),
    recall=st.floats(0, 1),
    cost=st.sampled_from([0.0, 0.011, 0.3, 100.0]),
    rest=st.sampled_from([0.0, 0.3]),
    scope=st.sampled_from(["global", "group"]),
    family=st.sampled_from(["dual", "grouped", "cubic"]),
)
def test_every_result_holds_its_recall(grid, seed, sharpness, recall, cost, rest, scope, family):
    mass, counts = random_tables(seed, grid, sharpness)
    groups = frame_groups(grid[0])
    found = shrink(mass, rest, counts, groups, recall=recall, cost=cost, recall_scope=scope, family=family)
    assert found.recall >= recall - 1e-12
    assert found == measure(found.windows, mass, rest, counts, groups)
    assert len(found.windows) == max(groups) + 1
    for outer_w, inner_h, inner_w, outer_h in found.windows:
        assert -1 <= inner_w <= outer_w < grid[2]
        assert -1 <= inner_h <= outer_h < grid[1]
    if scope == "group":
        for group in range(max(groups) + 1):
            part = torch.tensor([at == group for at in groups])
            alone = [window if at == group else DROPPED for at, window in enumerate(found.windows)]
            kept = measure(alone, mass, 0.0, counts, groups).recall / float(mass[part].sum())
            assert family == "cubic" or kept >= recall - 1e-9
    if family != "dual":
        assert all((window[0], window[1]) == (window[2], window[3]) for window in found.windows)
    if family == "cubic":
        assert len(set(found.windows)) == 1


def test_without_a_price_limit_the_recall_is_used_up():
    mass, counts = planted(lambda t, h, w: math.exp(-h - w - t))
    free = shrink(mass, 0.0, counts, frame_groups(4), cost=float("inf"))
    priced = shrink(mass, 0.0, counts, frame_groups(4), cost=0.011)
    assert 0.9 <= free.recall < 0.92
    assert priced.recall > 0.99
    assert free.sparsity > priced.sparsity > 0


@pytest.mark.parametrize("seed", range(20))
def test_sparsity_falls_with_the_recall_that_is_asked_for_and_rises_with_the_cost(seed):
    mass, counts = random_tables(seed, (3, 4, 5), sharpness=6)

    def sparsity(recall, cost):
        return shrink(mass, 0.0, counts, frame_groups(3), recall=recall, cost=cost).sparsity

    by_recall = [sparsity(recall, 0.3) for recall in (0.5, 0.7, 0.9, 0.95, 0.99, 1.0)]
    assert by_recall == sorted(by_recall, reverse=True)
    by_cost = [sparsity(0.0, cost) for cost in (0.0, 0.011, 0.04, 0.3, 1.0)]
    assert by_cost == sorted(by_cost)


def test_families_are_ordered_as_in_the_paper_s_ablation():
    """A cross that narrows in time: frame groups save more than one window, two rectangles more than one."""
    mass, counts = planted(lambda t, h, w: 1.0 if (h == 0 and w <= 9 - 2 * t) or (w == 0 and h <= 5 - t) else 1e-3)
    by_family = [
        shrink(mass, 0.0, counts, frame_groups(4), family=family).sparsity for family in ("cubic", "grouped", "dual")
    ]
    assert by_family[0] < by_family[1] < by_family[2]


def test_recall_by_group_does_not_let_a_faint_group_vanish():
    mass, counts = planted(lambda t, h, w: 1.0 if t == 0 else 1e-4)
    assert shrink(mass, 0.0, counts, [0, 1, 1, 1]).windows[1] == DROPPED
    by_group = shrink(mass, 0.0, counts, [0, 1, 1, 1], recall_scope="group")
    assert same_cover(by_group.windows, [FULL, FULL])


def test_text_counts_as_mass_that_is_kept():
    """With 95% of the attention on text, all of the rest may go."""
    mass, counts = planted(lambda t, h, w: 1.0)
    assert shrink(mass * 0.05, 0.95, counts, range(4), cost=1.0).windows == (DROPPED,) * 4
    assert shrink(mass, 0.0, counts, range(4), cost=1.0, recall=0.95).sparsity < 0.1


@settings(max_examples=100, deadline=None)
@given(a=st.lists(windows_of_a_group, min_size=2, max_size=2), b=st.lists(windows_of_a_group, min_size=2, max_size=2))
def test_a_union_covers_both(a, b):
    united = union(a, b)
    for group, offset in itertools.product(range(2), itertools.product(range(6), range(6))):
        if covers(a[group], offset) or covers(b[group], offset):
            assert covers(united[group], offset)


@settings(max_examples=30, deadline=None)
@given(grid=grids, seeds=st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)))
def test_a_union_keeps_the_recall_of_both_prompts(grid, seeds):
    tables = [random_tables(seed, grid, 8) for seed in seeds]
    groups = frame_groups(grid[0])
    found = [shrink(mass, 0.0, counts, groups, cost=0.3) for mass, counts in tables]
    united = union(found[0].windows, found[1].windows)
    for (mass, counts), alone in zip(tables, found, strict=True):
        assert measure(united, mass, 0.0, counts, groups).recall >= max(0.9, alone.recall) - 1e-12
    assert union(united, found[0].windows) == united


def test_unions_of_plain_shapes():
    """A row and a column make a cross; what is dropped adds nothing, whatever its sides are."""
    row, column = (9, 0, 9, 0), (0, 5, 0, 5)
    assert same_cover(union([(9, 0, -1, -1)], [(-1, -1, 0, 5)]), [(9, 5, 9, 5)])
    assert same_cover(union([(9, 0, 0, 0)], [(0, 0, 0, 5)]), [(9, 0, 0, 5)])
    assert union([row], [DROPPED]) == (row,)
    assert union([(9, -1, -1, 9)], [column]) == (column,)


def test_frame_groups():
    assert frame_groups(1) == [0]
    assert frame_groups(3) == [0, 1, 2]
    assert frame_groups(9) == [0, 1, 2, 3, 4, 4, 5, 5, 5]


def test_shapes():
    tiles = (4, 6, 10)
    assert classify([FULL, FULL], tiles) == ("global", False)
    assert classify([FULL, DROPPED], tiles) == ("global", True)
    assert classify([DROPPED, DROPPED], tiles) == ("empty", False)
    assert classify([(9, 0, 0, 5)], tiles) == ("cross", False)
    assert classify([(3, 1, 1, 2)], tiles) == ("local", False)
    # With the groups given, one that holds no distance of this grid does not count.
    assert classify([FULL, (0, 0, 0, 0)], tiles, [0, 0, 0, 0]) == ("global", False)
    assert classify([FULL, (0, 0, 0, 0)], tiles, [0, 1, 1, 1]) == ("local", True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recall": 1.2}, "got recall=1.2"),
        ({"cost": -0.1}, "cost=-0.1"),
        ({"mass": torch.ones(2, 3)}, r"got tables \[2, 3\] and \[2, 3, 4\]"),
        ({"mass": torch.full((2, 3, 4), float("nan"))}, "got a mass of nan"),
        ({"mass": torch.zeros(2, 3, 4)}, "got a mass of 0.0 in all"),
        ({"mass": torch.full((2, 3, 4), -1.0), "rest": 100.0}, "expected finite shares that are not negative"),
        ({"groups": []}, "got groups"),
        ({"groups": [0, -1]}, "got groups"),
    ],
)
def test_refuses(change, reason):
    good = {"mass": torch.ones(2, 3, 4), "rest": 0.0, "counts": torch.ones(2, 3, 4), "groups": [0, 1]}
    with pytest.raises(InvalidArgument, match=reason):
        shrink(**{**good, **change})


def test_refuses_windows_of_other_groups():
    mass, counts = random_tables(0, (2, 3, 4))
    with pytest.raises(InvalidArgument, match="got 1 windows, expected 2, one a group"):
        measure([FULL], mass, 0.0, counts, [0, 1])
    with pytest.raises(InvalidArgument, match="got windows of 1 and 2 groups"):
        union([FULL], [FULL, FULL])
