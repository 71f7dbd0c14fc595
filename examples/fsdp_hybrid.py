"""Tensor parallelism inside a machine, FSDP2 between machines: the paper's hybrid, by two lines.

torchrun --nproc-per-node 4 examples/fsdp_hybrid.py        (2 x 2; with two processes 2 x 1)
"""

import os

import torch
import torch.distributed as dist
import transformers

import autoshard

STEPS = 20


def main() -> None:
    """A GPT-2 that learns eight sequences by heart; each copy sees its share of them."""
    torch.manual_seed(0)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tp = 2 if world % 4 == 0 else 1
    config = transformers.GPT2Config(vocab_size=1000, n_embd=128, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(1000, (8, 64))

    model = autoshard.parallelize(model, tp, degree="max")  # the mesh is world / tp copies x tp ranks
    autoshard.fully_shard(model)  # every layer a unit of FSDP2; options are those of fully_shard

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    copies, copy = world // tp, model.mesh.get_local_rank("dp")
    mine = tokens[copy * len(tokens) // copies : (copy + 1) * len(tokens) // copies]
    mine = mine.to(next(model.parameters()).device)
    for step in range(STEPS):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()  # gradients are means over the copies
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4 and dist.get_rank() == 0:
            print(f"step {step + 1:3d}  copy 0  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
