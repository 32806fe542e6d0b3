# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102, D103
"""What is recorded: commands, by the name of the case."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import tiny
from running import SHARED, Runner, forked, numbers

Options = tuple[object, ...]
QUICK: Options = ("--lora-rank", 4, "--warmup-steps", 2, "--learning-rate", 0.005)
GATED = ("elimination", "path", "price", "ila", "leave-one-out", "shapley")
OTHERS = "update-norm gradient-norm fisher aletheia adalora lora-drop eva plop spectrum kappatune"
METHODS = (*GATED, *OTHERS.split(), "block-influence", "cka", "first", "last", "middle", "random")
METHOD_OPTIONS: dict[str, Options] = {
    "leave-one-out": ("--mask-batches", 2),
    "shapley": ("--mask-batches", 2, "--permutations", 2),
    "adalora": ("--mask-steps", 20),
    "ila": ("--mask-steps", 30),
    "price": ("--mask-steps", 30),
}
VARIED: dict[str, Options] = {
    "ila-defaults": ("--method", "ila"),
    "price-defaults": ("--method", "price"),
    "elimination-options": ("--mask-batches", 2, "--keep-fraction", 0.5, "--mask-seed", 3),
    "path-options": ("--method", "path", "--path-points", 2, "--mask-batches", 3),
    "price-options": ("--method", "price", "--price", 0.5, "--mask-steps", 20),
    "price-adam": ("--method", "price", "--mask-optimizer", "adam", "--mask-learning-rate", 0.1),
    "ila-adam": ("--method", "ila", "--mask-optimizer", "adam", "--initial-score", 0),
    "ila-options": ("--method", "ila", "--mask-steps", 20, "--mask-learning-rate", 3),
    "elimination-until-stable": ("--until-stable", 0.3, "--mask-batches", 1),
    "path-until-stable": ("--method", "path", "--until-stable", 0.3, "--mask-batches", 1),
    "ila-until-stable": ("--method", "ila", "--until-stable", 0.3),
    "price-until-stable": ("--method", "price", "--until-stable", 0.25),
    "random-seed": ("--method", "random", "--mask-seed", 5),
    "fisher-batches": ("--method", "fisher", "--mask-batches", 2, "--batch-size", 4),
}
STAGE_1: dict[str, Options] = {
    "until-loss-stable": ("--window", 2, "--epsilon", 9),
    "bfloat16": ("--dtype", "bfloat16"),
    "seeds": ("--seed", 4, "--split-seed", 2, "--gradient-accumulation", 2),
    "checkpointing": ("--gradient-checkpointing",),
}
TRAINED: dict[str, Options] = {
    "controls": ("--budget", 0.3, "--controls", "all", "random", "first", "last", "worst"),
    "freeze": ("--freeze", 0.25),
    "full": ("--budget", 0.3, "--update", "full", "--controls", "all"),
    "rslora": ("--budget", 0.3, "--update", "rslora", "--lora-rank", 8),
    "dora": ("--budget", 0.3, "--update", "dora"),
    "adalora": ("--budget", 0.3, "--update", "adalora"),
    "accumulation": ("--budget", 0.3, "--gradient-accumulation", 2, "--gradient-checkpointing"),
}
RANKED_FIRST: dict[str, Options] = {
    "freeze": ("--freeze", 0.25),
    "remove": ("--freeze", 0.4, "--action", "remove"),
    "full": ("--update", "full"),
    "ila": ("--method", "ila", "--mask-steps", 10),
}
TOOLS = ("peft", "trl", "axolotl", "llamafactory", "ms-swift", "torchtune", "unsloth")
EXPORTED: dict[str, Options] = {
    "budget": ("--budget", 0.3),
    "freeze": ("--freeze", 0.25),
    "all": ("--budget", "1.0"),
}
BUDGETS: tuple[float | str, ...] = (0.1, 0.3, 0.75, 1.0, 1, 5, 11, "0.3", "1", "7", "1.0")
REFUSED_BUDGETS = ("0", "2.0", "x", "-1", "0x-params", "2x-time", "999", "1GiB")
REFUSED: tuple[Options, ...] = (
    ("--method", "nothing"),
    ("--granularity", "block", "--method", "fisher"),
    ("--mask-steps", 5),
    ("--keep-fraction", 1.5),
    ("--until-stable", 2),
    ("--data", "no-such-file.jsonl"),
    ("--model", "no-such-folder"),
    ("--held-out", 1000),
    ("--lora-rank", 0),
    ("--objective", "dpo"),
    ("--objective", "kto", "--method", "spectrum"),
    ("--update", "full", "--load-in-4bit"),
    ("--update", "full", "--method", "adalora"),
    ("--adapter", "a", "--tuned", "b"),
    ("--beta", 0.1),
    ("--mask-data", "train", "--method", "first"),
    ("--learning-rate", -1),
    ("--no-such-option", 1),
)


class Cases:
    """Commands whose results are recorded, and the folders that they share."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.work = runner.work

    def tiny_files(self) -> Path:
        folder = self.work / "tiny"
        if not (folder / "table.csv").exists():
            forked(lambda: tiny.write(folder), self.work / "logs" / "tiny")
        return folder

    def demo(self) -> Path:
        return self.runner.folder("demo", "demo", "--files-only")

    def source(self, model: str) -> Options:
        """Model, data and training options by the name of the model."""
        if model == "demo":
            data: Options = ("--data", self.demo() / "list.jsonl", "--max-examples", 120)
            return ("--model", self.demo() / "model", *data, *QUICK, "--max-steps", 20)
        if model == "english":
            data = ("--data", SHARED / "data/sft/alpaca_gpt4_999.json", "--max-examples", 40)
            size: Options = ("--max-length", 64, "--batch-size", 4, "--max-steps", 10)
            return ("--model", SHARED / "models/english-2m", *data, *size, *QUICK)
        data = ("--data", self.tiny_files() / "prompt-completion.jsonl", "--batch-size", 4)
        size = ("--max-steps", 8, "--held-out", 4)
        return ("--model", self.tiny_files() / model, *data, *QUICK, *size)

    def update(self, kind: str) -> Options:
        if kind == "two":
            return ("--tuned", self.ranking("full") / "tuned")
        return ("--load-in-4bit",) if kind == "4bit" else ("--update", kind)

    def ranking(self, name: str) -> Path:
        """A ranking by the default method with its update beside it."""
        if name in ("demo", "english", "model", "mixture"):
            given = self.source(name)
        elif name == "dpo":
            data = ("--data", self.tiny_files() / "pairs.jsonl", "--objective", "dpo")
            given = (*self.source("model"), *data)
        elif name == "ila":
            given = (*self.source("demo"), "--method", "ila", "--mask-steps", 30)
        else:
            given = (*self.source("model"), *self.update(name))
        folder = self.runner.folder(f"ranked-{name}", "rank", *given)
        if name == "demo" and not (folder / "verification.json").exists():  # for `auto`
            points = ("--points", 6, "--random-orders", 1)
            assert self.runner.run("verify", "--ranking", folder, *points)["exit"] == 0
        return folder

    def outcome(self, name: str, *arguments: object) -> dict[str, Any]:
        """How a command ended and what it wrote."""
        folder = self.work / "outcomes" / name
        ran = self.runner.run(*arguments, "--output", folder)
        written = self.runner.read(folder) if folder.exists() else None
        return {"exit": ran["exit"], "log": ran["log"], "files": written}

    def rank(self, name: str, model: str, *options: object) -> Any:
        return self.outcome(name, "rank", *self.source(model), *options)

    def rank_shared(self, name: str, model: str, *options: object) -> Any:
        """With an update that is made once."""
        shared: Options = ("--stage-1", self.work / f"stage-1-{model}")
        if model == "english":
            shared = ("--adapter", self.ranking(model) / "adapter")
        return self.rank(name, model, *shared, *options)

    def rank_update(self, name: str, kind: str, method: str) -> Any:
        options = ("--method", method, *METHOD_OPTIONS.get(method, ()))
        return self.rank(name, "model", *self.update(kind), *options)

    def rank_data(self, name: str, file: str, *options: object) -> Any:
        return self.rank(name, "model", "--data", self.tiny_files() / file, *options)

    def from_ranking(self, name: str, command: str, ranking: str, *options: object) -> Any:
        return self.outcome(name, command, "--ranking", self.ranking(ranking), *options)

    def rank_first(self, name: str, *options: object) -> Any:
        steps = ("--steps", 12, "--max-steps", 6)
        return self.outcome(name, "train", "--rank-first", *self.source("demo"), *steps, *options)

    def memory(self, name: str, kind: str) -> Any:
        """The set alone: how a step's memory is found may change."""
        given = ("--budget", "1GiB", "--steps", 2, "--update", kind)
        found = self.from_ranking(name, "train", "full", *given)
        record = (found["files"] or {}).get("keylayers.json", {})
        return {**found, "files": record.get("selection", {}).get("modules")}

    def budgets(self, name: str, model: str) -> Any:
        """The sets that budgets select."""
        file = self.ranking(model) / "ranking.json"

        def select() -> Any:
            import keylayers

            found: dict[str, Any] = {}
            ranking = keylayers.Ranking.load(file)
            shares = [f"{a}x-{b}" for a in (0.1, 0.3, 0.5, 0.9, 1.0) for b in ("params", "time")]
            for budget in (*BUDGETS, *shares, *REFUSED_BUDGETS):
                try:
                    selection = ranking.select(budget)
                    config = selection.lora_config(r=3).to_dict()
                except Exception as error:
                    found[repr(budget)] = f"refused: {type(error).__name__}"
                    continue
                names = {key: config[f"target_{key}"] for key in ("modules", "parameters")}
                for key, value in names.items():
                    names[key] = sorted(value) if isinstance(value, list | set) else value
                found[repr(budget)] = {"names": list(selection.names), "config": names}
            return found

        return {"exit": 0, "sets": forked(select, self.work / "logs" / name)}

    def export(self, name: str, model: str, *options: object) -> Any:
        return self.outcome(name, "export", self.ranking(model), *options)

    def show(self, name: str, command: str, rankings: tuple[str, ...], *options: object) -> Any:
        """What is shown, as JSON or by its numbers alone."""
        ran = self.runner.run(command, *map(self.ranking, rankings), *options)
        text = self.runner.plain(ran["out"])
        is_json = "--json" in options and ran["exit"] == 0
        content = self.runner.plain(json.loads(text)) if is_json else numbers(text)
        return {"exit": ran["exit"], "log": ran["log"], "content": content, "text": text}

    def consensus(self, name: str) -> Any:
        file = self.work / "consensus.json"
        both = (self.ranking("demo"), self.ranking("ila"))
        ran = self.runner.run("compare", *both, "--consensus", file)
        return {"exit": ran["exit"], "log": ran["log"], "ranking": self.runner.read_file(file)}

    def import_scan(self, name: str) -> Any:
        found = json.loads((self.ranking("model") / "ranking.json").read_text())["modules"]
        scan = {one["name"]: {"snr": 90 - i, "type": "x"} for i, one in enumerate(found)}
        for one in found:
            scan[one["name"]]["type"] = one["projection"]
        file = self.work / "snr_results.json"
        file.write_text(json.dumps(scan))
        return self.outcome(name, "import", file, "--model", self.tiny_files() / "model")

    def evaluate(self, name: str) -> Any:
        adapter = ("--adapter", self.ranking("demo") / "adapter", "--max-examples", 120)
        data = ("--data", self.demo() / "list.jsonl")
        other = ("--forgetting-data", self.demo() / "polite.jsonl", "--forgetting-examples", 20)
        model = ("--model", self.demo() / "model")
        found = self.outcome(name, "eval", *model, *adapter, *data, *other)
        return {**found, "files": (found["files"] or {}).get("evaluation.json")}

    def refusals(self, name: str) -> Any:
        """Exit codes of wrong commands."""
        found: dict[str, Any] = {"exit": "see below"}
        for options in REFUSED:
            ran = self.rank(name, "model", *options)
            found[" ".join(map(str, options))] = {"exit": ran["exit"], "log": ran["log"]}
        return found


def make_cases(runner: Runner) -> dict[str, Callable[[], Any]]:
    """Every case by its name."""
    cases = Cases(runner)
    found: dict[str, Callable[[], Any]] = {}

    def case(name: str, function: Callable[..., Any], *arguments: Any) -> None:
        assert name not in found, name
        found[name] = lambda: function(name, *arguments)

    add_rankings(case, cases)
    add_uses(case, cases)
    return found


def add_rankings(case: Callable[..., None], cases: Cases) -> None:
    for model, method in product(("demo", "english", "mixture"), METHODS):
        options = ("--method", method, *METHOD_OPTIONS.get(method, ()))
        case(f"rank-{model}-{method}", cases.rank_shared, model, *options)
    for method, gates in product(GATED, ("block", "projection")):
        options = ("--method", method, "--granularity", gates, *METHOD_OPTIONS.get(method, ()))
        case(f"rank-demo-{method}-{gates}", cases.rank_shared, "demo", *options)
    for name, given in VARIED.items():
        case(f"rank-demo-{name}", cases.rank_shared, "demo", *given)
    for method in ("elimination", "ila", "fisher", "eva"):
        options = ("--mask-data", "train", "--method", method)
        case(f"rank-mask-data-train-{method}", cases.rank, "model", *options)
    for name, given in STAGE_1.items():
        case(f"rank-stage-1-{name}", cases.rank, "model", *given)
    kinds = ("lora", "rslora", "dora", "adalora", "full", "two", "4bit")
    for kind, method in product(kinds, (*GATED, "update-norm", "gradient-norm")):
        case(f"update-{kind}-{method}", cases.rank_update, kind, method)
    others = ("fisher", "aletheia", "lora-drop", "spectrum", "eva", "cka")
    for kind, method in product(("full", "two", "4bit"), others):
        case(f"update-{kind}-{method}", cases.rank_update, kind, method)
    add_data(case, cases)


def add_data(case: Callable[..., None], cases: Cases) -> None:
    for name, data in {"dpo": "pairs", "kto": "rated", "orpo": "pairs", "reward": "pairs"}.items():
        given = (f"{data}.jsonl", "--objective", name)
        for method in ("elimination", "ila", "leave-one-out", "fisher", "gradient-norm"):
            options = ("--method", method, *METHOD_OPTIONS.get(method, ()))
            case(f"objective-{name}-{method}", cases.rank_data, *given, *options)
        options = ("--update", "full", "--mask-data", "train")
        case(f"objective-{name}-full", cases.rank_data, *given, *options)
    case(
        "objective-dpo-beta", cases.rank_data, *("pairs.jsonl", "--objective", "dpo"), "--beta", 0.3
    )
    for name in ("dpo", "kto"):
        options = ("--data", SHARED / f"data/preference/{name}_300.json", "--objective", name)
        options = (*options, "--max-examples", 300, "--held-out", 12, "--max-steps", 4)
        case(f"objective-{name}-english", cases.rank, "english", *options)
    steps = ("--max-steps", 3, "--method", "gradient-norm")
    for name in ("alpaca", "sharegpt", "messages", "prompt-completion", "lima", "text"):
        case(f"data-{name}", cases.rank_data, f"{name}.jsonl", *steps)
    case("data-csv", cases.rank_data, "table.csv", *steps)
    for name in ("chatml", "alpaca"):
        case(
            f"data-template-{name}",
            cases.rank_data,
            "messages.jsonl",
            *steps,
            "--chat-template",
            name,
        )
    cut = ("--max-length", 24, "--held-out", 0.3)
    case("data-cut", cases.rank_data, "messages.jsonl", *steps, *cut)


def add_uses(case: Callable[..., None], cases: Cases) -> None:
    for name in ("demo", "english", "mixture"):
        case(f"budgets-{name}", cases.budgets, name)
    for tool, model, kind in product(TOOLS, ("model", "mixture"), ("lora", "full")):
        for name, given in EXPORTED.items():
            options = (*given, "--update", kind, "--to", tool)
            case(f"export-{tool}-{model}-{kind}-{name}", cases.export, model, *options)
    points = ("--points", 6, "--random-orders", 2)
    for name in ("demo", "english", "full", "two", "mixture", "dora", "adalora", "4bit", "dpo"):
        case(f"verify-{name}", cases.from_ranking, "verify", name, *points)
        case(f"prune-{name}", cases.from_ranking, "prune", name, "--budget", 0.3)
        options = ("--budget", 0.3, "--steps", 6, *QUICK)
        case(f"train-{name}", cases.from_ranking, "train", name, *options)
    options = ("--leave-one-out", "--margin", 0.3)
    case("verify-leave-one-out", cases.from_ranking, "verify", "full", *points, *options)
    for budget in ("auto", "5", "0.3x-params", "0.6x-time"):
        case(f"prune-demo-{budget}", cases.from_ranking, "prune", "demo", "--budget", budget)
        options = ("--budget", budget, "--steps", 3)
        case(f"train-demo-{budget}", cases.from_ranking, "train", "demo", *options)
    for name in ("demo", "full"):
        case(f"prune-{name}-freeze", cases.from_ranking, "prune", name, "--freeze", 0.25)
    for name, given in TRAINED.items():
        case(f"train-demo-{name}", cases.from_ranking, "train", "demo", *given, "--steps", 6)
    for name, given in RANKED_FIRST.items():
        case(f"train-rank-first-{name}", cases.rank_first, *given)
    for name in ("lora", "full"):
        case(f"memory-{name}", cases.memory, name)
    for name, given in {"text": (), "json": ("--json",)}.items():
        for budget in ("0.3", "17", "0.3x-params"):
            case(f"show-{name}-{budget}", cases.show, "show", ("demo",), "--budget", budget, *given)
        case(f"compare-{name}", cases.show, "compare", ("demo", "ila"), *given)
    case("compare-consensus", cases.consensus)
    case("import-spectrum", cases.import_scan)
    case("eval-losses", cases.evaluate)
    case("demo", cases.outcome, "demo", "--max-steps", 8)
    case("refusals", cases.refusals)
