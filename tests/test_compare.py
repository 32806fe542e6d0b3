# SPDX-License-Identifier: Apache-2.0
import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import keylayers
from keylayers.ranking.compare import Agreement, agreement, chance_jaccard, mean_by_kind
from keylayers.ranking.differences import difference
from keylayers.report.agreement import agreement_table

from rankings import grid_of, ranking_of, run_of, write_rankings

FOUR = [4.0, 3.0, 2.0, 1.0]
CHANCE = (4 * (1 / 3) + 1) / 6  # two of four: overlap 0, 1, 2 with weights 1, 4, 1 of 6
PAIR_WEIGHTS = 3 * (1 + 1 / 2 + 1 / 3 + 1 / 4)  # 1 / rank for each module, which is in three pairs
# scores of two rankings and a budget, what is measured
BY_HAND = {
    "the same order": (
        (FOUR, [40.0, 30.0, 20.0, 10.0], 0.5),
        {"jaccard": 1, "chance_jaccard": CHANCE, "corrected": 1, "tau": 1, "top_weighted_tau": 1},
    ),
    "the opposite order": (
        (FOUR, FOUR[::-1], 0.5),
        {"jaccard": 0, "corrected": -CHANCE / (1 - CHANCE), "tau": -1, "top_weighted_tau": -1},
    ),
    "of all modules Jaccard says nothing": (
        ([1.0, 2.0], [2.0, 1.0], 1.0),
        {"jaccard": 1, "chance_jaccard": 1, "corrected": None},
    ),
    # five pairs of six are ordered in the first ranking, all in the second; four agree, one not
    "a tie": (
        ([3.0, 3.0, 2.0, 1.0], [4.0, 2.0, 3.0, 1.0], 0.5),
        {"tau": (4 - 1) / (5 * 6) ** 0.5},
    ),
    "an exchange at the top": (
        (FOUR, [3.0, 4.0, 2.0, 1.0], 0.5),
        {"tau": 4 / 6, "top_weighted_tau": 1 - 2 * (1 + 1 / 2) / PAIR_WEIGHTS},
    ),
    "an exchange at the bottom": (
        (FOUR, [4.0, 3.0, 1.0, 2.0], 0.5),
        {"tau": 4 / 6, "top_weighted_tau": 1 - 2 * (1 / 3 + 1 / 4) / PAIR_WEIGHTS},
    ),
    "tau is of what both score": (
        ([4.0, 3.0, None, 2.0, 1.0], [4.0, 3.0, 9.0, 2.0, None], 2),
        {"num_modules": 5, "num_scored": 3, "tau": 1, "top_weighted_tau": 1, "jaccard": 1 / 3},
    ),
    "no order": (
        ([3.0, 2.0, 1.0], [5.0, 5.0, 5.0], 1),
        {"tau": None, "tau_interval": None, "top_weighted_tau": None, "jaccard": 1},
    ),
    "one score": (
        ([3.0, 2.0, 1.0], [5.0, None, None], 1),
        {"tau": None, "tau_interval": None, "top_weighted_tau": None, "jaccard": 1},
    ),
}


def pair_of(first, second, budget=0.5):
    (pair,) = agreement([first, second], budget)
    return pair


def interval_of(ranking):
    pair = pair_of(ranking, ranking)
    return pair.jaccard_interval, pair.tau_interval


@given(st.integers(1, 6), st.data())
def test_chance_is_the_mean_over_all_pairs_of_selections(num_modules, data):
    sizes = [data.draw(st.integers(1, num_modules)) for _ in range(2)]
    every = [
        len({*first} & {*second}) / len({*first} | {*second})
        for first in itertools.combinations(range(num_modules), sizes[0])
        for second in itertools.combinations(range(num_modules), sizes[1])
    ]
    assert chance_jaccard(num_modules, *sizes) == pytest.approx(sum(every) / len(every))


def test_two_random_three_quarters_share_about_sixty_per_cent():
    assert chance_jaccard(224, 168, 168) == pytest.approx(0.60, abs=0.005)


@pytest.mark.parametrize("name", BY_HAND)
def test_agreement_by_hand(name):
    (first, second, budget), expected = BY_HAND[name]
    pair = pair_of(ranking_of(first), ranking_of(second), budget)
    assert {measure: getattr(pair, measure) for measure in expected} == pytest.approx(expected)


@given(
    st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * 2), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
)
def test_neither_the_order_of_the_rankings_nor_that_of_their_modules_matters(scores, draw):
    first, second = (ranking_of(list(column)) for column in zip(*scores, strict=True))
    mixed = replace(second, modules=tuple(draw.sample(second.modules, len(scores))))
    pair, swapped, mixed = (
        pair_of(*rankings) for rankings in ((first, second), (second, first), (first, mixed))
    )
    assert swapped.jaccard == pair.jaccard  # which may differ in `mixed`: ties go by model order
    itself = pair_of(first, first)
    assert itself.jaccard == 1
    for measure in ("tau", "top_weighted_tau"):
        expected = getattr(pair, measure)
        assert getattr(swapped, measure) == pytest.approx(expected)
        assert getattr(mixed, measure) == pytest.approx(expected)
        assert getattr(itself, measure) == (None if first.is_flat else pytest.approx(1))


def test_there_is_an_interval_only_where_both_carry_standard_errors():
    plain, noisy = ranking_of(FOUR), ranking_of(FOUR, errors=0.1)
    partly = ranking_of(FOUR, errors=[0.1, 0.1, 0.1, None])
    for first, second in ((plain, noisy), (noisy, plain), (noisy, partly)):
        pair = pair_of(first, second)
        assert (pair.jaccard_interval, pair.tau_interval) == (None, None)
    assert None not in interval_of(noisy)
    unscored = ranking_of([*FOUR, None], errors=[0.0, 0.0, 0.0, 0.0, None])
    assert interval_of(unscored) == ((1, 1), (1, 1))


def test_without_noise_the_interval_is_the_value():
    swapped = ranking_of([4.0, 2.0, 3.0, 1.0], errors=0.0)
    pair = pair_of(ranking_of(FOUR, errors=0.0), swapped)
    assert pair.jaccard_interval == pytest.approx((pair.jaccard, pair.jaccard))
    assert pair.tau_interval == pytest.approx((pair.tau, pair.tau))


def test_more_noise_gives_a_wider_interval_and_drowns_the_agreement():
    widths, middles = [], []
    for error in (0.5, 5.0, 1e6):
        noisy = ranking_of([float(score) for score in range(40)], errors=error)
        low, high = interval_of(noisy)[1]
        widths.append(high - low)
        middles.append((low + high) / 2)
    assert interval_of(noisy)[1] == (low, high)  # the same draws each time
    assert widths == sorted(widths)
    assert middles[0] > 0.9
    assert middles[2] == pytest.approx(0, abs=0.05)
    # tau of 40 unrelated values has the standard deviation sqrt(2 (2n + 5) / (9 n (n - 1)))
    assert widths[2] == pytest.approx(2 * 1.96 * (2 * 85 / (9 * 40 * 39)) ** 0.5, rel=0.15)


def test_modules_that_share_a_gate_share_the_noise():
    # two blocks of two modules: with the noise of the block, ties within a block stay ties
    ranking = ranking_of([2.0, 2.0, 1.0, 1.0], errors=100.0, granularity="block")
    assert interval_of(ranking) == (pytest.approx((0, 1)), pytest.approx((-1, 1)))


def options(**values):
    return {"options": values}


OF_A, OF_B = ({"sections": {"adapter": {"weights_sha256": sha256}}} for sha256 in "ab")
STAGE_1 = {"sections": {"stage_1": {"num_steps": 9, "stopped_by": "stable", "seconds": 1.0}}}
NO_RECORD = {"sections": {"model": {}, "data": {"data": "a"}}}
# what sets two runs apart, and its name
DIFFERENCES = [
    ({}, {}, "same data and seed"),
    ({}, options(seed=1), "same data, other seed"),
    ({}, options(mask_seed=4), "same data, other seed"),
    ({}, {"content": "b"}, "other data"),
    ({}, {"content": "b"} | options(seed=1), "other data"),
    ({}, {"method": "path"}, "other method"),
    ({}, {"granularity": "block"}, "other method"),
    ({}, {"method": "path", "content": "b"}, "other data and method"),
    ({}, {"weights": "w2"}, "other model"),
    ({}, {"weights": "w2", "content": "b", "method": "path"}, "other model"),
    ({}, {"weights": None, "name": "m2"}, "other model"),
    ({}, {"weights": None, "name": None}, "unknown"),
    ({}, {"content": None}, "unknown"),
    ({}, options(seed=None), "unknown"),
    ({}, NO_RECORD, "unknown"),
    (options(mask_seed=None), options(mask_seed=5), "same data, other seed"),
    (options(mask_seed=None, seed=5), options(mask_seed=5, seed=5), "same data and seed"),
    (options(max_length=64), options(max_length=128), "other update"),
    (options(mask_data="train"), options(mask_data="held-out"), "other update"),
    (options(lora_rank=8) | STAGE_1, options(lora_rank=16, seed=1) | STAGE_1, "other update"),
    (OF_A, OF_B, "other update"),
    (OF_A | options(lora_rank=8), OF_A | options(lora_rank=16), "same data and seed"),
    (OF_A, OF_A | options(mask_seed=4), "same data, other seed"),
    (OF_A, STAGE_1, "other update"),
]


@pytest.mark.parametrize(("first", "second", "kind"), DIFFERENCES)
def test_the_kind_of_a_pair_comes_from_the_records(first, second, kind):
    assert difference(run_of(**first), run_of(**second)) == kind
    assert difference(run_of(**second), run_of(**first)) == kind
    assert difference(run_of(**first), ranking_of(FOUR)) == "unknown"


def test_means_stand_by_kind_and_leave_out_what_is_not_defined():
    runs = [run_of(), run_of(**options(seed=1)), run_of(**options(seed=2)), run_of(content="b")]
    runs[2] = replace(runs[2], modules=ranking_of([0.0, 1.0, 2.0, 3.0]).modules)
    seeds, data = mean_by_kind(agreement(runs, 0.5))
    assert (seeds.kind, seeds.num_pairs) == ("same data, other seed", 3)
    assert (seeds.jaccard, seeds.tau) == pytest.approx(((1 + 0 + 0) / 3, (1 - 1 - 1) / 3))
    assert (data.kind, data.num_pairs) == ("other data", 3)
    assert data.jaccard == pytest.approx((1 + 1 + 0) / 3)
    rankings = [ranking_of([2.0, 1.0]), ranking_of([2.0, 1.0]), ranking_of([1.0, 1.0])]
    (mean,) = mean_by_kind(agreement(rankings, 1.0))
    assert (mean.kind, mean.num_pairs, mean.corrected) == ("unknown", 3, None)
    assert mean.tau == pytest.approx(1)


def test_chance_of_rankings_of_whole_blocks_is_that_of_orders_of_blocks():
    """17 of 56 modules are two blocks and three modules of a third one: exact by counting pairs."""

    def grid(score_of):
        """Eight blocks of seven projections, as of a small Llama."""
        columns = {
            kind: [float(score_of(b, k)) for b in range(8)] for k, kind in enumerate("abcdefg")
        }
        return grid_of(columns)

    def taken(order):
        whole = {(block, kind) for block in order[:2] for kind in range(7)}
        return whole | {(order[2], kind) for kind in range(3)}

    blocks, kinds = grid(lambda block, _: block), grid(lambda _, kind: kind)
    own = taken((0, 1, 2))
    others = [taken(order) for order in itertools.permutations(range(8), 3)]
    exact = sum(len(own & other) / len(own | other) for other in others) / len(others)
    pair = pair_of(blocks, grid(lambda block, _: -block), 17)
    assert pair.is_chance_of_groups
    assert pair.chance_jaccard == pytest.approx(exact, abs=0.012)  # four standard errors
    assert exact > chance_jaccard(56, 17, 17) + 0.02
    mixed = pair_of(blocks, grid(lambda block, kind: 7 * block + kind), 17)
    assert not mixed.is_chance_of_groups
    assert mixed.chance_jaccard == chance_jaccard(56, 17, 17)
    pair = pair_of(kinds, kinds, 16)
    assert pair.is_chance_of_groups
    assert pair.chance_jaccard > chance_jaccard(56, 16, 16) + 0.02


def test_compare_shows_pairs_means_and_notes(tmp_path, capsys):
    paths = list(write_rankings(tmp_path).values())
    assert keylayers("compare", *paths, "--budget", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = "\n".join(" ".join(line.split()) for line in lines)
    owners = "1, 4; 2, 4; 3, 4"
    for part in (
        "pair kind Jaccard by chance corrected tau-b top-weighted",
        "1, 2 same data, other seed 1.00 [0.33, 1.00] 0.39 1.00 1.00 [",
        "\n1, 3 other data 1.00 0.39 1.00 1.00 1.00\n",
        "\n1, 4 1.00 0.50 1.00",
        "mean of pairs Jaccard by chance corrected tau-b top-weighted",
        "same data, other seed 1 1.00",
        "other data 2 1.00",
        "unknown kind 3 1.00",
        f"{owners}: other modules, matched by projection and relative depth on 2",
        f"{owners}: left out, as only one of the two has it: b_proj, c_proj",
        "[ ] is the 95 % interval from the noise of the batches",
    ):
        assert part in text
    assert keylayers("compare", *paths[:3], "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["rankings"], content["budget"]) == (list(map(str, paths[:3])), "0.3")
    assert [(pair["first"], pair["second"], pair["kind"]) for pair in content["pairs"]] == [
        (0, 1, "same data, other seed"),
        (0, 2, "other data"),
        (1, 2, "other data"),
    ]
    assert content["pairs"][1]["tau_interval"] is None
    assert content["means"][0]["num_pairs"] == 1


def test_the_widest_table_fits(capsys):
    from rich.console import Console

    low = (-0.99, -0.88)
    kind = "other data and method"
    pair = Agreement(
        0, 1, kind, 9, 9, 0.5, (0.25, 0.75), 0.5, True, -0.5, -0.9, low, -0.9, False, ()
    )
    console = Console(width=120, highlight=False, color_system=None)
    console.print(agreement_table([pair], ["10", "11"]))
    (_, row) = capsys.readouterr().out.splitlines()
    assert "10, 11" in row
    assert "-0.90 [-0.99, -0.88]" in row


def test_the_note_names_how_many_modules_both_score(tmp_path, capsys):
    ranking_of([3.0, 2.0, 1.0, None]).save(tmp_path / "a.json")
    ranking_of([3.0, 2.0, None, 1.0]).save(tmp_path / "b.json")
    assert keylayers("compare", tmp_path / "a.json", tmp_path / "b.json", "--budget", "2") == 0
    out = capsys.readouterr().out
    assert "1, 2: tau of the 2 of 4 modules that both score" in out
    assert "[ ]" not in out


def test_fewer_than_two_rankings_are_refused_in_a_line(capsys):
    assert keylayers("compare", "ranking.json") == 2
    assert "at least two rankings, got 1" in capsys.readouterr().err
