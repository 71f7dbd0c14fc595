"""Hugging Face's Trainer: another import, and the model split.

torchrun --nproc-per-node 2 examples/trainer.py
"""

import os
import tempfile

import torch
import transformers

import autoshard
from autoshard.integrations.trainer import Trainer  # in place of transformers.Trainer


def main() -> None:
    """Trains on made-up texts, evaluates, and writes what from_pretrained reads."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=1000, n_embd=128, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    texts = torch.randint(1000, (16, 64)).unbind()
    data = [{"input_ids": text, "labels": text} for text in texts]

    model = autoshard.parallelize(model, tp=int(os.environ.get("WORLD_SIZE", "1")), degree="max")

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=4, learning_rate=3e-3, max_steps=12,
            logging_steps=4, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:6])
        trainer.train()
        found = trainer.evaluate()
        trainer.save_model()
        if trainer.is_world_process_zero():
            plain = transformers.GPT2LMHeadModel.from_pretrained(folder)
            text = texts[0][None]
            with torch.no_grad():
                loss = plain(input_ids=text, labels=text).loss
            print(f"evaluated {found['eval_loss']:.4f}; the plain model read back, one text {loss:.4f}")
    trainer.end()


if __name__ == "__main__":
    main()
