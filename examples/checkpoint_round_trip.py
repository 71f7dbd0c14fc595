"""What two ranks saved, one rank and the plain model go on from.

torchrun --nproc-per-node 2 examples/checkpoint_round_trip.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autoshard


class Model(nn.Module):
    """Tokens to a loss, through PyTorch's own transformer layers."""

    def __init__(self, words: int = 500, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of telling each token from itself."""
        logits = self.head(self.layers(self.embed(tokens)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int) -> list:
    """An ordinary loop."""
    losses = []
    for _ in range(steps):
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Four steps split, saved; two more split, and two more from the files on one process."""
    torch.manual_seed(0)
    plain, tokens = Model(), torch.randint(500, (4, 32))
    tp = int(os.environ.get("WORLD_SIZE", "1"))
    model = autoshard.parallelize(plain, tp, (tokens,), degree="max")
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, tokens, 4)

    folder = [tempfile.mkdtemp()]  # one for all ranks
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    autoshard.save(folder[0], model, optimizer, {"step": 4})
    split = train(model, optimizer, tokens, 2)

    plain = plain.to(device)  # every rank by itself, whole
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    step = autoshard.load(folder[0], plain, optimizer)["step"]
    whole = train(plain, optimizer, tokens, 2)
    if int(os.environ.get("RANK", "0")) == 0:
        for number, (a, b) in enumerate(zip(split, whole, strict=True), start=step + 1):
            print(f"step {number}  loss {a:.6f} split, {b:.6f} whole")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
