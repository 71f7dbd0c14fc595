"""Generate text tokens with one model split over several ranks, and compare them with one process.

    torchrun --nproc-per-node 2 examples/generate.py [--tokens 32] [--sample]

A GPT-2 of random weights (nothing is downloaded), NCCL where there is a GPU for each rank and gloo on
the CPU otherwise. The one changed line is ``autoshard.parallelize``; ``generate`` is the model's own.
Prints what was generated and how much of the cache a rank holds; exits with 1 if a token differs.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

import autoshard


def main() -> None:
    """The command line, on every rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--sample", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=1000, n_embd=128, n_layer=4, n_head=8, initializer_range=0.2,
        bos_token_id=0, eos_token_id=999,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    whole = copy.deepcopy(model).to(device)
    prompts = torch.randint(1, 999, (2, 6)).to(device)
    choice = {"max_new_tokens": options.tokens, "do_sample": options.sample, "pad_token_id": 0}

    model = autoshard.parallelize(model, dist.get_world_size(), degree="max")  # the one line
    torch.manual_seed(1)  # every rank draws the same
    split = model.generate(prompts, return_dict_in_generate=True, **choice)

    torch.manual_seed(1)
    expected = whole.generate(prompts, **choice)
    same = torch.equal(split.sequences, expected)
    keys = split.past_key_values.layers[0].keys
    share = keys.to_local() if isinstance(keys, DTensor) else keys
    if dist.get_rank() == 0:
        print(split.sequences[0].tolist())
        print(f"keys of a layer: {tuple(keys.shape)}, on this rank {tuple(share.shape)}")
        print("the same tokens as one process" if same else "NOT the tokens of one process")
    dist.destroy_process_group()
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
