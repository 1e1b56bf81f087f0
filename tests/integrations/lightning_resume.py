"""Training runs for test_lightning.py that need processes of their own: one that is killed, and two ranks."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support import define_torchvision_operators

define_torchvision_operators()

import lightning.pytorch as lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from manifold_mixup.integrations.lightning import ManifoldMixupCallback  # noqa: E402

STEPS_PER_EPOCH, EPOCHS, SAVED, KILLED = 6, 3, 8, 10  # killed in the second epoch, after the last checkpoint
LAYERS = ["input", "first", "second"]


class ResumableLoader(DataLoader):
    """A DataLoader that can go on in mid-epoch: which epoch it is, and how many of its batches were handed out."""

    epoch = position = 0

    def __iter__(self):
        self.generator.manual_seed(self.epoch)
        skip = self.position
        for i, batch in enumerate(super().__iter__()):
            if i < skip:
                continue
            self.epoch, self.position = (self.epoch, i + 1) if i + 1 < len(self) else (self.epoch + 1, 0)
            yield batch

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, 3)
        self.double()

    def forward(self, x):
        # A layer of S lies in the midst of what is recomputed.
        return self.head(checkpoint(lambda x: self.second(self.first(x)), x, use_reentrant=False))

    def training_step(self, batch):
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Recorder(lightning.Callback):
    """Notes what was drawn in every step; kills the process in the middle of one."""

    def __init__(self, mixing: ManifoldMixupCallback, kill_at: int | None = None) -> None:
        self.mixing, self.kill_at, self.draws = mixing, kill_at, {}

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, *_):
        last = self.mixing.mixup.last
        self.draws[trainer.global_step] = (last.layer, last.lam)


def loader(rank: int = 0) -> ResumableLoader:
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(STEPS_PER_EPOCH * 8, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (len(x),), generator=generator)
    return ResumableLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=torch.Generator())


def run(
    folder: Path,
    *,
    kill_at: int | None = None,
    stop_at: int = EPOCHS * STEPS_PER_EPOCH,
    resume: bool = False,
    **trainer,
):
    """Train, and save a checkpoint every two steps; returns the module and the draws by step."""
    mixing = ManifoldMixupCallback(alpha=1.0, layers=LAYERS, seed=5)
    recorder = Recorder(mixing, kill_at)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    runner = lightning.Trainer(
        accelerator="cpu",
        max_steps=stop_at,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[mixing, recorder, saving],
        **trainer,
    )
    module = Classifier()
    path = folder / f"step={SAVED}.ckpt" if resume else None
    runner.fit(module, loader(runner.global_rank), ckpt_path=path)
    return module, recorder.draws, runner.global_rank


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if mode == "killed":
        run(folder, kill_at=KILLED)
    else:
        ranks = {"strategy": "ddp", "devices": 2}
        module, draws, rank = run(folder, **ranks)
        again, resumed, _ = run(folder, resume=True, **ranks)
        result = {"draws": draws, "weights": module.state_dict(), "resumed": resumed, "again": again.state_dict()}
        torch.save(result, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
