# SPDX-License-Identifier: Apache-2.0
"""`keylayers rank` in its three ways, on a tiny model, through the command line."""

import json

import pytest

from commands import complaint, keylayers, plain_loss, rank, read, record_of, scores, weights_in
from keylayers.cli import COMMANDS, app
from tiny_files import NUM_MODULES


def test_both_stages_give_a_ranking_with_its_provenance_and_an_adapter(
    tiny, ranked, tmp_path, capsys
):
    output = tmp_path / "out"
    assert rank(tiny, output) == 0
    content = read(output)
    modules, made_by = content["modules"], content["provenance"]
    assert sorted(module["rank"] for module in modules) == list(range(1, NUM_MODULES + 1))
    first = {"name": "model.layers.0.self_attn.q_proj", "projection": "q_proj"}
    assert modules[0].items() >= (first | {"num_parameters": 32 * 32}).items()
    assert all(module["standard_error"] > 0 for module in modules)
    assert len(made_by["stage_1"]["losses"]) == 6
    assert made_by["stage_1"]["stopped_by"] == "max_steps"
    assert len(made_by["mask"]["losses"]) == 6 * 2  # 21, 15, 10, 7, 5, 4 modules
    assert made_by["model"]["weights_sha256"]
    assert made_by["data"]["content_sha256"]
    assert made_by["data"]["chat_template"]["source"] == "model"
    assert made_by["options"]["seed"] == 0
    assert made_by["environment"]["libraries"]["peft"]
    assert set(made_by["seconds"]) == {"stage_1", "stage_2", "total"}
    assert made_by["held_out_loss_nats"]["tuned"] < made_by["held_out_loss_nats"]["base"]
    out, err = capsys.readouterr()
    assert "21 modules, " in out
    assert "written to" in out
    assert "stage 1 ended after 6 steps: the cap is reached" in err
    assert scores(output) == scores(ranked)  # the same seed, bit for bit
    weights = weights_in(output / "adapter")
    assert len(weights) == 2 * NUM_MODULES
    assert not any("keygate" in name for name in weights)
    assert record_of(output / "adapter")


STABLE = ("--window", "2", "--epsilon", "100")


def test_stage_1_stops_when_the_loss_is_stable(tiny, tmp_path):
    assert rank(tiny, tmp_path / "out", "--warmup-steps", "0", *STABLE) == 0
    stage_1 = read(tmp_path / "out")["provenance"]["stage_1"]
    assert (stage_1["num_steps"], stage_1["stopped_by"]) == (4, "stable")


def test_an_adapter_needs_stage_2_only_and_stage_1s_own_gives_the_same(tiny, ranked, tmp_path):
    assert rank(tiny, tmp_path / "out", "--adapter", ranked / "adapter") == 0
    made_by = read(tmp_path / "out")["provenance"]
    assert "stage_1" not in made_by
    assert made_by["adapter"]["name"].endswith("adapter")
    assert scores(tmp_path / "out") == scores(ranked)
    assert not (tmp_path / "out" / "adapter").exists()


def test_what_a_ranking_is_for_chooses_the_method(tiny, ranked, tmp_path):
    own = ("--adapter", ranked / "adapter")
    for purpose, method in (("prune", "elimination"), ("retrain", "gradient-path")):
        assert rank(tiny, tmp_path / purpose, *own, "--for", purpose) == 0
        assert read(tmp_path / purpose)["method"] == method
    assert scores(tmp_path / "prune") == scores(ranked)
    (tmp_path / "rank.yaml").write_text("for: retrain\n")
    assert rank(tiny, tmp_path / "yaml", *own, "--config", tmp_path / "rank.yaml") == 0
    assert scores(tmp_path / "yaml") == scores(tmp_path / "retrain")


def test_a_purpose_and_a_method_do_not_go_together(tiny, tmp_path, capsys):
    assert rank(tiny, tmp_path / "out", "--for", "retrain", "--method", "path") == 2
    assert "`for` must be left out with `method`, which decides" in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_two_checkpoints_need_stage_2_only_and_open_gates_are_the_tuned_one(tiny, tmp_path, capsys):
    assert rank(tiny, tmp_path / "out", "--tuned", tiny / "tuned") == 0
    made_by = read(tmp_path / "out")["provenance"]
    assert "model.norm.weight" in made_by["tuned"]["other_weights_that_differ"]
    assert len(set(scores(tmp_path / "out"))) == NUM_MODULES
    assert "taken from the tuned checkpoint: 7 other weights" in capsys.readouterr().err
    loss = plain_loss(tiny, tiny / "tuned")
    assert loss == pytest.approx(made_by["held_out_loss_nats"]["tuned"], rel=1e-5)


def test_options_come_from_yaml_and_flags_win(tiny, tmp_path):
    config = tmp_path / "rank.yaml"
    config.write_text(
        f"model: {tiny / 'model'}\ndata: {tiny / 'data.jsonl'}\nmax-steps: 4\nmask_steps: 3\n"
        "method: ila\nbatch_size: 4\nmask_optimizer: adam\nrevision: null\n"
    )
    output = tmp_path / "out"
    assert keylayers("rank", "--config", config, "--mask-steps", "2", "--output", output) == 0
    wanted = {"max_steps": 4, "mask_steps": 2, "mask_optimizer": "adam"}
    assert read(output)["provenance"]["options"].items() >= wanted.items()


def test_lists_in_yaml_are_options_too(ranked, tmp_path):
    content = f"ranking: {ranked}\nbudget: 0.3\ncontrols: [all, random]\n"
    (tmp_path / "train.yaml").write_text(content)
    words = ["train", "--config", str(tmp_path / "train.yaml")]
    _, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    assert bound.arguments["options"].selection.controls == ("all", "random")


def test_no_option_has_the_name_of_a_sub_command():
    """cyclopts drops keys of a YAML file that are also names of sub-commands, without a word."""
    names = {
        argument.name.removeprefix("--")
        for command in COMMANDS
        for argument in app[command].assemble_argument_collection()
    }
    assert "mask-steps" in names
    assert not names & set(COMMANDS)


@pytest.mark.parametrize("command", ["train", "prune"])
def test_a_ranking_file_cannot_switch_on_the_code_of_a_model(ranking_copy, command):
    content = read(ranking_copy)
    content["provenance"]["options"] |= {"trust_remote_code": True, "revision": "abc"}
    (ranking_copy / "ranking.json").write_text(json.dumps(content))
    words = [command, "--ranking", str(ranking_copy), "--budget", "0.3"]
    _, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    assert bound.arguments["options"].model.trust_remote_code is False
    assert bound.arguments["options"].model.revision == "abc"  # the ranking's own


def test_show_prints_the_ranking_or_its_json(ranked, capsys):
    capsys.readouterr()
    assert keylayers("show", ranked) == 0
    shown = capsys.readouterr().out
    assert "1 is the most important" in shown
    assert "held out  base" in shown
    assert keylayers("show", ranked / "ranking.json", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert [module["rank"] for module in content["modules"]] == list(range(1, NUM_MODULES + 1))


def test_a_finished_stage_1_of_the_same_inputs_is_not_run_again(tiny, ranking_copy, capsys):
    first = scores(ranking_copy)
    (ranking_copy / "ranking.json").unlink()
    capsys.readouterr()
    assert rank(tiny, ranking_copy) == 0
    assert "stage 1 of the same inputs is taken from" in capsys.readouterr().err
    assert scores(ranking_copy) == first
    assert rank(tiny, ranking_copy, "--seed", "5") == 0
    assert "stage 1 ended after 6 steps" in capsys.readouterr().err
    assert scores(ranking_copy) != first
