# SPDX-License-Identifier: Apache-2.0
"""The flags and output of the commands that open a model: rank, train, verify, prune and eval."""

from pathlib import Path
from typing import Annotated

from keylayers.commands import sub_command
from keylayers.commands.config import FromRanking
from keylayers.commands.console import ConsoleProgress, print_result
from keylayers.commands.options import (
    FLAT,
    Model,
    PruneOptions,
    RankOptions,
    TrainOptions,
    VerifyOptions,
    flat,
)
from keylayers.evaluation.options import (
    BenchmarkOptions,
    ComparedOptions,
    EvalOptions,
    EvalRunOptions,
    LossOptions,
)
from keylayers.training.options import LOSS_UNITS

rank_app = sub_command("""\
keylayers rank --model meta-llama/Llama-3.2-1B --data tatsu-lab/alpaca --output out
keylayers rank --model base --data chats.jsonl --adapter my-adapter
keylayers rank --model base --tuned instruct --data chats.jsonl --mask-batches 8
keylayers rank --config rank.yaml --seed 1
""")


@rank_app.default
def rank(
    *,
    options: Annotated[RankOptions, FLAT],
    output: Path = Path("out"),
    stage_1: Path | None = None,
    config: Path | None = None,
) -> None:
    """Rank the modules of a model for a fine-tune.

    Stage 1 fine-tunes all modules with LoRA until the loss is stable; stage 2 freezes everything
    and scores the modules by gates on what the fine-tune added. With --adapter or --tuned only
    stage 2 runs. Writes ranking.json and stage 1's adapter.

    Args:
        output: Folder for ranking.json and the adapter.
        stage_1: Folder for stage 1's adapter, if several rankings share it: the first run trains
            it, the others reuse it.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_rank import run_rank
    from keylayers.report.terminal import ranking_report

    ranking = run_rank(options, output, ConsoleProgress(), stage_1 or output)
    print_result(ranking_report(ranking), f"written to {output / 'ranking.json'}")


train_app = sub_command(
    """\
keylayers train --ranking out --budget 0.3 --output tuned
keylayers train --ranking out --freeze 0.25 --steps 1000 --data all.jsonl
keylayers train --ranking out --budget 17 --update full --controls all random
keylayers train --rank-first --model meta-llama/Llama-3.2-1B --data chats.jsonl --steps 1000
""",
    help_formatter=FromRanking("train"),
    usage="Usage: keylayers train --ranking STR (--budget STR | --freeze FLOAT) [OPTIONS]\n"
    "       keylayers train --rank-first --model STR --data STR [OPTIONS]",
)


@train_app.default
def train(
    *,
    options: Annotated[TrainOptions, FLAT],
    output: Path = Path("tuned"),
    config: Path | None = None,
) -> None:
    """Train only the modules that a ranking and a budget select.

    Writes an ordinary PEFT adapter, or with --update full a checkpoint in which only the selected
    weights changed. Model, data and training options default to those of the ranking. With
    --rank-first there is no ranking yet: the run makes it and writes it to the output.

    Args:
        output: Folder of the adapter or checkpoint.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_train import run_rank_first, run_train
    from keylayers.report.terminal import loss_table

    run = run_rank_first if options.selection.rank_first else run_train
    rows = run(options, output, ConsoleProgress())
    kind = "checkpoint" if options.training.is_full else "adapter"
    unit = LOSS_UNITS[options.training.objective]
    print_result(loss_table(rows, unit), f"{kind} written to {output}")


verify_app = sub_command(
    """\
keylayers verify --ranking out
keylayers verify --ranking out --leave-one-out --margin 0.02
keylayers verify --ranking r.json --model base --adapter my-adapter --data chats.jsonl
""",
    help_formatter=FromRanking("verify"),
    usage="Usage: keylayers verify --ranking PATH [OPTIONS]",
)


@verify_app.default
def verify(
    *,
    ranking: Path,
    options: Annotated[VerifyOptions, FLAT],
    output: Path | None = None,
    config: Path | None = None,
) -> None:
    """Measure a ranking: held-out loss with only the best modules' updates kept.

    Nothing is trained. Shows the mask curve with random orders and the reverse order for
    comparison, and the smallest budget that is nearly as good as all modules, which
    `train --budget auto` takes. Model, update and data default to those of the ranking. Writes
    verification.json next to the ranking.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        output: Folder for verification.json and a copy of the ranking. Default: verification.json
            is written next to the ranking.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_verify import run_verify
    from keylayers.ranking.verification import verification_file
    from keylayers.report.curve import verification_report

    found = run_verify(ranking, options, ConsoleProgress(), output)
    print_result(verification_report(found), f"written to {verification_file(output or ranking)}")


prune_app = sub_command(
    """\
keylayers prune --ranking out --budget 0.3
keylayers prune --ranking r.json --adapter my-adapter --freeze 0.25 --output smaller
keylayers prune --ranking r.json --model base --tuned instruct --budget auto --data chats.jsonl
""",
    help_formatter=FromRanking("prune"),
    usage="Usage: keylayers prune --ranking PATH (--budget STR | --freeze FLOAT) [OPTIONS]",
)


@prune_app.default
def prune(
    *,
    options: Annotated[PruneOptions, FLAT],
    output: Path = Path("pruned"),
    config: Path | None = None,
) -> None:
    """Cut an adapter, or a tuned checkpoint, to the modules that a ranking and a budget select.

    Nothing is trained. Writes an ordinary PEFT adapter without the other modules, or a checkpoint
    in which these have the base's weights again, and shows the held-out loss before and after.
    Model, update and data default to those of the ranking.

    Args:
        output: Folder of the adapter or checkpoint.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_prune import run_prune
    from keylayers.report.prune import pruning_report

    found = run_prune(options, output, ConsoleProgress())
    print_result(pruning_report(found), f"{found.kind} written to {output}")


eval_app = sub_command("""\
keylayers eval --model base --adapter tuned-30 tuned-all --tasks mmlu,hellaswag
keylayers eval --model base --adapter tuned --data chats.jsonl --forgetting-data known.txt
keylayers eval --model base --checkpoint tuned --tasks gsm8k
keylayers eval --model base --adapter tuned --task-folder my-tasks --tasks mine --limit 200
""")


@eval_app.default
def eval(
    *,
    model: Model,
    compared: Annotated[ComparedOptions, flat("Compared")] = ComparedOptions(),
    benchmarks: Annotated[BenchmarkOptions, flat("Benchmarks")] = BenchmarkOptions(),
    losses: Annotated[LossOptions, flat("Gain and forgetting")] = LossOptions(),
    run: Annotated[EvalRunOptions, flat("Running")] = EvalRunOptions(),
    output: Path = Path("evaluation"),
    config: Path | None = None,
) -> None:
    """Compare a model with adapters and checkpoints: benchmarks and losses in one table.

    All models are measured on the same documents, and each difference is shown with its interval.
    Finished results are not measured again: the same command continues where it stopped. Writes
    evaluation.json and documents.parquet. Benchmarks need `pip install 'keylayers[eval]'`.

    Args:
        output: Folder of the evaluation.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.evaluation.run import evaluate
    from keylayers.report.evaluation import evaluation_report

    options = EvalOptions(model, compared, benchmarks, losses, run)
    found = evaluate(options, output, ConsoleProgress())
    print_result(evaluation_report(found), f"written to {output}")
