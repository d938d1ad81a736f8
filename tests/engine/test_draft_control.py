"""How many tokens are drafted: rules of numbers, tried on a machine whose costs are known."""

from __future__ import annotations

import random

import numpy as np
import pytest

from swaa_local.engine.draft_control import MAX_DRAFT, MIN_TOKENS, Costs, DraftControl, Source, look_up

DEPTH = 8000
BOTH = {Source.REPEATS_4: 0, Source.WINDOW: MAX_DRAFT}


def simulate(
    *, draft_s: float, more_s: float, acceptance: float, n_tokens: int, costs: Costs | None = None, noise: float = 0.0
) -> float:
    """Tokens a second of an answer under `auto`; without drafts it is 1.

    A decoded token costs 1, a drafted one draft_s, and each further token of a pass more_s.
    """
    chance = random.Random(1)
    control, spent, said = DraftControl(costs or Costs()), 0.0, 0
    while said < n_tokens:
        plan = control.plan(DEPTH + said, BOTH)
        drafting = plan.n * draft_s * (1 + noise * chance.random())
        reading = (1 + plan.n * more_s) * (1 + noise * chance.random())
        control.add_drafted(plan.n, drafting)
        control.add_pass(plan.n + 1, reading)
        n_right = next((i for i in range(plan.n) if chance.random() >= acceptance), plan.n)
        if plan.n:
            control.add_outcome(plan.source, n_right, plan.n)
        spent, said = spent + drafting + reading, said + n_right + 1
    return said / spent


def best(draft_s: float, more_s: float, acceptance: float) -> float:
    """With the best number of drafted tokens: those accepted in a row, and the one that full attention adds."""
    said = [sum(acceptance**i for i in range(n + 1)) for n in range(MAX_DRAFT + 1)]
    return max(tokens / (1 + n * (draft_s + more_s)) for n, tokens in enumerate(said))


@pytest.mark.parametrize("acceptance", [0.98, 0.9, 0.7])
@pytest.mark.parametrize(("draft_s", "more_s"), [(0.2, 0.02), (0.4, 0.1), (0.1, 0.3)])
def test_what_pays_is_taken(draft_s, more_s, acceptance):
    promised = best(draft_s, more_s, acceptance)
    got = simulate(draft_s=draft_s, more_s=more_s, acceptance=acceptance, n_tokens=1000)
    assert got > 0.85 * promised


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("acceptance", [0.95, 0.5, 0.2, 0.1, 0.0])
@pytest.mark.parametrize(("draft_s", "more_s"), [(0.6, 0.6), (0.9, 0.1), (1.0, 1.0), (0.2, 0.1)])
def test_what_does_not_pay_costs_little(draft_s, more_s, acceptance, noise):
    expected = 1 / (1 + noise / 2)
    for n_tokens in (200, 1000):
        got = simulate(draft_s=draft_s, more_s=more_s, acceptance=acceptance, n_tokens=n_tokens, noise=noise)
        assert got > 0.97 * expected


def test_what_is_known_is_not_tried_again():
    costs = Costs()
    for _ in range(3):
        simulate(draft_s=1.0, more_s=1.0, acceptance=0.9, n_tokens=200, costs=costs)
    for _ in range(5):
        assert simulate(draft_s=1.0, more_s=1.0, acceptance=0.9, n_tokens=100, costs=costs) > 0.97


def test_another_depth_is_measured_anew():
    costs = Costs()
    simulate(draft_s=1.0, more_s=1.0, acceptance=0.9, n_tokens=100, costs=costs)
    assert costs.at(DEPTH).know_passes
    assert not costs.at(4 * DEPTH).know_decode


def test_a_short_context_is_not_tried():
    control = DraftControl(Costs())
    for _ in range(50):
        assert control.plan(MIN_TOKENS - 1, BOTH).n == 0
        control.add_pass(1, 1.0)


def test_without_costs_the_time_changes_nothing():
    plans = []
    for seconds in (1e-3, 10.0):
        control = DraftControl(None)
        plans.append([])
        for i in range(30):
            plan = control.plan(50, BOTH)
            assert plan.n >= 1
            plans[-1].append(plan)
            control.add_drafted(plan.n, seconds)
            control.add_pass(plan.n + 1, seconds * i)
            control.add_outcome(plan.source, i % (plan.n + 1), plan.n)
    assert plans[0] == plans[1]


def test_the_less_is_accepted_the_less_is_drafted():
    control = DraftControl(None)
    for _ in range(40):
        control.add_outcome(Source.WINDOW, 8, 8)
    many = control.plan(50, BOTH).n
    for _ in range(40):
        control.add_outcome(Source.WINDOW, 0, 1)
    assert control.plan(50, BOTH).n == 1 < many


def test_the_better_source_is_taken():
    control = DraftControl(None)
    limits = {Source.REPEATS_4: 8, Source.WINDOW: 8}
    for _ in range(20):
        control.add_outcome(Source.WINDOW, 8, 8)
        control.add_outcome(Source.REPEATS_4, 0, 1)
    assert control.plan(50, limits).source is Source.WINDOW
    for _ in range(20):
        control.add_outcome(Source.REPEATS_4, 8, 8)
    assert control.plan(50, limits).source is Source.REPEATS_4


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("abcdXabc", "dXabc"),
        ("abcdXabceXabc", "eXabc"),  # the last place
        ("1abcdX abceX1abc", "dX abceX1abc"),  # but a longer match first
        ("aaaa", "a"),
        ("abcXabd", ""),
        ("abcXYbc", "XYbc"),
        ("1abcX 2bcY 3bcZ1abc", "X 2bcY 3bcZ1abc"),
        ("abcX" + "bcY" * 70 + "abc", "X" + "bcY" * 70 + "abc"),  # the longer match, behind however many shorter ones
        ("abc", ""),
        ("", ""),
    ],
)
def test_what_followed_the_last_time(text, follows):
    tokens = np.array([ord(letter) for letter in text], dtype=np.intc)
    assert "".join(map(chr, look_up(tokens)[1])) == follows[:MAX_DRAFT]


@pytest.mark.parametrize(
    ("repeated", "source"),
    [
        (2, Source.REPEATS_2),
        (3, Source.REPEATS_3),
        (4, Source.REPEATS_4),
        (11, Source.REPEATS_4),
        (12, Source.REPEATS_12),
        (30, Source.REPEATS_12),
    ],
)
def test_the_source_says_how_much_is_repeated(repeated, source):
    said = list(range(100, 100 + repeated))
    assert look_up(np.array([1, *said, 2, 3, *said], dtype=np.intc))[0] is source


def test_what_is_surer_is_drafted_further():
    """Costs of a CPU: each further token of a pass costs a third of a decoded one."""
    costs = Costs()
    costs.at(DEPTH)
    for n in (1, 2, 4, 8):
        for _ in range(5):
            costs.add_pass(n, 1 + 0.33 * (n - 1))
    costs.since_decode = 0
    control = DraftControl(costs)
    lengths = [
        control.plan(DEPTH, {source: 7, Source.WINDOW: 0}).n
        for source in (Source.REPEATS_3, Source.REPEATS_4, Source.REPEATS_12)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < 3
    assert lengths[2] == 7
