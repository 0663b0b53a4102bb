"""Ray Train's TorchTrainer, ZeRO-2 on its workers. If one dies, all are started again and go on
from the newest checkpoint.

    python examples/ray_train.py [FOLDER]

On several machines FOLDER is one that all of them see.

    - model = ray.train.torch.prepare_model(model)
    - optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    + optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, stage=2, weights="demo")
"""

import sys
from pathlib import Path

import ray.train
import tiny
import torch
from ray.train.torch import TorchTrainer

import pylo_dist


def train(config: dict[str, str]) -> None:
    folder, rank = config["folder"], ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model = tiny.GPT()
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, stage=2, weights="demo")
    run = {"model": model, "optimizer": optimizer}
    published = pylo_dist.checkpoint.published(folder)
    done = pylo_dist.checkpoint.load(published[-1], run)[1]["step"] if published else 0
    for step, batch in enumerate(tiny.batches(steps=40, rank=rank), 1):
        if step <= done:
            continue
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            pylo_dist.checkpoint.save(f"{folder}/step-{step:08d}", run, meta={"step": step})
            ray.train.report({"step": step, "loss": loss.item()})
            if rank == 0:
                print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ray").resolve()
    trainer = TorchTrainer(
        train,
        train_loop_config={"folder": str(folder / "checkpoints")},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    trainer.fit()
