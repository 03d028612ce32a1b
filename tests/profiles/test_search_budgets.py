"""The search for budgets: repair keeps limits, it beats chance, it goes on after a kill, and processes share it."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, InvalidFile
from graphwright.profiles.search_budgets import (
    FULL,
    Limits,
    evaluations,
    random_table,
    repair,
    search_budgets,
    uniform_table,
)

STEPS = 20
LIMITS = Limits.of(STEPS, 0.5, (0.9, 1.0))
WEIGHTS = np.random.default_rng(5).random(STEPS) ** 3


def error(table):
    """What is skipped costs its weight squared, and a long row of empty steps more: like a sampling's error."""
    skipped = 1 - np.asarray(table) / FULL
    rows = sum(skipped[i] * skipped[i - 1] * skipped[i - 2] for i in range(2, len(skipped)))
    return float((WEIGHTS * skipped**2).sum() + 0.1 * rows)


@settings(max_examples=100, deadline=None)
@given(
    table=st.lists(st.integers(-5, 20), min_size=2, max_size=40),
    budget=st.floats(0.3, 1.0),
    seed=st.integers(0, 2**31),
)
def test_repair_keeps_the_limits_and_the_first_step(table, budget, seed):
    try:
        limits = Limits.of(len(table), budget, (0.9, 1.0))
    except InvalidArgument:
        assert budget * len(table) < 1
        return
    rng = np.random.default_rng(seed)
    assert limits.holds(repair(table, limits, rng))
    assert limits.holds(random_table(limits, rng))
    assert repair(repair(table, limits, rng), limits, rng)[0] == FULL


def test_repair_leaves_what_keeps_the_limits():
    rng = np.random.default_rng(0)
    table = random_table(LIMITS, rng)
    assert repair(table, LIMITS, rng) == table


@pytest.mark.parametrize(("steps", "budget"), [(30, 0.5), (7, 0.4), (2, 0.75), (50, 0.33), (10, 1.0)])
def test_the_uniform_table_has_the_budget(steps, budget):
    table = uniform_table(steps, budget)
    assert len(table) == steps
    assert table[0] == FULL
    assert sum(table) == int(budget * steps * FULL + 1e-9)
    assert max(table[1:]) - min(table[1:]) <= 1


def test_a_budget_below_the_first_step_is_refused():
    with pytest.raises(InvalidArgument, match="less than the first step"):
        Limits.of(4, 0.2, (0.9, 1.0))
    with pytest.raises(InvalidArgument, match="less than the first step"):
        Limits.of(1, 1.0, (0.9, 1.0))


def test_evaluations_are_the_papers():
    assert evaluations(50, 50, 30, 30) == 950


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_beats_random_search_of_the_same_size(seed):
    calls = []
    options = {"parents": 16, "children": 12, "generations": 12, "seed": seed}
    found = search_budgets(lambda table: calls.append(table) or error(table), LIMITS, **options)
    assert len(calls) <= evaluations(STEPS, 16, 12, 12)
    assert all(LIMITS.holds(table) for table, _ in found)
    assert found == sorted(found, key=lambda item: item[1])
    rng = np.random.default_rng(100 + seed)
    chance = min(error(random_table(LIMITS, rng)) for _ in range(len(calls)))
    assert found[0][1] < chance
    assert found[0][1] < error(uniform_table(STEPS, 0.5))


def test_one_seed_finds_one_table():
    options = {"parents": 8, "children": 6, "generations": 4, "seed": 3}
    first, again = (search_budgets(error, LIMITS, **options) for _ in range(2))
    assert first == again


SMALL = {"parents": 8, "children": 6, "generations": 6}


def test_it_goes_on_where_it_was_killed(tmp_path):
    path = tmp_path / "study.log"
    code = f"""if True:
        import time
        from tests.profiles.test_search_budgets import LIMITS, SMALL, error
        from graphwright.profiles.search_budgets import search_budgets
        from pathlib import Path
        def slow(table):
            time.sleep(0.05)
            return error(table)
        print("begun", flush=True)
        search_budgets(slow, LIMITS, study=Path({str(path)!r}), **SMALL)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b'"table"') < 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes().count(b'"table"')
    assert 5 <= before < 44
    calls = []
    found = search_budgets(lambda table: calls.append(table) or error(table), LIMITS, study=path, **SMALL)
    total = evaluations(STEPS, **SMALL)
    # The curve and the tables that were evaluated before are not evaluated again.
    assert len(calls) <= total - (STEPS - 1) - before
    assert len(found) >= before
    again = []
    assert search_budgets(lambda table: again.append(table) or 0.0, LIMITS, study=path, **SMALL) == found
    assert again == []


def _work(path, calls):
    def counted(table):
        with calls.get_lock():
            calls.value += 1
        time.sleep(0.02)
        return error(table)

    search_budgets(counted, LIMITS, study=path, **SMALL)


def test_processes_share_a_study(tmp_path):
    context = multiprocessing.get_context("fork")
    calls = context.Value("i", 0)
    path = tmp_path / "study.log"
    workers = [context.Process(target=_work, args=(path, calls)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    total = evaluations(STEPS, **SMALL)
    # Both may evaluate the curve at once, and each may be in the middle of a table when the last one is done.
    assert calls.value <= total + STEPS + 2
    found = search_budgets(lambda table: 0.0, LIMITS, study=path, **SMALL)
    assert found[0][1] < error(uniform_table(STEPS, 0.5))


def test_the_study_of_another_search_is_refused(tmp_path):
    path = tmp_path / "study.log"
    search_budgets(error, LIMITS, study=path, mark="one model", **SMALL)
    with pytest.raises(InvalidArgument, match="study of another search"):
        search_budgets(error, LIMITS, study=path, mark="another model", **SMALL)
    with pytest.raises(InvalidFile, match="no such folder"):
        search_budgets(error, LIMITS, study=tmp_path / "none" / "study.log", **SMALL)
