"""Lightning's DDP. It starts the ranks by itself.

python examples/lightning_ddp.py

- return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1)
+ return pylo_dist.AdafacLO(self.named_parameters(), weights="demo")

ZeRO-2 instead:

- return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1)
+ return pylo_dist.ZeroOptimizer(self, pylo_dist.AdafacLO, stage=2, weights="demo")
- Trainer(strategy="ddp", ...)
+ Trainer(strategy=pylo_dist.lightning.ZeroStrategy(), ...)
"""

import lightning
import tiny
from torch.utils.data import DataLoader

import pylo_dist


class Counter(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.GPT()

    def training_step(self, batch, index):
        loss = self.model(**batch)["loss"]
        if index % 20 == 19:
            self.print(f"step {index + 1}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return pylo_dist.AdafacLO(self.named_parameters(), weights="demo")


if __name__ == "__main__":
    samples = [
        {name: ids[0] for name, ids in batch.items()} for batch in tiny.batches(steps=1280, size=1)
    ]
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Counter(), DataLoader(samples, batch_size=16))
