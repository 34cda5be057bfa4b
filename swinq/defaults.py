"""Every configuration key and its default; config.py reads files and flags into a tree of these.

The keys of the official Swin files keep their names, so those files load as they are. What a value
may be is in schema.py.
"""

from __future__ import annotations

from typing import Any

RECIPE_SECTIONS = ("QUANT", "CALIB", "INT8", "QAT")

_SWIN = {
    "PATCH_SIZE": 4,
    "IN_CHANS": 3,
    "EMBED_DIM": 96,
    "DEPTHS": [2, 2, 6, 2],
    "NUM_HEADS": [3, 6, 12, 24],
    "WINDOW_SIZE": 7,
    "MLP_RATIO": 4.0,
    "QKV_BIAS": True,
    "APE": False,  # absolute position embedding: refused
    "PATCH_NORM": True,
}

DEFAULTS: dict[str, Any] = {
    "DATA": {
        "BATCH_SIZE": 64,  # images a step in evaluation and training, on each rank
        "DATA_PATH": "",
        "DATASET": "imagenet",
        "IMG_SIZE": 224,
        "INTERPOLATION": "bicubic",
        "ZIP_MODE": False,
        "CACHE_MODE": "part",
        "PIN_MEMORY": True,
        "NUM_WORKERS": -1,  # -1: as many as there are cores for this rank, at most 16
    },
    "MODEL": {
        "TYPE": "swin",
        "VERSION": 0,  # what --version claims: 1, 2, or 0 for no claim
        "NAME": "swin_tiny_patch4_window7_224",
        "PRETRAINED": "",
        "RESUME": "",
        "NUM_CLASSES": 1000,
        "DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
        "LABEL_SMOOTHING": 0.1,
        "SWIN": {**_SWIN, "QK_SCALE": None},
        "SWINV2": {**_SWIN, "PRETRAINED_WINDOW_SIZES": [0, 0, 0, 0]},
    },
    "QUANT": {
        "NAME": "int8",  # the recipe's name; a recipe file that has none is called by its own
        "WEIGHT": {"GRANULARITY": "per_channel"},
        # MIGRATION: exponents of the scale vector over input channels to choose from; [] = none
        "INPUT": {"GRANULARITY": "per_tensor", "MIGRATION": [0.25, 0.5, 0.75, 1.0]},
        "OUTPUT": {
            "GRANULARITY": "per_channel",
            "LAYERS": ["proj", "fc2", "reduction"],
            "POSITION": "after_bias",
            "HEADROOM": 1.1,
            "METHOD": "max",
        },
        "ATTENTION": {"PROBABILITIES": "row_max"},
        "BIAS_CORRECTION": True,
        "ALLOW_DEAD": [],  # patterns of layers whose tensors may be all zero
        "LAYERS": [],  # {PATTERN: "layers.3.*", PRECISION: fp16}, in order; the later one wins
    },
    "CALIB": {
        "NUM_BATCHES": 10,
        "BATCH_SIZE": 8,
        "SEED": 0,
        "METHOD": "percentile",
        "PERCENTILE": 99.99,
        "OUTPUT_PATH": "",  # where the calibrated and exported files go; empty: the run's folder
    },
    "INT8": {"MODE": 0},  # 1, 2, or 0: what the checkpoint says, and both when --calib exports
    "QAT": {
        "EPOCHS": 2,
        "LR": 1e-5,  # at 512 images a step over all ranks; scaled linearly with them
        "WARMUP": 0.05,  # share of all steps
        "MIN_LR": 0.01,  # share of LR that the cosine ends at
        "LEARN_RANGES": ["output"],  # kinds: input, weight, output, attention, probabilities
        "RANGE_LR": 1e-3,  # of a range's logarithm, so a relative step; not scaled with the batch
        "FIX_RANGES": 0.9,  # share of all steps after which learned ranges stay
        "EMA": 0.0,  # decay of the averaged weights at each step; 0 = no average
        "AMP_TYPE": "bf16",
        "COMPILE": "auto",  # yes, no, or auto: on CUDA
        "CUDA_GRAPHS": True,  # of what is compiled, unless checkpointed or sharded
        "PARALLEL": "ddp",  # or fsdp, which shards what does not fit a GPU
        "DETERMINISTIC": False,
        "SAVE_STEPS": 0,  # between training checkpoints; 0: so that they take 2 % of the time
        "KEEP": 2,  # training checkpoints; an older one serves where the newest is damaged
        "EVAL_EPOCHS": 1,
        "DISTILL": {
            "ENABLED": False,
            "TEACHER": "",  # a checkpoint; empty: the float model itself
            "SCALE": 1.0,  # of the distillation loss
            "LABEL_SCALE": 1.0,  # of the loss against the labels
            "TEMPERATURE": 3.0,
            "FEATURES": 0.0,  # of the mean squared error between the stages' outputs
        },
    },
    "EVAL": {"TRANSFORM": "official", "IMAGES": 0},  # IMAGES: a seeded sample; 0 = all
    "REPORT": {"SENSITIVITY_IMAGES": 16, "LATENCY_BATCH": 1, "TENSORBOARD": True},
    "TRAIN": {
        "START_EPOCH": 0,
        "EPOCHS": 300,
        "WARMUP_EPOCHS": 20,
        "WEIGHT_DECAY": 0.05,
        "BASE_LR": 5e-4,
        "WARMUP_LR": 5e-7,
        "MIN_LR": 5e-6,
        "CLIP_GRAD": 5.0,
        "AUTO_RESUME": True,
        "ACCUMULATION_STEPS": 1,
        "USE_CHECKPOINT": False,
        "LAYER_DECAY": 1.0,
        "LR_SCHEDULER": {
            "NAME": "cosine",
            "DECAY_EPOCHS": 30,
            "DECAY_RATE": 0.1,
            "WARMUP_PREFIX": True,
            "GAMMA": 0.1,
            "MULTISTEPS": [],
        },
        "OPTIMIZER": {"NAME": "adamw", "EPS": 1e-8, "BETAS": [0.9, 0.999], "MOMENTUM": 0.9},
    },
    "AUG": {
        "COLOR_JITTER": 0.4,
        "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
        "REPROB": 0.25,
        "REMODE": "pixel",
        "RECOUNT": 1,
        "MIXUP": 0.8,
        "CUTMIX": 1.0,
        "CUTMIX_MINMAX": None,
        "MIXUP_PROB": 1.0,
        "MIXUP_SWITCH_PROB": 0.5,
        "MIXUP_MODE": "batch",
    },
    "TEST": {"CROP": True, "SEQUENTIAL": False, "SHUFFLE": False},
    "DIST": {"TIMEOUT": 600},  # seconds a rank may keep the others waiting
    "AMP_ENABLE": True,
    "DEMO": False,
    "DEVICE": "auto",
    "ENGINE": "auto",  # what runs INT8: cuda (libswinq), reference, or auto: cuda where it can
    "OUTPUT": "output",
    "TAG": "default",
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 10,
    "SEED": 0,
}
