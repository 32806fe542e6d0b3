# SPDX-License-Identifier: Apache-2.0
"""The export to torchtune, built and trained by torchtune itself where it is at hand.

It lives apart from our own environment, because PEFT refuses to work beside the release of torchao
that it needs: `pip install --no-deps --target FOLDER --requirement tests/torchtune.txt`, and
TORCHTUNE=FOLDER.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from keylayers import export_selection
from keylayers.errors import ConfigError
from test_export import SHARES, ranking_of_model

FOLDER = os.environ.get("TORCHTUNE")
needs_torchtune = pytest.mark.skipif(
    not FOLDER, reason="TORCHTUNE is not set; this file says how to install torchtune beside us"
)
TRAINED = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.models.convert_weights import tune_to_peft_adapter_weights
from torchtune.modules.peft import get_adapter_params, get_adapter_state_dict, set_trainable_params

settings = OmegaConf.load(sys.argv[2] + "/torchtune.yaml")
settings.model.base_component = "torchtune.models.llama3.lora_llama3"
size = dict(
    vocab_size=32, num_layers=int(sys.argv[3]), num_heads=4, num_kv_heads=2, embed_dim=32,
    max_seq_len=16, intermediate_dim=48,
)
torch.manual_seed(0)
model = config.instantiate(settings.model, **size)
set_trainable_params(model, get_adapter_params(model))
before = {name: one.detach().clone() for name, one in model.named_parameters()}
optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
tokens = torch.randint(32, (2, 16))
for _ in range(3):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
changed = sorted(name for name, one in model.named_parameters() if (one != before[name]).any())
adapter = get_adapter_state_dict(model.state_dict())
peft = tune_to_peft_adapter_weights(adapter, num_heads=4, num_kv_heads=2, dim=32, head_dim=8)
print(json.dumps({"peft": sorted(peft), "changed": changed, "adapter": sorted(adapter)}))
"""


@pytest.mark.long
@needs_torchtune
@pytest.mark.parametrize("share", SHARES)
def test_torchtune_trains_exactly_the_selection(share, tmp_path):
    """By torchtune's own map of names to PEFT's, of what its own recipe would save."""
    ranking = ranking_of_model("Llama")
    export_selection(ranking, share, "torchtune", tmp_path)
    num_blocks = len({one.block_index for one in ranking.modules})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINED, FOLDER, str(tmp_path), str(num_blocks)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in found["peft"]}
    assert names == set(ranking.select(share).names)
    assert found["changed"] == found["adapter"]


def exported(ranking, budget, folder):
    export_selection(ranking, budget, "torchtune", folder)
    return yaml.safe_load((folder / "torchtune.yaml").read_text())["model"]


def test_the_config_names_each_module_as_torchtune_does(tmp_path):
    ranking = ranking_of_model("Llama")
    model = exported(ranking, 1.0, tmp_path)
    assert len(model["keep"]) == len(set(model["keep"])) == len(ranking.modules)
    assert model["keep"][:4] == [f"layers.0.attn.{kind}" for kind in model["lora_attn_modules"]]
    assert (model["lora_rank"], model["lora_alpha"]) == (2, 4)


def test_only_what_is_needed_is_adapted_at_first(tmp_path):
    ranking = ranking_of_model("Llama")
    best = next(one for one in ranking.modules if one.projection == "v_proj")
    scored = tuple(replace(one, score=float(one == best)) for one in ranking.modules)
    model = exported(replace(ranking, modules=scored), 1, tmp_path)
    assert model["lora_attn_modules"] == ["v_proj"]
    assert model["apply_lora_to_mlp"] is False


@pytest.mark.parametrize("title", ["GPT-2", "Mixtral", "Qwen3-MoE", "DeepSeek-V3"])
def test_models_that_torchtune_has_not_in_this_form_are_refused(title, tmp_path):
    with pytest.raises(ConfigError, match="`to` torchtune must be able to train exactly the"):
        export_selection(ranking_of_model(title), 0.3, "torchtune", tmp_path / "out")
    assert not (tmp_path / "out").exists()
