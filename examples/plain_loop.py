"""A training loop of one's own, with one line more.

torchrun --nproc-per-node 2 examples/plain_loop.py
"""

import os

import torch
import torch.distributed as dist
import transformers

import autoshard

STEPS = 20


def main() -> None:
    """A GPT-2 that learns four sequences by heart."""
    torch.manual_seed(0)  # every rank builds the same model, and draws the same batches
    config = transformers.GPT2Config(vocab_size=1000, n_embd=128, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(1000, (4, 64))

    # The one line more; starts the process group too, and puts the parameters on this rank's device.
    model = autoshard.parallelize(model, tp=int(os.environ.get("WORLD_SIZE", "1")), degree="max")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = tokens.to(next(model.parameters()).device)
    for step in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4 and int(os.environ.get("RANK", "0")) == 0:
            print(f"step {step + 1:3d}  loss {loss.item():.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
