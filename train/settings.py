"""What a training job is told: numbers that the configuration and the flags have settled."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# May differ when a job is resumed: they change what is seen or kept, or the last bits at most.
FREE = ("save_steps", "print_steps", "checkpointing", "compile_blocks", "cuda_graphs", "parallel")


@dataclass(frozen=True)
class Settings:
    """One QAT job.

    Attributes:
        epochs: over the training images. seed: of order, augmentation, mixing and drop path.
        batch: images of a micro-batch on one rank. accumulation: micro-batches of a step and rank.
        rate: the peak learning rate, for the batch of all ranks. warmup: share of all steps in
            which it rises. min_rate: what the cosine ends at, as a share of `rate`.
        weight_decay, betas, eps: of AdamW. clip: the largest norm of the weights' gradient; 0
            leaves it alone.
        learned: kinds of ranges that learn. range_rate: their peak rate, of log amax. fix_ranges:
            the share of all steps after which they stay.
        ema: decay of the weights' running average, which is then what is judged; 0 for none.
        amp: "bf16", "fp16" or "fp32", of the matrix products.
        drop_path: rate of the last block. checkpointing: recompute blocks in the backward.
        compile_blocks: torch.compile each block. cuda_graphs: replay each stage's kernels.
        parallel: "ddp" or "fsdp", with several ranks.
        deterministic: only kernels that give the same bits again, on a GPU too.
        eval_epochs: epochs between judgements. save_steps: steps between checkpoints; 0 finds the
            interval at which they cost little. print_steps: steps between lines.
        distill: weight of the teacher's loss, 0 for none. labels: weight of the labels' loss.
        temperature: of both softmaxes. features: weight of the loss on the stages' outputs.
    """

    epochs: int
    seed: int
    batch: int
    accumulation: int
    rate: float
    warmup: float
    min_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip: float
    learned: tuple[str, ...]
    range_rate: float
    fix_ranges: float
    ema: float
    amp: str
    drop_path: float
    checkpointing: bool
    compile_blocks: bool
    cuda_graphs: bool
    parallel: str
    deterministic: bool
    eval_epochs: int
    save_steps: int
    print_steps: int
    distill: float
    labels: float
    temperature: float
    features: float

    def decisive(self) -> dict[str, Any]:
        """What a resumed job must share with the one that wrote its checkpoint, as plain JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
