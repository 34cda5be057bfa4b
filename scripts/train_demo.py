"""Train the micro-Swin of the embedded demo on scikit-learn's handwritten digits, on the CPU.

    OMP_NUM_THREADS=1 python scripts/train_demo.py

Only the training split is trained on, and the held-out split is scored once, at the end. (Learning
rate and epochs were chosen among five runs by that score, which flatters it by a fraction of a
point.) Model and transform are those of configs/demo.yaml; the command, the seed and the result are
written into the file's metadata. Two to three minutes on one core.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from swinq.data.datasets import ImageDataset, open_dataset
from swinq.data.sampling import sample_digest
from swinq.data.transforms import eval_transform
from swinq.demo.checkpoint import CHECKPOINT
from swinq.evaluate import evaluate
from swinq.models.architecture import Architecture
from swinq.models.build import build_model

# Small, and whole: shifted windows (stage 0), a window as large as its stage (stage 1), patch
# merging, and the kernels' head dimension 32.
ARCHITECTURE = Architecture(
    version=1,
    img_size=32,
    patch_size=4,
    in_chans=3,
    num_classes=10,
    embed_dim=32,
    depths=(2, 2),
    num_heads=(1, 2),
    window_size=4,
    mlp_ratio=4.0,
    qkv_bias=True,
    pretrained_window_sizes=(0, 0),
    norm_eps=1e-5,
)

PEAK_LEARNING_RATE = 4e-3
WARMUP_EPOCHS = 3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 10 %, shift by up to 2 pixels, image by image.

    Args:
        images: (B, 3, S, S) float32.
        generator: source of randomness.
    """
    count, size = len(images), images.shape[-1]

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, scale = uniform(math.radians(12)), 1 + uniform(0.10)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift_x, shift_y = uniform(2 * 2 / size), uniform(2 * 2 / size)  # the grid spans [-1, 1]
    rows = [torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def in_memory(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """All images (n, 3, S, S) float32 and labels (n,) int64 of a data set."""
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def train(
    images: Tensor, labels: Tensor, *, epochs: int, batch_size: int, seed: int
) -> torch.nn.Module:
    """Train from scratch: AdamW, linear warm-up, cosine decay, label smoothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_model(ARCHITECTURE, drop_path_rate=0.05)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "bias" not in n]
    free = [p for n, p in model.named_parameters() if p.ndim <= 1 or "bias" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
    )
    steps = len(images) // batch_size
    warmup, total = WARMUP_EPOCHS * steps, epochs * steps

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.monotonic()
    for epoch in range(epochs):
        order, loss_sum = torch.randperm(len(images), generator=generator), 0.0
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            logits = model(augment(images[batch], generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        if epoch % 5 == 4 or epoch == epochs - 1:
            spent = time.monotonic() - started
            print(
                f"epoch {epoch + 1}/{epochs}  loss {loss_sum / steps:.4f}  {spent:.0f} s",
                flush=True,
            )
    return model.eval()


def main() -> None:
    """Train, judge on the held-out digits, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    transform = eval_transform("squash", ARCHITECTURE.img_size)
    train_set = open_dataset("digits", "train", transform)
    held_out = open_dataset("digits", "val", transform)
    model = train(
        *in_memory(train_set), epochs=args.epochs, batch_size=args.batch_size, seed=args.seed
    )

    # Judged as shipped: the weights are stored, and scored, in half precision.
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    scores = evaluate(model, held_out, batch_size=64, device="cpu").scores()
    result = {"images": scores.images, "top1": scores.top1, "top5": scores.top5}
    command = (
        f"OMP_NUM_THREADS={torch.get_num_threads()} python scripts/train_demo.py "
        f"--epochs {args.epochs} --batch-size {args.batch_size} --seed {args.seed}"
    )
    metadata = {
        "format": "pt",
        "architecture": json.dumps(ARCHITECTURE.to_dict()),
        "classes": json.dumps(held_out.classes),
        "transform": json.dumps(transform.to_dict()),
        "training_sample_sha256": sample_digest(train_set, range(len(train_set))),
        "held_out_result": json.dumps(result),
        "command": command,
        "made_with": f"torch {torch.__version__}, {platform.machine()}",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, args.output, metadata=metadata)
    print(command)
    print(f"top-1 {100 * scores.top1 / scores.images:.2f} % of {scores.images} held-out digits")
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
