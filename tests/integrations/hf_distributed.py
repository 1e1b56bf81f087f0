"""Run by torchrun: two processes train, resume and compare what they drew and where they ended."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from support import define_torchvision_operators


def main(folder: Path) -> None:
    define_torchvision_operators()  # before transformers is imported
    torch.set_num_threads(1)

    from hf_by_hand import Draws, distance
    from hf_models import bert, sentences, trainer_of

    from manifold_mixup.integrations.transformers import ManifoldMixupCallback

    def train(output: Path, checkpoint: Path | None) -> tuple[torch.nn.Module, list[object]]:
        callback = ManifoldMixupCallback()
        draws, model = Draws(callback), bert()
        options = {"save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo"}
        trainer, _ = trainer_of(model, output, [callback, draws], sentences(), **options)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return model, draws.drawn

    whole, drawn = train(folder / "whole", None)
    everybody: list[object] = [None, None]
    dist.all_gather_object(everybody, drawn)
    assert all(mine != theirs for mine, theirs in zip(*everybody, strict=True))
    checkpoint = folder / "whole" / "checkpoint-2"
    dist.barrier()
    files = sorted(file.name for file in checkpoint.glob("manifold_mixup*"))
    assert files == ["manifold_mixup_0.safetensors", "manifold_mixup_1.safetensors"]
    part, again = train(folder / "part", checkpoint)
    assert again == drawn[2:], (again, drawn)
    assert distance(part, whole) == 0
    print("the ranks drew differently and resumed alike", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
