# SPDX-License-Identifier: Apache-2.0
"""Agreement of rankings, their consensus, and what `keylayers compare` shows and writes."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import complaint, everything_below, keylayers
from keylayers.errors import RankingError
from keylayers.files import json_sha256
from keylayers.ranking.compare import agreement, chance_jaccard, mean_by_kind
from keylayers.ranking.consensus import consensus
from keylayers.ranking.differences import difference
from keylayers.ranking.ranking import Ranking

from rankings import grid_of, ranking_of, run_of

FOUR = [4.0, 3.0, 2.0, 1.0]
CHANCE = (4 * (1 / 3) + 1) / 6  # two of four: overlap 0, 1, 2 with weights 1, 4, 1 of 6
SAME = {"jaccard": 1, "chance_jaccard": CHANCE, "corrected": 1, "tau": 1, "top_weighted_tau": 1}
OPPOSITE = {"jaccard": 0, "corrected": -CHANCE / (1 - CHANCE), "tau": -1, "top_weighted_tau": -1}
ALL = {"jaccard": 1, "chance_jaccard": 1, "corrected": None}
UNDEFINED = {"tau": None, "tau_interval": None, "top_weighted_tau": None, "jaccard": 1}
COMMON = {"num_modules": 5, "num_scored": 3, "tau": 1, "top_weighted_tau": 1, "jaccard": 1 / 3}


def exchanged(first, second):
    """The taus after modules of these ranks changed places; each module is in three pairs."""
    total = 3 * (1 + 1 / 2 + 1 / 3 + 1 / 4)
    return {"tau": 4 / 6, "top_weighted_tau": 1 - 2 * (1 / first + 1 / second) / total}


# scores of two rankings and a budget, what is measured
BY_HAND = {
    "the same order": (FOUR, [40.0, 30.0, 20.0, 10.0], 0.5, SAME),
    "the opposite order": (FOUR, FOUR[::-1], 0.5, OPPOSITE),
    "of all modules Jaccard says nothing": ([1.0, 2.0], [2.0, 1.0], 1.0, ALL),
    # five pairs of six are ordered in the first ranking, all in the second; four agree, one not
    "a tie": ([3.0, 3.0, 2.0, 1.0], [4.0, 2.0, 3.0, 1.0], 0.5, {"tau": (4 - 1) / (5 * 6) ** 0.5}),
    "an exchange at the top": (FOUR, [3.0, 4.0, 2.0, 1.0], 0.5, exchanged(1, 2)),
    "an exchange at the bottom": (FOUR, [4.0, 3.0, 1.0, 2.0], 0.5, exchanged(3, 4)),
    "what both score": ([4.0, 3.0, None, 2.0, 1.0], [4.0, 3.0, 9.0, 2.0, None], 2, COMMON),
    "no order": ([3.0, 2.0, 1.0], [5.0, 5.0, 5.0], 1, UNDEFINED),
    "one score": ([3.0, 2.0, 1.0], [5.0, None, None], 1, UNDEFINED),
}


def pair_of(first, second, budget=0.5):
    (pair,) = agreement([first, second], budget)
    return pair


@given(st.integers(1, 6), st.data())
def test_chance_is_the_mean_over_all_pairs_of_selections(num_modules, data):
    sizes = [data.draw(st.integers(1, num_modules)) for _ in range(2)]
    subsets = ([*map(set, itertools.combinations(range(num_modules), size))] for size in sizes)
    every = [len(one & other) / len(one | other) for one, other in itertools.product(*subsets)]
    assert chance_jaccard(num_modules, *sizes) == pytest.approx(sum(every) / len(every))


@pytest.mark.parametrize("name", BY_HAND)
def test_agreement_by_hand(name):
    first, second, budget, expected = BY_HAND[name]
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
        expected = pytest.approx(getattr(pair, measure))
        assert [getattr(one, measure) for one in (swapped, mixed)] == [expected] * 2
        assert getattr(itself, measure) == (None if first.is_flat else pytest.approx(1))


PLAIN, NOISY, EXACT = (ranking_of(FOUR, errors=error) for error in (None, 0.1, 0.0))
PARTLY = ranking_of(FOUR, errors=[0.1, 0.1, 0.1, None])
SWAPPED = ranking_of([4.0, 2.0, 3.0, 1.0], errors=0.0)
UNSCORED = ranking_of([*FOUR, None], errors=[0.0, 0.0, 0.0, 0.0, None])
BLOCKS = ranking_of([2.0, 2.0, 1.0, 1.0], errors=100.0, granularity="block")
# two rankings, the intervals of Jaccard and of tau-b
INTERVALS = [
    (PLAIN, NOISY, None, None),
    (NOISY, PLAIN, None, None),
    (NOISY, PARTLY, None, None),
    (EXACT, SWAPPED, (1 / 3, 1 / 3), (4 / 6, 4 / 6)),  # the values themselves
    (UNSCORED, UNSCORED, (1, 1), (1, 1)),
    (BLOCKS, BLOCKS, (0, 1), (-1, 1)),  # two modules share the noise of a block, and stay tied
]


@pytest.mark.parametrize(("first", "second", "jaccard", "tau"), INTERVALS)
def test_there_is_an_interval_only_where_both_carry_standard_errors(first, second, jaccard, tau):
    pair = pair_of(first, second)
    assert pair.jaccard_interval == pytest.approx(jaccard)
    assert pair.tau_interval == pytest.approx(tau)


def test_more_noise_gives_a_wider_interval_and_drowns_the_agreement():
    widths, middles = [], []
    for error in (0.5, 5.0, 1e6):
        noisy = ranking_of([float(score) for score in range(40)], errors=error)
        low, high = pair_of(noisy, noisy).tau_interval
        widths.append(high - low)
        middles.append((low + high) / 2)
    assert pair_of(noisy, noisy).tau_interval == (low, high)  # the same draws each time
    assert widths == sorted(widths)
    assert middles[0] > 0.9
    assert middles[2] == pytest.approx(0, abs=0.05)
    # tau of 40 unrelated values has the standard deviation sqrt(2 (2n + 5) / (9 n (n - 1)))
    assert widths[2] == pytest.approx(2 * 1.96 * (2 * 85 / (9 * 40 * 39)) ** 0.5, rel=0.15)


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
    reverse = run_of([0.0, 1.0, 2.0, 3.0], **options(seed=2))
    runs = [run_of(), run_of(**options(seed=1)), reverse, run_of(content="b")]
    seeds, data = mean_by_kind(agreement(runs, 0.5))
    assert (seeds.kind, seeds.num_pairs) == ("same data, other seed", 3)
    assert (seeds.jaccard, seeds.tau) == pytest.approx(((1 + 0 + 0) / 3, (1 - 1 - 1) / 3))
    assert (data.kind, data.num_pairs) == ("other data", 3)
    assert data.jaccard == pytest.approx((1 + 1 + 0) / 3)
    rankings = [ranking_of([2.0, 1.0]), ranking_of([2.0, 1.0]), ranking_of([1.0, 1.0])]
    (mean,) = mean_by_kind(agreement(rankings, 1.0))
    assert (mean.kind, mean.num_pairs, mean.corrected) == ("unknown", 3, None)
    assert mean.tau == pytest.approx(1)


def grid(score_of):
    """Eight blocks of seven projections, as of a small Llama."""
    kinds = enumerate("abcdefg")
    return grid_of({name: [float(score_of(b, kind)) for b in range(8)] for kind, name in kinds})


def test_chance_of_rankings_of_whole_blocks_is_that_of_orders_of_blocks():
    """17 of 56 modules are two blocks and three modules of a third one: exact by counting pairs."""

    def taken(order):
        whole = {(block, kind) for block in order[:2] for kind in range(7)}
        return whole | {(order[2], kind) for kind in range(3)}

    own = taken((0, 1, 2))
    others = [taken(order) for order in itertools.permutations(range(8), 3)]
    exact = sum(len(own & other) / len(own | other) for other in others) / len(others)
    assert exact > chance_jaccard(56, 17, 17) + 0.02
    blocks, kinds = grid(lambda block, _: block), grid(lambda _, kind: kind)
    reverse, mixed = grid(lambda block, _: -block), grid(lambda block, kind: 7 * block + kind)
    pairs = [pair_of(blocks, reverse, 17), pair_of(blocks, mixed, 17), pair_of(kinds, kinds, 16)]
    assert [pair.is_chance_of_groups for pair in pairs] == [True, False, True]
    assert pairs[0].chance_jaccard == pytest.approx(exact, abs=0.012)  # four standard errors
    assert pairs[1].chance_jaccard == chance_jaccard(56, 17, 17)
    assert pairs[2].chance_jaccard > chance_jaccard(56, 16, 16) + 0.02


def test_consensus_by_hand():
    first, second = ranking_of([9.0, 5.0, 5.0, 1.0]), ranking_of([3.0, 4.0, 2.0, 1.0])
    merged = consensus([first, second])
    # relative ranks: 1, 2.5, 2.5, 4 and 2, 1, 3, 4, each of 4
    means = [1.5 / 4, 1.75 / 4, 2.75 / 4, 4 / 4]
    assert [module.score for module in merged.modules] == pytest.approx([1 - m for m in means])
    # the standard error of two values is half their distance
    errors = [0.5 / 4, 0.75 / 4, 0.25 / 4, 0]
    assert [module.standard_error for module in merged.modules] == pytest.approx(errors)
    assert [module.name for module in merged.ordered()] == [m.name for m in first.modules]
    assert consensus([first]).ranks() == first.ranks()  # with its tie


def test_consensus_lists_its_sources_and_takes_each_module_from_those_that_score_it():
    runs = [
        run_of([2.0, None, None, 1.0]),
        run_of([None, 2.0, None, 1.0], **options(seed=1), granularity="block"),
    ]
    merged = consensus(runs)
    assert [module.score for module in merged.modules] == [0.5, 0.5, None, 0.0]
    assert [module.standard_error for module in merged.modules] == [None, None, None, 0.0]
    own = {"method": "ila", "model": "m", "data": "a.jsonl"}
    hashes = [json_sha256(run.to_json()) for run in runs]
    assert merged.provenance["sources"] == [own | {"json_sha256": sha256} for sha256 in hashes]
    assert (merged.method, merged.granularity) == ("consensus", "module")
    assert consensus(runs[1:]).granularity == "block"


def test_no_rankings_have_no_consensus():
    with pytest.raises(RankingError, match=r"at least one ranking, got none"):
        consensus([])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with rankings of several kinds."""
    monkeypatch.chdir(tmp_path)
    for name, ranking in {
        "seed-0": run_of(errors=0.5),
        "seed-1": run_of(errors=0.5, options={"seed": 1}),
        "data": run_of(content="b"),
        "some": ranking_of([3.0, 2.0, None, None]),
        "odd": run_of([0.0, 1.0, 2.0, 3.0], content="c", method="path", errors=0.5),
        "deep": grid_of({"a_proj": [3.0, 2.0, 1.0], "c_proj": [1.0, 2.0, None]}),
    }.items():
        ranking.save(tmp_path / f"{name}.json")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


FILES = ("seed-0.json", "seed-1.json", "data.json")


OWNERS = "1, 4; 2, 4; 3, 4: "
SHOWN = {
    "seed-0.json seed-1.json data.json deep.json --budget 0.5": (
        "pair kind Jaccard by chance corrected tau-b top-weighted",
        "1, 2 same data, other seed 1.00 [0.33, 1.00] 0.39 1.00 1.00 [",
        "\n1, 3 other data 1.00 0.39 1.00 1.00 1.00\n",
        "\n1, 4 1.00 0.50 1.00",
        "mean of pairs Jaccard by chance corrected tau-b top-weighted",
        "same data, other seed 1 1.00",
        "other data 2 1.00",
        "unknown kind 3 1.00",
        OWNERS + "other modules, matched by projection and relative depth on 2",
        OWNERS + "left out, as only one of the two has it: b_proj, c_proj",
        "[ ] is the 95 % interval from the noise of the batches",
    ),
    "seed-0.json odd.json some.json --budget 2": (
        "1, 2 other data and method 0.00 [0.00, 0.33] 0.39 -0.64 -1.00 [-1.00, -0.",
        "1, 3; 2, 3: tau of the 2 of 4 modules that both score",
    ),
}


@pytest.mark.parametrize("words", SHOWN)
def test_compare_shows_pairs_means_and_notes(folder, capsys, words):
    assert keylayers("compare", *words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert [part for part in SHOWN[words] if part not in text] == []


def test_compare_writes_pairs_and_means_as_json_and_the_consensus(folder, capsys):
    for _ in range(2):  # an earlier ranking is replaced
        assert keylayers("compare", FILES[0], FILES[2], "--consensus", "consensus.json") == 0
        assert "consensus of 2 rankings: consensus.json" in capsys.readouterr().out
    assert Ranking.load("consensus.json").ranks() == Ranking.load("data.json").ranks()
    assert keylayers("compare", *FILES, "--json", "--consensus", "consensus.json") == 0
    told = capsys.readouterr()
    assert "consensus of 3 rankings" in told.err
    content = json.loads(told.out)
    assert (content["rankings"], content["budget"]) == (list(FILES), "0.3")
    pairs = [(pair["first"], pair["second"], pair["kind"]) for pair in content["pairs"]]
    seeds, data = "same data, other seed", "other data"
    assert pairs == [(0, 1, seeds), (0, 2, data), (1, 2, data)]
    assert content["pairs"][1]["tau_interval"] is None
    means = [(mean["kind"], mean["num_pairs"]) for mean in content["means"]]
    assert means == [(seeds, 1), (data, 2)]


MISTAKES = [
    ("seed-0.json", "at least two rankings, got 1"),
    ("seed-0.json data.json --consensus data.json", "must be a new file, but"),
    ("seed-0.json data.json --consensus notes.txt", "must be a new file or an earlier ranking"),
    ("seed-0.json deep.json --consensus new.json", "to be compared, but ranking 2 and the first"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_told_and_nothing_is_written(folder, capsys, words, message):
    before = everything_below(folder)
    assert keylayers("compare", *words.split()) == 2
    assert message in complaint(capsys)
    assert everything_below(folder) == before
