"""Lightning: a strategy, and the module as it was.

torchrun --nproc-per-node 2 examples/lightning_fit.py
"""

import os

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autoshard.integrations.lightning import AutoshardStrategy


class Model(nn.Module):
    """Tokens to logits, through PyTorch's own transformer layers."""

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


class Module(pl.LightningModule):
    """Its one child with parameters is what the strategy splits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """One step."""
        loss = self.model(batch)
        if index % 5 == 4 and self.trainer.is_global_zero:
            print(f"step {index + 1:3d}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called after the split: these are the split parameters."""
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


def main() -> None:
    """Ranks read the same batches: Lightning's sampler asks the strategy."""
    pl.seed_everything(0)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        strategy=AutoshardStrategy(tp=ranks, degree="max"), devices=ranks, max_steps=20,
        accelerator="gpu" if torch.cuda.is_available() else "cpu", gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(torch.randint(500, (80, 32)), batch_size=4))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
