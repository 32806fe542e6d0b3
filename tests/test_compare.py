# SPDX-License-Identifier: Apache-2.0
import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylayers.errors import RankingError
from keylayers.ranking.compare import Agreement, agreement, chance_jaccard, mean_by_kind
from keylayers.ranking.differences import difference
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.report.agreement import agreement_table

from rankings import ranking_of

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12)

# what the second run changes -> the kind of the pair
KINDS = [
    ({}, "same data and seed"),
    ({"seed": 1}, "same data, other seed"),
    ({"mask_seed": 4}, "same data, other seed"),
    ({"content": "b"}, "other data"),
    ({"content": "b", "seed": 1}, "other data"),
    ({"method": "path"}, "other method"),
    ({"granularity": "block"}, "other method"),
    ({"method": "path", "content": "b"}, "other data and method"),
    ({"weights": "w2"}, "other model"),
    ({"weights": "w2", "content": "b", "method": "path"}, "other model"),
    ({"content": None}, "unknown"),
    ({"seed": None}, "unknown"),
    ({"weights": None, "name": "m2"}, "other model"),
    ({"weights": None, "name": None}, "unknown"),
]


def run_of(**changes):
    """A ranking with a record such as `keylayers rank` writes."""
    values = {"name": "m", "weights": "w", "content": "a", "seed": 0, "mask_seed": 3} | changes
    more = {name: changes[name] for name in ("adapter", "stage_1") if name in changes}
    options = {name: values[name] for name in ("seed", "mask_seed")} | values.get("options", {})
    made_by = {
        "model": {"name": values["name"], "weights_sha256": values["weights"]},
        "data": {"data": f"{values['content']}.jsonl", "content_sha256": values["content"]},
        "options": options,
        **more,
    }
    made = ranking_of([3.0, 2.0, 1.0, 0.0], provenance=made_by)
    return replace(
        made,
        method=values.get("method", "ila"),
        granularity=values.get("granularity", "module"),
    )


def with_errors(ranking, standard_error):
    """The ranking with one standard error for every module."""
    modules = tuple(replace(module, standard_error=standard_error) for module in ranking.modules)
    return replace(ranking, modules=modules)


def deep_ranking(columns):
    """Projection -> the scores of its modules by block; None where a block lacks it."""
    num_blocks = max(len(scores) for scores in columns.values())
    modules = [
        RankedModule(f"layers.{block}.{projection}", block, projection, 10, scores[block])
        for block in range(num_blocks)
        for projection, scores in columns.items()
        if block < len(scores) and scores[block] != "absent"
    ]
    return Ranking(tuple(modules), "by hand")


def pair_of(first, second, budget=0.5):
    (pair,) = agreement([first, second], budget)
    return pair


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


@given(st.integers(1, 30), st.data())
def test_chance_lies_between_none_and_all(num_modules, data):
    size = data.draw(st.integers(1, num_modules))
    other = data.draw(st.integers(1, num_modules))
    chance = chance_jaccard(num_modules, size, other)
    assert 0 <= chance <= min(size, other) / max(size, other) + 1e-12
    assert chance == pytest.approx(chance_jaccard(num_modules, other, size))


def test_agreement_by_hand():
    first = ranking_of([4.0, 3.0, 2.0, 1.0])
    same = ranking_of([40.0, 30.0, 20.0, 10.0])
    opposite = ranking_of([1.0, 2.0, 3.0, 4.0])
    pairs = agreement([first, same, opposite], 0.5)
    assert [(pair.first, pair.second, pair.jaccard) for pair in pairs] == [
        (0, 1, 1.0),
        (0, 2, 0.0),
        (1, 2, 0.0),
    ]
    # two of four at random: overlap 0, 1, 2 with weights 1, 4, 1 of 6
    chance = (4 * (1 / 3) + 1) / 6
    assert pairs[0].chance_jaccard == pytest.approx(chance)
    assert pairs[0].corrected == 1.0
    assert pairs[1].corrected == pytest.approx(-chance / (1 - chance))
    assert [pair.tau for pair in pairs] == pytest.approx([1, -1, -1])
    assert [pair.top_weighted_tau for pair in pairs] == pytest.approx([1, -1, -1])


def test_at_all_modules_jaccard_says_nothing():
    pair = pair_of(ranking_of([1.0, 2.0]), ranking_of([2.0, 1.0]), 1.0)
    assert (pair.jaccard, pair.chance_jaccard, pair.corrected) == (1.0, 1.0, None)


def test_tau_by_hand_corrects_for_ties():
    # five pairs of six are ordered in the first ranking, all six in the second; four agree, one not
    pair = pair_of(ranking_of([3.0, 3.0, 2.0, 1.0]), ranking_of([4.0, 2.0, 3.0, 1.0]))
    assert pair.tau == pytest.approx((4 - 1) / (5 * 6) ** 0.5)


@pytest.mark.parametrize(
    ("swapped", "exchanged_weight"),
    [([3.0, 4.0, 2.0, 1.0], 1 + 1 / 2), ([4.0, 3.0, 1.0, 2.0], 1 / 3 + 1 / 4)],
    ids=["at the top", "at the bottom"],
)
def test_top_weighted_tau_by_hand(swapped, exchanged_weight):
    # a pair weighs 1 / rank + 1 / rank of its two modules; each module is in three pairs
    total = 3 * (1 + 1 / 2 + 1 / 3 + 1 / 4)
    pair = pair_of(ranking_of([4.0, 3.0, 2.0, 1.0]), ranking_of(swapped))
    assert pair.top_weighted_tau == pytest.approx(1 - 2 * exchanged_weight / total)
    assert pair.tau == pytest.approx(4 / 6)


def test_tau_is_of_the_modules_that_both_score():
    first = ranking_of([4.0, 3.0, None, 2.0, 1.0])
    second = ranking_of([4.0, 3.0, 9.0, 2.0, None])
    pair = pair_of(first, second, 2)
    assert (pair.num_modules, pair.num_scored) == (5, 3)
    assert pair.tau == pytest.approx(1)
    assert pair.top_weighted_tau == pytest.approx(1)
    assert pair.jaccard == pytest.approx(1 / 3)


@pytest.mark.parametrize("other", [[5.0, 5.0, 5.0], [5.0, None, None]])
def test_tau_is_not_defined_without_an_order(other):
    pair = pair_of(ranking_of([3.0, 2.0, 1.0]), ranking_of(other), 1)
    assert (pair.tau, pair.tau_interval, pair.top_weighted_tau) == (None, None, None)
    assert pair.jaccard == 1.0


def test_a_budget_that_reaches_modules_without_a_score_is_refused():
    with pytest.raises(RankingError, match=r"it takes 2 and only 1 have one"):
        pair_of(ranking_of([2.0, 1.0]), ranking_of([1.0, None]), 2)


@given(SCORES, st.data())
def test_every_measure_is_symmetric(scores, data):
    others = data.draw(
        st.lists(st.integers(-3, 3).map(float), min_size=len(scores), max_size=len(scores))
    )
    one = pair_of(ranking_of(scores), ranking_of(others))
    other = pair_of(ranking_of(others), ranking_of(scores))
    assert one.jaccard == other.jaccard
    assert one.tau == pytest.approx(other.tau)
    assert one.top_weighted_tau == pytest.approx(other.top_weighted_tau)


@given(SCORES)
def test_a_ranking_agrees_with_itself(scores):
    pair = pair_of(ranking_of(scores), ranking_of(scores))
    assert pair.jaccard == 1.0
    if len(set(scores)) > 1:
        assert pair.tau == pytest.approx(1)
        assert pair.top_weighted_tau == pytest.approx(1)


@given(SCORES, st.randoms(use_true_random=False))
def test_the_order_of_the_modules_in_the_file_is_no_matter(scores, draw):
    first, second = ranking_of(scores), ranking_of(scores[::-1])
    modules = list(second.modules)
    draw.shuffle(modules)
    mixed = pair_of(first, replace(second, modules=tuple(modules)))
    plain = pair_of(first, second)
    assert mixed.tau == pytest.approx(plain.tau)
    assert mixed.top_weighted_tau == pytest.approx(plain.top_weighted_tau)


def test_there_is_an_interval_only_where_both_carry_standard_errors():
    plain = ranking_of([4.0, 3.0, 2.0, 1.0])
    noisy = with_errors(plain, 0.1)
    partly = replace(noisy, modules=(*noisy.modules[:3], plain.modules[3]))
    for first, second in ((plain, noisy), (noisy, plain), (noisy, partly)):
        pair = pair_of(first, second)
        assert (pair.jaccard_interval, pair.tau_interval) == (None, None)
    pair = pair_of(noisy, noisy)
    assert pair.jaccard_interval is not None
    assert pair.tau_interval is not None


def test_an_unscored_module_needs_no_standard_error():
    noisy = with_errors(ranking_of([4.0, 3.0, 2.0, None]), 0.0)
    modules = (*noisy.modules[:3], replace(noisy.modules[3], standard_error=None))
    ranking = replace(noisy, modules=modules)
    assert pair_of(ranking, ranking, 2).tau_interval == (1.0, 1.0)


def test_without_noise_the_interval_is_the_value():
    first = with_errors(ranking_of([4.0, 3.0, 2.0, 1.0]), 0.0)
    second = with_errors(ranking_of([4.0, 2.0, 3.0, 1.0]), 0.0)
    pair = pair_of(first, second)
    assert pair.jaccard_interval == pytest.approx((pair.jaccard, pair.jaccard))
    assert pair.tau_interval == pytest.approx((pair.tau, pair.tau))


def test_more_noise_gives_a_wider_interval_and_drowns_the_agreement():
    ranking = ranking_of([float(score) for score in range(40)])
    widths, middles = [], []
    for standard_error in (0.5, 5.0, 1e6):
        noisy = with_errors(ranking, standard_error)
        low, high = pair_of(noisy, noisy).tau_interval
        widths.append(high - low)
        middles.append((low + high) / 2)
    assert widths == sorted(widths)
    assert middles[0] > 0.9
    assert middles[2] == pytest.approx(0, abs=0.05)
    # tau of 40 unrelated values has the standard deviation sqrt(2 (2n + 5) / (9 n (n - 1)))
    assert widths[2] == pytest.approx(2 * 1.96 * (2 * 85 / (9 * 40 * 39)) ** 0.5, rel=0.15)


def test_modules_that_share_a_gate_share_the_noise():
    # two blocks of two modules: with the noise of the block, ties within a block stay ties
    ranking = with_errors(ranking_of([2.0, 2.0, 1.0, 1.0], granularity="block"), 100.0)
    (pair,) = agreement([ranking, ranking], 0.5)
    assert pair.tau_interval == pytest.approx((-1, 1))
    assert pair.jaccard_interval == pytest.approx((0, 1))


def test_intervals_are_the_same_each_time():
    noisy = with_errors(ranking_of([4.0, 3.0, 2.0, 1.0, 0.0]), 2.0)
    assert pair_of(noisy, noisy) == pair_of(noisy, noisy)


@pytest.mark.parametrize(("changes", "kind"), KINDS, ids=lambda case: str(case))
def test_the_kind_of_a_pair_comes_from_the_records(changes, kind):
    assert difference(run_of(), run_of(**changes)) == kind
    assert difference(run_of(**changes), run_of()) == kind


STAGE_1 = {"stage_1": {"num_steps": 9, "stopped_by": "stable", "seconds": 1.0}}
# two runs of the same method on the same data, and what sets them apart
UPDATES = [
    ({"mask_seed": None}, {"mask_seed": 5}, "same data, other seed"),
    ({"mask_seed": None, "seed": 5}, {"mask_seed": 5, "seed": 5}, "same data and seed"),
    ({"options": {"max_length": 64}}, {"options": {"max_length": 128}}, "other update"),
    ({"options": {"mask_data": "train"}}, {"options": {"mask_data": "held-out"}}, "other update"),
    (
        {"options": {"lora_rank": 8}} | STAGE_1,
        {"options": {"lora_rank": 16}, "seed": 1} | STAGE_1,
        "other update",
    ),
    ({"adapter": {"weights_sha256": "a"}}, {"adapter": {"weights_sha256": "b"}}, "other update"),
    (
        {"adapter": {"weights_sha256": "a"}, "options": {"lora_rank": 8}},
        {"adapter": {"weights_sha256": "a"}, "options": {"lora_rank": 16}},
        "same data and seed",
    ),
    (
        {"adapter": {"weights_sha256": "a"}},
        {"adapter": {"weights_sha256": "a"}, "mask_seed": 4},
        "same data, other seed",
    ),
    ({"adapter": {"weights_sha256": "a"}}, STAGE_1, "other update"),
]


@pytest.mark.parametrize(("first", "second", "kind"), UPDATES)
def test_another_update_is_no_repetition(first, second, kind):
    assert difference(run_of(**first), run_of(**second)) == kind
    assert difference(run_of(**second), run_of(**first)) == kind


@pytest.mark.parametrize("record", [{}, {"model": {}, "data": {"data": "a"}}])
def test_the_kind_is_unknown_without_a_record(record):
    assert difference(replace(run_of(), provenance=record), run_of()) == "unknown"


def test_means_stand_by_kind():
    runs = [run_of(), run_of(seed=1), run_of(seed=2), run_of(content="b")]
    reverse = tuple(
        replace(module, score=-module.score if module.score else 0.0) for module in runs[0].modules
    )
    runs[2] = replace(runs[2], modules=reverse)
    seeds, data = mean_by_kind(agreement(runs, 0.5))
    assert (seeds.kind, seeds.num_pairs) == ("same data, other seed", 3)
    assert seeds.jaccard == pytest.approx((1 + 0 + 0) / 3)
    assert seeds.tau == pytest.approx((1 - 1 - 1) / 3)
    assert (data.kind, data.num_pairs) == ("other data", 3)
    assert data.jaccard == pytest.approx((1 + 1 + 0) / 3)


def test_the_mean_leaves_out_what_is_not_defined():
    rankings = [ranking_of([2.0, 1.0]), ranking_of([2.0, 1.0]), ranking_of([1.0, 1.0])]
    (mean,) = mean_by_kind(agreement(rankings, 1.0))
    assert (mean.kind, mean.num_pairs, mean.corrected) == ("unknown", 3, None)
    assert mean.tau == pytest.approx(1)


@pytest.fixture
def files(tmp_path):
    """Two seeds with standard errors, another data set, and a model of another shape."""
    made = {
        "seed-0": with_errors(run_of(), 0.5),
        "seed-1": with_errors(run_of(seed=1), 0.5),
        "data": run_of(content="b"),
        "deep": deep_ranking({"a_proj": [3.0, 2.0, 1.0], "c_proj": [1.0, 2.0, None]}),
    }
    paths = {name: tmp_path / f"{name}.json" for name in made}
    for name, ranking in made.items():
        ranking.save(paths[name])
    return paths


def compare(*arguments):
    from keylayers.cli import main

    return main(["compare", *map(str, arguments)])


def test_compare_prints_pairs_means_and_notes(files, capsys):
    names = ("seed-0", "seed-1", "data", "deep")
    assert compare(*(files[name] for name in names), "--budget", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "pair kind Jaccard by chance corrected tau-b top-weighted" in text
    assert "1, 2 same data, other seed 1.00 [0.33, 1.00] 0.39 1.00 1.00 [" in text
    assert "\n1, 3 other data 1.00 0.39 1.00 1.00 1.00\n" in text
    assert "\n1, 4 1.00 0.50 1.00" in text
    assert "mean of pairs Jaccard by chance corrected tau-b top-weighted" in text
    assert "same data, other seed 1 1.00" in text
    assert "other data 2 1.00" in text
    assert "unknown kind 3 1.00" in text
    owners = "1, 4; 2, 4; 3, 4"
    assert f"{owners}: other modules, matched by projection and relative depth on 2" in text
    assert f"{owners}: left out, as only one of the two has it: b_proj, c_proj" in text
    assert "[ ] is the 95 % interval from the noise of the batches" in text


def test_the_widest_table_fits(capsys, tmp_path):
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


def grid(score_of):
    """Eight blocks of seven projections, as of a small Llama."""
    modules = tuple(
        RankedModule(f"model.layers.{block}.{kind}_proj", block, f"{kind}_proj", 10, score)
        for block in range(8)
        for kind in "abcdefg"
        for score in [score_of(block, "abcdefg".index(kind))]
    )
    return Ranking(modules, "by hand")


def test_chance_of_rankings_of_whole_blocks_is_that_of_orders_of_blocks():
    """17 of 56 modules are two blocks and three modules of a third one: exact by counting pairs."""
    from itertools import permutations

    blocks = grid(lambda block, _: float(block))
    (pair,) = agreement([blocks, grid(lambda block, _: float(-block))], 17)

    def taken(order):
        return {(block, kind) for block in order[:2] for kind in range(7)} | {
            (order[2], kind) for kind in range(3)
        }

    own = taken((0, 1, 2))
    others = [taken(order) for order in permutations(range(8), 3)]
    exact = sum(len(own & one) / len(own | one) for one in others) / len(others)
    assert pair.is_chance_of_groups
    assert pair.chance_jaccard == pytest.approx(exact, abs=0.012)  # four standard errors
    assert exact > chance_jaccard(56, 17, 17) + 0.02
    (mixed,) = agreement([blocks, grid(lambda block, kind: float(7 * block + kind))], 17)
    assert not mixed.is_chance_of_groups
    assert mixed.chance_jaccard == chance_jaccard(56, 17, 17)
    kinds = grid(lambda _, kind: float(kind))
    (pair,) = agreement([kinds, kinds], 16)
    assert pair.is_chance_of_groups
    assert pair.chance_jaccard > chance_jaccard(56, 16, 16) + 0.02


def test_a_consensus_takes_the_place_of_nothing_but_a_ranking(tmp_path, capsys):
    from keylayers.cli import main

    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        ranking_of([3.0, 2.0, 1.0]).save(path)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert main(["compare", *map(str, paths), "--consensus", str(notes)]) == 2
    assert "must be a new file or an earlier ranking" in capsys.readouterr().err
    assert notes.read_text() == "mine"
    for _ in range(2):
        assert main(["compare", *map(str, paths), "--consensus", str(tmp_path / "c.json")]) == 0


def test_the_note_names_how_many_modules_both_score(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    ranking_of([3.0, 2.0, 1.0, None]).save(paths[0])
    ranking_of([3.0, 2.0, None, 1.0]).save(paths[1])
    assert compare(*paths, "--budget", "2") == 0
    out = capsys.readouterr().out
    assert "1, 2: tau of the 2 of 4 modules that both score" in out
    assert "[ ]" not in out


def test_compare_writes_json(files, capsys):
    assert compare(files["seed-0"], files["seed-1"], files["data"], "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["rankings"] == [str(files[name]) for name in ("seed-0", "seed-1", "data")]
    assert content["budget"] == "0.3"
    assert [pair["kind"] for pair in content["pairs"]] == [
        "same data, other seed",
        "other data",
        "other data",
    ]
    assert content["pairs"][1]["tau_interval"] is None
    assert content["means"][0]["num_pairs"] == 1


def test_fewer_than_two_rankings_are_refused_in_a_line(files, capsys):
    assert compare(files["seed-0"]) == 2
    assert "at least two rankings, got 1" in capsys.readouterr().err
