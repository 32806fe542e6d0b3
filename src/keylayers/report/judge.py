# SPDX-License-Identifier: Apache-2.0
"""What a judge said of some models, and what asking it costs, in the terminal. Needs no torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keylayers.evaluation.judge.results import CATEGORY, WHOLE

MODELS_ACROSS = 5


def plan_table(plan: Mapping[str, Any]) -> Table:
    """What a run would do and cost at most.

    Args:
        plan: `JudgePlan` as a mapping, with `categories`, `num_questions` and `num_with_reference`.
    """
    cost = plan["estimate"]
    table = Table(box=None, padding=(0, 2), pad_edge=False, show_header=False)
    table.add_row("models", Text(", ".join(plan["labels"])))
    categories = ", ".join(f"{name} {count}" for name, count in plan["categories"].items())
    table.add_row("questions", Text(f"{plan['num_questions']:,}: {categories}"))
    table.add_row("with reference", f"{plan['num_with_reference']:,}")
    to_give = plan["num_turns"] - plan["num_turns_kept"]
    table.add_row("answers", f"{to_give:,} turns to give, {plan['num_turns_kept']:,} are there")
    table.add_row(
        "requests", f"{_to_ask(cost):,} to the judge, {cost['num_kept']:,} replies are there"
    )
    missing = ", with answers to come at their longest" if cost["num_missing_answers"] else ""
    table.add_row("prompt tokens", f"about {cost['prompt_tokens']:,}{missing}")
    table.add_row("reply tokens", f"{cost['completion_tokens']:,} at most")
    price = "not known without prices" if cost["price"] is None else f"{cost['price']:,.2f} at most"
    table.add_row("price", price)
    return table


def estimate_line(cost: Mapping[str, Any]) -> str:
    """The same in one line.

    Args:
        cost: `Estimate` as a mapping.
    """
    if not _to_ask(cost):
        return f"all {cost['num_kept']:,} replies of the judge are there already"
    price = "" if cost["price"] is None else f"; a price of {cost['price']:,.2f} at most"
    return (
        f"{_to_ask(cost):,} requests to the judge, {cost['num_kept']:,} replies are there; about "
        f"{cost['prompt_tokens']:,} prompt tokens and at most {cost['completion_tokens']:,} in "
        f"replies{price}"
    )


def judgement_report(record: Mapping[str, Any]) -> RenderableType:
    """All that a terminal shows of a run.

    Args:
        record: What judgement.json holds.
    """
    results = record["results"]
    parts: list[RenderableType] = []
    if record["mode"] == "single":
        parts += [
            _titled("Mean rating, 1 to 10 [95 % interval over questions]", rating_table(results)),
            *(
                _titled("Mean rating by category", category_table(results, labels))
                for labels in _side_by_side(results["models"])
            ),
        ]
        if results["differences"]:
            title = f"Difference to {results['beside']}, on the questions that both have"
            parts.append(_titled(title, difference_table(results)))
    else:
        title = (
            f"Beside {results['beside']}: wins and losses are those in both orders; a tie is half "
            f"a win in the share won"
        )
        parts += [
            _titled(title, outcome_table(results)),
            *(
                _titled(
                    "Wins, ties and losses by category", category_outcome_table(results, labels)
                )
                for labels in _side_by_side(results["pairs"])
            ),
            _titled("Do the two orders agree?", order_table(results)),
        ]
    spaced = [one for part in parts for one in (part, Text())]
    return Group(*spaced, Text("\n".join(notes(record))))


def rating_table(results: Mapping[str, Any]) -> Table:
    """The mean rating of each model, over all turns and by turn."""
    parts = [name for name in _parts(results) if not name.startswith(CATEGORY)]
    table = _table()
    table.add_column("model")
    for title in ("questions", *parts, "not read"):
        table.add_column(title, justify="right", no_wrap=True)
    for label, model in results["models"].items():
        unread = model["num_unread"] + model["num_without_reply"]
        table.add_row(
            Text(label),
            str(model["ratings"][WHOLE]["num_questions"]),
            *(_mean(model["ratings"][part]) for part in parts),
            f"{unread:,} of {model['num_requests']:,}",
        )
    return table


def category_table(results: Mapping[str, Any], labels: Sequence[str]) -> Table:
    """Categories down, models across."""
    table = _table()
    table.add_column("category")
    for label in labels:
        table.add_column(Text(label), justify="right", no_wrap=True)
    for part in _parts(results):
        if part.startswith(CATEGORY):
            ratings = [results["models"][label]["ratings"][part] for label in labels]
            name = part.removeprefix(CATEGORY)
            table.add_row(Text(name), *(_mean(one) for one in ratings))
    return table


def difference_table(results: Mapping[str, Any]) -> Table:
    """Each model beside the first one, on the same questions."""
    table = _table()
    for title in ("model", "turns"):
        table.add_column(title, no_wrap=title == "turns")
    for title in ("questions", "difference", "95 % interval"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for label, differences in results["differences"].items():
        shown = label
        for part, one in differences.items():
            if part.startswith(CATEGORY):
                continue
            table.add_row(
                Text(shown),
                part.removeprefix("turn "),
                str(one["num_questions"]),
                "" if one["mean"] is None else f"{one['mean']:+.2f}",
                _interval(one, "{:+.2f}"),
                reading(one),
            )
            shown = ""
    return table


def outcome_table(results: Mapping[str, Any]) -> Table:
    """Wins, ties and losses of each model against the first one."""
    table = _table()
    for title in ("model", "turns"):
        table.add_column(title, no_wrap=title == "turns")
    for title in ("wins", "ties", "losses", "questions", "share won"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("95 % interval", ""):
        table.add_column(title, no_wrap=True)
    for label, pair in results["pairs"].items():
        shown = label
        for part, one in pair["outcomes"].items():
            if part.startswith(CATEGORY):
                continue
            share = _as_share(one["gain"])
            table.add_row(
                Text(shown),
                part.removeprefix("turn "),
                *(str(one[name]) for name in ("wins", "ties", "losses")),
                str(share["num_questions"]),
                "" if share["mean"] is None else f"{share['mean']:.1f} %",
                _interval(share, "{:.1f}"),
                reading(one["gain"]),
            )
            shown = ""
    return table


def category_outcome_table(results: Mapping[str, Any], labels: Sequence[str]) -> Table:
    """Categories down, models across; wins, ties and losses in each cell."""
    table = _table()
    table.add_column("category")
    pairs = [results["pairs"][label] for label in labels]
    for label in labels:
        table.add_column(Text(label), justify="right", no_wrap=True)
    for part in pairs[0]["outcomes"]:
        if part.startswith(CATEGORY):
            cells = [pair["outcomes"][part] for pair in pairs]
            table.add_row(
                Text(part.removeprefix(CATEGORY)),
                *(f"{one['wins']}  {one['ties']}  {one['losses']}" for one in cells),
            )
    return table


def order_table(results: Mapping[str, Any]) -> Table:
    """How often the two orders disagree, and whether the judge then likes what it sees first."""
    table = _table()
    table.add_column("model")
    titles = ("compared", "disagree", "first shown won both", "second shown won both")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for label, pair in results["pairs"].items():
        num_read = pair["num_comparisons"] - pair["num_unread"] - pair["num_without_reply"]
        share = f" ({100 * pair['num_disagreeing'] / num_read:.0f} %)" if num_read else ""
        table.add_row(
            Text(label),
            f"{num_read:,} of {pair['num_comparisons']:,}",
            f"{pair['num_disagreeing']:,}{share}",
            f"{pair['num_first_shown_twice']:,}",
            f"{pair['num_second_shown_twice']:,}",
        )
    return table


def reading(difference: Mapping[str, Any]) -> str:
    """What a difference says, in words."""
    if difference["low"] is None:
        return "too few questions"
    if not difference["is_shown"]:
        return "no difference shown"
    return "better" if difference["mean"] > 0 else "worse"


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the tables, in sentences."""
    judge = record["judge"]
    counted = f"{judge['prompt_tokens']:,} + {judge['completion_tokens']:,} tokens"
    if judge["num_without_token_counts"]:
        counted += f" (not told of {judge['num_without_token_counts']:,} replies)"
    price = "" if judge["price"] is None else f", a price of {judge['price']:,.2f}"
    return [
        f"judged by {judge['model']} at {judge['url']}: {judge['num_replies']:,} replies, "
        f"{judge['num_new_replies']:,} of them new; {counted}{price}",
        *_of_unread(record),
        *_of_answers(record),
    ]


def _of_unread(record: Mapping[str, Any]) -> list[str]:
    judge, what = record["judge"], "rating" if record["mode"] == "single" else "verdict"
    lines = []
    if judge["num_unread"]:
        lines.append(
            f"{judge['num_unread']:,} of {judge['num_replies']:,} replies hold no {what} that can "
            f"be read, and are in no mean; one begins {judge['examples_unread'][0][:70]!r}"
        )
    if judge["num_cut"]:
        limit = record["options"]["judge_max_tokens"]
        lines.append(
            f"{judge['num_cut']:,} replies were cut at {limit:,} tokens (--judge-max-tokens), and "
            f"none of those is read"
        )
    missing = judge["num_requests"] - judge["num_replies"]
    if missing:
        lines.append(
            f"{missing:,} of {judge['num_requests']:,} requests got no reply: {judge['refused'][0]}"
        )
    if judge["num_unread"] == judge["num_replies"]:
        lines.append("nothing can be said of these models: no reply of the judge could be read")
    return lines


def _of_answers(record: Mapping[str, Any]) -> list[str]:
    limit, lines = record["options"]["max_new_tokens"], []
    for model in record["models"]:
        if model["num_answers_cut"]:
            lines.append(
                f"{model['label']}: {model['num_answers_cut']:,} of {model['num_answers']:,} "
                f"answers were cut, at {limit:,} tokens (--max-new-tokens) or at the longest "
                f"sequence that the model takes"
            )
        if model["num_answers_without_room"]:
            lines.append(
                f"{model['label']}: {model['num_answers_without_room']:,} of "
                f"{model['num_answers']:,} answers are empty, for the conversation leaves the "
                f"model no room"
            )
    return lines


def _side_by_side(models: Collection[str]) -> list[list[str]]:
    """The models in groups that a line has room for."""
    labels = list(models)
    return [labels[i : i + MODELS_ACROSS] for i in range(0, len(labels), MODELS_ACROSS)]


def _to_ask(cost: Mapping[str, Any]) -> int:
    return int(cost["num_requests"] - cost["num_kept"])


def _parts(results: Mapping[str, Any]) -> Sequence[str]:
    return list(next(iter(results["models"].values()))["ratings"])


def _as_share(gain: Mapping[str, Any]) -> dict[str, Any]:
    """A mean gain from -1 to 1 as a share of comparisons won, in percent, ties as half of one."""
    known = {
        name: None if gain[name] is None else 50 * (1 + gain[name])
        for name in ("mean", "low", "high")
    }
    return {**known, "num_questions": gain["num_questions"]}


def _mean(found: Mapping[str, Any]) -> Text:
    """As Text, for rich reads brackets in a string as markup."""
    if found["mean"] is None:
        return Text("-")
    if found["low"] is None:
        return Text(f"{found['mean']:.2f}")
    return Text(f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")


def _interval(found: Mapping[str, Any], form: str) -> str:
    if found["low"] is None:
        return ""
    return f"{form.format(found['low'])} to {form.format(found['high'])}"


def _titled(title: str, table: Table) -> RenderableType:
    return Group(Text(title, style="bold"), table)


def _table() -> Table:
    return Table(box=None, padding=(0, 1), pad_edge=False)
