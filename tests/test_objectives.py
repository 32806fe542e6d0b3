# SPDX-License-Identifier: Apache-2.0
"""Every objective from the command line: rank, show, verify, train, and a plain load."""

import json
import math

import pytest
import torch

from commands import file_for, fresh_process, keylayers
from tiny_files import NUM_MODULES

OBJECTIVES = ("dpo", "kto", "orpo", "reward")
QUICK = ["--mask-batches", "1", "--batch-size", "4", "--lora-rank", "2", "--epsilon", "0"]
QUICK += ["--learning-rate", "0.02", "--warmup-steps", "0"]
PLAIN_PEFT = """
import sys
import peft
if sys.argv[2] == "reward":
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=1)
else:
    model = peft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
assert "keylayers" not in sys.modules
print(*model.targeted_module_names)
"""


def rank(tiny, data, objective, output, *more, steps=3):
    options = ("--model", tiny / "model", "--data", file_for(data, objective), "--output", output)
    return keylayers(
        "rank", *options, "--objective", objective, *QUICK, "--max-steps", steps, *more
    )


@pytest.fixture(scope="module")
def ranked(tiny, preferences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    return {
        objective: (rank(tiny, preferences, objective, folder / objective), folder / objective)
        for objective in OBJECTIVES
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_from_ranking_to_an_adapter_that_plain_peft_loads(
    ranked, tiny, objective, tmp_path, capsys
):
    code, folder = ranked[objective]
    assert code == 0
    content = json.loads((folder / "ranking.json").read_text())
    made_by = content["provenance"]
    assert made_by["options"]["objective"] == objective
    assert len({module["score"] for module in content["modules"]}) > NUM_MODULES / 2
    losses = made_by["held_out_loss_nats"]
    assert all(math.isfinite(loss) for loss in losses.values())
    unmoved = {"dpo": math.log(2), "kto": 0.5}.get(objective)
    if unmoved:  # the reference is the base model, so the base model has no preference
        assert losses["base"] == pytest.approx(unmoved, abs=1e-6)
    capsys.readouterr()
    assert keylayers("show", folder) == 0
    from keylayers.training.options import LOSS_UNITS

    assert LOSS_UNITS[objective] in capsys.readouterr().out
    short = ("--random-orders", "1", "--points", "3", "--eval-batch-size", "4")
    assert keylayers("verify", "--ranking", folder, *short) == 0
    verified = json.loads((folder / "verification.json").read_text())
    assert verified["best_first"]["losses"][0] == pytest.approx(losses["base"], rel=1e-4)
    assert verified["best_first"]["losses"][-1] == pytest.approx(losses["tuned"], rel=1e-4)
    assert verified["provenance"]["options"]["objective"] == objective
    capsys.readouterr()
    tuned = tmp_path / "tuned"
    assert keylayers("train", "--ranking", folder, "--budget", "0.3", "--output", tuned) == 0
    out, err = capsys.readouterr()
    assert "all (stage 1 of the ranking)" in out
    assert "was made" not in err
    best = {module["name"] for module in content["modules"] if module["rank"] <= 6}
    assert set(fresh_process(PLAIN_PEFT, tuned, objective)) == best
    record = json.loads((tuned / "keylayers.json").read_text())
    rows = record["results"]
    assert [row["label"] for row in rows][:2] == ["base model", "selected"]
    if objective != "reward":  # whose base has stage 1's head in a ranking, and a new one here
        assert rows[0]["held_out_loss_nats"] == pytest.approx(losses["base"], rel=1e-5)
    assert rows[1]["held_out_loss_nats"] != rows[0]["held_out_loss_nats"]
    assert record["loss_unit"] == LOSS_UNITS[objective]


def test_training_lowers_each_loss_on_what_it_trains(tiny, preferences, tmp_path):
    """The trainers train what their names say: the loss falls on examples seen again and again."""
    for objective in OBJECTIVES:
        output = tmp_path / objective
        assert rank(tiny, preferences, objective, output, "--lora-alpha", 4, steps=40) == 0
        losses = json.loads((output / "ranking.json").read_text())["provenance"]["stage_1"][
            "losses"
        ]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), objective


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_an_adapter_and_a_checkpoint_are_compared_with_the_base_model(
    tiny, preferences, ranked, objective, tmp_path
):
    """Ranking stage 1's own adapter, or two checkpoints, has the base model as the reference."""
    _, folder = ranked[objective]
    second = tmp_path / "second"
    assert rank(tiny, preferences, objective, second, "--adapter", folder / "adapter") == 0
    found = [
        [module["score"] for module in json.loads((one / "ranking.json").read_text())["modules"]]
        for one in (folder, second)
    ]
    assert found[0] == found[1]
    third = tmp_path / "third"
    assert rank(tiny, preferences, objective, third, "--tuned", tiny / "tuned") == 0
    losses = json.loads((third / "ranking.json").read_text())["provenance"]["held_out_loss_nats"]
    unmoved = {"dpo": math.log(2), "kto": 0.5}[objective]
    assert abs(losses["tuned"] - unmoved) > 1e-3
    assert losses["base"] != losses["tuned"]


def test_a_full_update_trains_exactly_the_selection_against_the_base_model(ranked, tiny, tmp_path):
    from safetensors.torch import load_file

    _, folder = ranked["dpo"]
    tuned = tmp_path / "full"
    options = ("--budget", "3", "--update", "full", "--output", tuned)
    assert keylayers("train", "--ranking", folder, *options) == 0
    before = load_file(tiny / "model" / "model.safetensors")
    after = load_file(tuned / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    modules = json.loads((folder / "ranking.json").read_text())["modules"]
    assert changed == {f"{one['name']}.weight" for one in modules if one["rank"] <= 3}
    rows = json.loads((tuned / "keylayers.json").read_text())["results"]
    assert rows[0]["held_out_loss_nats"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[1]["held_out_loss_nats"] != rows[0]["held_out_loss_nats"]


def test_a_ranking_for_another_objective_is_used_with_a_note(ranked, tmp_path, capsys):
    _, folder = ranked["dpo"]
    options = ("--budget", "2", "--steps", "1", "--output", tmp_path / "t")
    assert keylayers("train", "--ranking", folder, "--objective", "orpo", *options) == 0
    out, err = capsys.readouterr()
    assert "the ranking was made for objective dpo, not for orpo" in err
    assert "stage 1 of the ranking" not in out


def test_beta_is_taken_over_with_its_objective_only(tiny, preferences, tmp_path, capsys):
    assert rank(tiny, preferences, "dpo", tmp_path / "out", "--beta", "0.5") == 0
    record = json.loads((tmp_path / "out" / "ranking.json").read_text())["provenance"]
    assert record["options"]["beta"] == 0.5
    options = ("--ranking", tmp_path / "out", "--budget", "2", "--steps", "1")
    assert keylayers("train", *options, "--output", tmp_path / "same") == 0
    same = json.loads((tmp_path / "same" / "keylayers.json").read_text())["options"]
    assert (same["objective"], same["beta"]) == ("dpo", 0.5)
    assert keylayers("train", *options, "--objective", "reward", "--output", tmp_path / "r") == 0
    other = json.loads((tmp_path / "r" / "keylayers.json").read_text())["options"]
    assert (other["objective"], other["beta"]) == ("reward", None)


REFUSED = [
    (["--objective", "grpo"], "call keylayers.rank_modules"),
    (["--objective", "sft", "--beta", "0.1"], "`beta` must be left out with `objective` sft"),
    (["--objective", "dpo", "--beta", "-1"], "`beta` must be above 0"),
    (["--objective", "kto", "--batch-size", "1"], "`batch_size` must be at least 2"),
    (["--objective", "kto"], "`objective` kto needs the columns label"),
    (["--objective", "sft"], "choose an objective for preferences with `--objective`"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_mistakes_are_one_clear_line(tiny, preferences, tmp_path, options, message, capsys):
    base = [
        "--model",
        tiny / "model",
        "--data",
        preferences / "pairs.jsonl",
        "--output",
        tmp_path / "o",
    ]
    assert keylayers("rank", *base, *options) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err
    assert not (tmp_path / "o").exists()


def test_a_reward_models_weights_are_not_trained_whole(ranked, tmp_path, capsys):
    options = ("--budget", "2", "--update", "full", "--output", tmp_path / "t")
    assert keylayers("train", "--ranking", ranked["reward"][1], *options) == 2
    assert "`update` must be an adapter with `objective` reward" in capsys.readouterr().err


def test_a_new_head_is_the_same_whatever_the_seed(tiny):
    from keylayers.model.loading import load_model
    from keylayers.model.options import ModelOptions

    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_model(ModelOptions(model=str(tiny / "model")), "reward")
        heads.append(model.score.weight)
    assert torch.equal(*heads)
    assert bool(heads[0].any())


def test_a_trainer_that_thaws_weights_is_refused(tiny, preferences, monkeypatch):
    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare
    from keylayers.errors import GuardError
    from keylayers.model.loading import load_model, load_tokenizer
    from keylayers.model.options import ModelOptions
    from keylayers.training import objectives
    from keylayers.training.options import TrainingOptions
    from keylayers.training.run import make_trainer

    def thawing(settings, arguments):
        arguments["model"].get_output_embeddings().weight.requires_grad_(True)
        return objectives._dpo(settings, arguments)

    monkeypatch.setitem(objectives.OBJECTIVES, "dpo", thawing)
    source = ModelOptions(model=str(tiny / "model"))
    tokenizer, model = load_tokenizer(source), load_model(source)
    examples = prepare(DataOptions(data=str(preferences / "pairs.jsonl")), tokenizer, 64, "dpo")
    model.requires_grad_(False)
    options = TrainingOptions(objective="dpo", batch_size=4)
    with pytest.raises(GuardError, match=r"1 weights changed, first lm_head.weight"):
        make_trainer(model, tokenizer, examples.train, options, num_steps=1, max_length=64)


def test_the_example_of_the_docs_runs(tiny, preferences, tmp_path, monkeypatch):
    import re
    import warnings
    from pathlib import Path

    text = (Path(__file__).resolve().parents[1] / "docs" / "objectives.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "base").symlink_to(tiny / "model")
    (tmp_path / "pairs.jsonl").symlink_to(preferences / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of a user's own trainer are the user's
        exec(code, found)
    assert len(found["ranking"].modules) == NUM_MODULES
    assert found["ranking"].provenance["reference"] == "base"
    assert found["config"].r == 16


def test_the_docs_name_every_objective_and_its_data():
    from pathlib import Path
    from typing import get_args

    from keylayers.data.preferences import FORMAT_OF
    from keylayers.model.options import Objective
    from keylayers.training.objectives import OBJECTIVES
    from keylayers.training.options import LOSS_UNITS

    text = (Path(__file__).resolve().parents[1] / "docs" / "objectives.md").read_text()
    assert set(get_args(Objective)) == set(OBJECTIVES) == set(LOSS_UNITS) == {"sft", *FORMAT_OF}
    kinds = {"pairs": "pairs", "rated": "rated answers"}
    for objective, format in FORMAT_OF.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{objective}` |")]
        assert f"| {kinds[format]} |" in line


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_on_real_preferences(shared, objective, tmp_path):
    model = shared / "models" / "english-2m"
    file = shared / "data" / "preference" / f"{objective}_300.json"
    output = tmp_path / "out"
    options = ("--max-length", "64", "--max-examples", "60", "--held-out", "4", "--max-steps", "2")
    more = ("--method", "gradient-norm", "--mask-batches", "1", "--batch-size", "4")
    base = ("--model", model, "--data", file, "--output", output, "--objective", objective)
    assert keylayers("rank", *base, *options, *more) == 0
    content = json.loads((output / "ranking.json").read_text())
    assert len({module["score"] for module in content["modules"]}) == 56
    assert content["provenance"]["data"]["num_held_out"] == 4
    unmoved = {"dpo": math.log(2), "kto": 0.5}[objective]
    base_loss = content["provenance"]["held_out_loss_nats"]["base"]
    assert base_loss == pytest.approx(unmoved, abs=1e-6)
    tuned = tmp_path / "tuned"
    assert keylayers("train", "--ranking", output, "--budget", "0.3", "--output", tuned) == 0
    best = {module["name"] for module in content["modules"] if module["rank"] <= 17}
    assert set(fresh_process(PLAIN_PEFT, tuned, objective)) == best
