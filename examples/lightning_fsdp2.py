"""Lightning's FSDP2, with an optimizer that reads the loss, which the Trainer hands on by itself.

    python examples/lightning_fsdp2.py [WEIGHTS]

Without WEIGHTS Google's VeLO comes from the Hub.

    - return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1)
    + return pylo_dist.VeLO(self.named_parameters(), num_steps=40)
"""

import sys

import lightning
import tiny
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import pylo_dist


class Counter(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.GPT()

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch, index):
        loss = self.model(**batch)["loss"]
        if index % 20 == 19:
            self.print(f"step {index + 1}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        weights = {"weights": sys.argv[1]} if len(sys.argv) > 1 else {}
        return pylo_dist.VeLO(self.named_parameters(), num_steps=40, **weights)


if __name__ == "__main__":
    samples = [
        {name: ids[0] for name, ids in batch.items()} for batch in tiny.batches(steps=1280, size=1)
    ]
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Counter(), DataLoader(samples, batch_size=16))
