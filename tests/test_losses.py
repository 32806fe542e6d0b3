# SPDX-License-Identifier: Apache-2.0
"""Every loss that is shown is the cross-entropy of the answers in a loop of transformers."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from commands import STEPS, best, keylayers, rank, read, record_of, verified_in
from prepared import prepare
from tiny_files import rows, tiny_tokenizer, write_mixture

MIXTURE = {"router_aux_loss_coef": 0.5, "output_router_logits": True, "initializer_range": 0.3}
MIXTURE |= {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def mixture(tiny, tmp_path_factory):
    """A folder like `tiny`, with a mixture of experts that asks for a loss of its routers."""
    folder = tmp_path_factory.mktemp("mixture")
    write_mixture(tiny, folder, **MIXTURE)
    return folder


def by_hand(place, adapter=None, off=()):
    """Nats per token of the held-out answers; LoRA's B is zero in the modules `off`."""
    tokenizer = tiny_tokenizer()
    held_out = prepare(place / "data.jsonl", 64, "sft", tokenizer).held_out["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype="float32")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    total, count = 0.0, 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and any(module in name for module in off):
                parameter.zero_()
        for row in rows():
            question = tokenizer.encode(f"<|user|>{row['prompt']}<|assistant|>")
            answer = tokenizer.encode(f"{row['completion']}</s>")
            if [*question, *answer] in held_out:
                logits = model.eval()(torch.tensor([question + answer])).logits[0]
                said = logits[len(question) - 1 : -1]
                total += float(cross_entropy(said, torch.tensor(answer), reduction="sum"))
                count += len(answer)
    return total / count


METHOD = ("--method", "path", "--path-points", "2")


@pytest.mark.parametrize("kind", ["tiny", "mixture"])
def test_every_shown_loss_is_that_of_a_plain_loop(kind, request, tmp_path, capsys):
    place = request.getfixturevalue(kind)
    out, tuned, cut = (tmp_path / name for name in ("out", "tuned", "cut"))
    assert rank(place, out, *METHOD, "--learning-rate", "0.02") == 0
    base, full = by_hand(place), by_hand(place, out / "adapter")
    assert abs(base - full) > 0.01
    shown = read(out)["provenance"]["held_out_loss_nats"]
    assert shown == pytest.approx({"base": base, "tuned": full}, rel=1e-5)
    assert keylayers("verify", "--ranking", out, "--points", 3, "--random-orders", 1) == 0
    curve = verified_in(out)["best_first"]
    middle = by_hand(place, out / "adapter", best(out, 99) - best(out, curve["counts"][1]))
    assert curve["losses"] == pytest.approx([base, middle, full], rel=1e-5)
    assert keylayers("train", "--ranking", out, "--budget", 3, *STEPS, "--output", tuned) == 0
    selected = by_hand(place, tuned)
    results = [row["held_out_loss_nats"] for row in record_of(tuned)["results"][:2]]
    assert results == pytest.approx([base, selected], rel=1e-5)
    assert keylayers("prune", "--ranking", out, "--budget", 5, "--output", cut) == 0
    result = record_of(cut)["result"]
    shown = [result[f"{name}_loss_nats"] for name in ("base", "full", "pruned")]
    assert shown == pytest.approx([base, full, by_hand(place, cut)], rel=1e-5)
    model = ("--model", place / "model", "--adapter", tuned, "--data", place / "data.jsonl")
    assert keylayers("eval", *model, "--output", tmp_path / "eval") == 0
    found = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    values = [result["value"] for result in found["measures"][0]["results"]]
    assert values == pytest.approx([base, selected], rel=1e-5)


@pytest.mark.parametrize("method", ["elimination", "fisher", "spectrum", "update-norm"])
def test_an_update_of_zero_is_said_to_rank_nothing_whatever_the_method(
    method, tiny, tmp_path, capsys
):
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "zero")
    adapter = ("--adapter", tmp_path / "zero", "--method", method)
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    assert keylayers("rank", *inputs, *adapter, "--output", tmp_path / "out") == 0
    assert "the update of every module is zero" in capsys.readouterr().err
