"""--train: finetune with fake quantizers, export INT8, judge every form and write the report."""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swinq import console, distributed
from swinq.calib.calibrate import Calibration, measure_residual
from swinq.commands.best import best_path, keep_best, load_best
from swinq.commands.calib import Outcome, calibration_sample, conclude, find_ranges
from swinq.commands.judging import Judging
from swinq.commands.session import RankImages, Session, load_model, weights_of
from swinq.commands.teacher import distillation
from swinq.config import Config, leaves, under
from swinq.data.augment import Augmented, train_transform
from swinq.data.dataset import ImageDataset, Transform
from swinq.data.mixing import Mixing
from swinq.data.order import StepOrder
from swinq.data.sampling import sample_digest
from swinq.errors import ConfigError, DataError
from swinq.export.integrity import digest
from swinq.int8.choice import IntegerModel
from swinq.models.layers import SwinBase
from swinq.quant.insert import quantize_model, set_int8_mode
from swinq.quant.spec import QuantSpec
from swinq.report.schema import TrainingPoint, TrainingSummary, ValidationPoint
from swinq.train.distill import Distillation
from swinq.train.graphs import can_capture
from swinq.train.job import require_same_job
from swinq.train.monitor import Monitor
from swinq.train.parallel import is_sharded
from swinq.train.qat import Progress, StoppedError, Surroundings, train
from swinq.train.ranges import learners
from swinq.train.settings import Settings
from swinq.train.state import CheckpointFolder

REFERENCE_BATCH = 512  # QAT.LR is stated for this many images a step, as Swin's rates are
# What a resumed job must share with the one that wrote its checkpoint, beside its settings
DECISIVE = ("AUG", "MODEL.LABEL_SMOOTHING", "DATA.INTERPOLATION", "EVAL", "TEST.CROP", "INT8.MODE")
METHOD = ("QUANT", "CALIB.METHOD", "CALIB.PERCENTILE")  # a calibrated checkpoint has its own
SAMPLE = ("CALIB.NUM_BATCHES", "CALIB.BATCH_SIZE", "CALIB.SEED")


def run(config: Config) -> int:
    """Run the whole of --train; every rank trains, rank 0 writes."""
    if config.QAT.DETERMINISTIC:
        _require_determinism()
    session = Session.open(config, "train")
    session.spare_what_is_read(
        session.trained_path(), best_path(session), teacher=config.QAT.DISTILL.TEACHER
    )
    with _checkpoints(session).alone():
        return _train(session)


def _train(session: Session) -> int:
    """Train, export and report."""
    config = session.config
    given = load_model(session)
    if isinstance(given, IntegerModel):
        raise ConfigError(
            f"{weights_of(config)} is an exported INT8 checkpoint; its float weights are gone",
            "train from the float or calibrated checkpoint it was made from",
        )
    images, val = session.dataset("train", given), session.dataset("val", given)
    for split in (images, val):
        if not split.labelled:
            raise DataError(
                f"{split.description} has no labels",
                "training needs {train,val}/<class>/<image>; loose images serve for calibration",
            )
    calibrated = hasattr(given, "quant_spec")
    if calibrated:
        _require_own_ranges(config)
        if "QAT.LEARN_RANGES" not in config.origins:
            kinds = ", ".join(config.QAT.LEARN_RANGES) or "none"
            console.say(f"note: a calibrated file does not say which ranges learn; now: {kinds}")
    float_model = load_model(session, ranges=False) if calibrated else given
    settings = settings_of(config, session.device)
    around = _surroundings(session, settings, given, float_model, images, val)  # refuses early
    spec = None if calibrated else QuantSpec.from_config(config.QUANT)
    _require_trainable(config, settings, given, spec)
    if distributed.is_main() and (newest := around.folder.peek()):
        require_same_job(*newest, around.job(settings))
    session.begin()  # not before: the configuration of a job stays when another is refused
    quantized, sample, seconds = given, calibration_sample(session, images), 0.0
    if spec is not None:
        quantized, sample, seconds = find_ranges(session, spec, given, images)
    set_int8_mode(quantized, config.INT8.MODE)
    before = {name: tensor.clone().cpu() for name, tensor in quantized.state_dict().items()}
    try:
        with around.monitor:
            progress = train(quantized, around, settings)
    except StoppedError as stopped:
        console.say(str(stopped), "warning")
        return stopped.code
    calibration = (sample, seconds)
    best = load_best(session, quantized, before, progress)
    outcome = _finish(
        session, float_model, quantized, (before, best), progress, calibration, (images, val)
    )
    outcome = replace(outcome, training=_summary(session, settings, progress, images))
    if distributed.is_main():
        from swinq.commands import report  # matplotlib takes a second that other ranks save

        report.write(session, outcome)
    return 0


def _checkpoints(session: Session) -> CheckpointFolder:
    return CheckpointFolder(session.training_folder, keep=session.config.QAT.KEEP)


def settings_of(config: Config, device: torch.device) -> Settings:
    """What a configuration tells the training job."""
    qat, trained = config.QAT, config.TRAIN
    distill, ranks, on_gpu = qat.DISTILL, distributed.world_size(), device.type == "cuda"
    step = config.DATA.BATCH_SIZE * trained.ACCUMULATION_STEPS * ranks
    compiled = qat.COMPILE == "yes" or (qat.COMPILE == "auto" and on_gpu)
    sharded = is_sharded(qat.PARALLEL)
    return Settings(
        epochs=qat.EPOCHS,
        seed=config.SEED,
        batch=config.DATA.BATCH_SIZE,
        accumulation=trained.ACCUMULATION_STEPS,
        rate=qat.LR * step / REFERENCE_BATCH,
        warmup=qat.WARMUP,
        min_rate=qat.MIN_LR,
        weight_decay=trained.WEIGHT_DECAY,
        betas=tuple(trained.OPTIMIZER.BETAS),
        eps=trained.OPTIMIZER.EPS,
        clip=trained.CLIP_GRAD,
        learned=tuple(qat.LEARN_RANGES),
        range_rate=qat.RANGE_LR,
        fix_ranges=qat.FIX_RANGES,
        ema=qat.EMA,
        amp=qat.AMP_TYPE if config.AMP_ENABLE and on_gpu else "fp32",
        drop_path=config.MODEL.DROP_PATH_RATE,
        checkpointing=trained.USE_CHECKPOINT,
        compile_blocks=compiled,
        cuda_graphs=qat.CUDA_GRAPHS
        and compiled  # else the GPU is the limit, not the host
        and can_capture(device, checkpointing=trained.USE_CHECKPOINT, sharded=sharded),
        parallel=qat.PARALLEL,
        deterministic=qat.DETERMINISTIC,
        eval_epochs=qat.EVAL_EPOCHS,
        save_steps=qat.SAVE_STEPS,
        print_steps=config.PRINT_FREQ,
        distill=distill.SCALE if distill.ENABLED else 0.0,
        labels=distill.LABEL_SCALE if distill.ENABLED else 1.0,
        temperature=distill.TEMPERATURE,
        features=distill.FEATURES if distill.ENABLED else 0.0,
    )


def _require_determinism() -> None:
    """Only kernels that give the same bits again; the rest raise an error that names them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _require_trainable(
    config: Config, settings: Settings, given: nn.Module, spec: QuantSpec | None
) -> None:
    """Refuse kinds of ranges that the recipe does not have, before any range is found.

    Args:
        spec: how a float model will be quantized; None of one that is.
    """
    quantized = given if spec is None else quantize_model(copy.deepcopy(given), spec)
    learners(set_int8_mode(quantized, config.INT8.MODE), settings.learned)


def _require_own_ranges(config: Config) -> None:
    """Refuse to be told how ranges are to be found where the checkpoint has them."""
    for key, origin in config.origins.items():
        typed = origin.startswith(("--", "recipe "))
        if typed and any(under(key, section) for section in METHOD):
            raise ConfigError(
                f"{origin} states {key}, but {weights_of(config)} was calibrated with its own",
                "leave it out, or train from the float checkpoint",
            )


def _surroundings(
    session: Session,
    settings: Settings,
    given: SwinBase,
    float_model: nn.Module,
    images: ImageDataset,
    val: ImageDataset,
) -> Surroundings:
    """Everything around the loop.

    Raises:
        ConfigError: too few images for a step, an odd batch to be mixed, an augmentation that timm
            refuses, or a teacher that does not fit.
    """
    config = session.config
    augmented = Augmented(images.with_transform(_augmentation(session, given)), config.SEED)
    mixing = _mixing(config, given.arch.num_classes)
    mixing.check_batch(settings.batch)
    micro_batches = settings.accumulation * distributed.world_size()
    steps = StepOrder(len(augmented), settings.batch, micro_batches, config.SEED).steps_per_epoch
    taught = distillation(session, settings, float_model, images)

    def judge(model: nn.Module) -> float:
        return session.predictions(model, val, "validating").scores().top1_percent

    return Surroundings(
        images=augmented,
        mixing=mixing,
        distillation=taught,
        workers=session.workers,
        device=session.device,
        folder=_checkpoints(session),
        monitor=Monitor(
            session.folder / "tensorboard" / "training" if config.REPORT.TENSORBOARD else None,
            total_steps=settings.epochs * steps,
            steps_per_epoch=steps,
            images_per_step=settings.batch * micro_batches,
            print_every=settings.print_steps,
            world=distributed.world_size(),
            eval_epochs=settings.eval_epochs,
        ),
        identity={
            **_identity(config, given, taught),
            "training images": images.all_names_digest[:16],
            "validation images": val.all_names_digest[:16],
        },
        judge=judge,
        keep=partial(keep_best, session),
    )


def _augmentation(session: Session, model: SwinBase) -> Transform:
    """The official augmentation of training images."""
    config, aug = session.config, session.config.AUG
    transform = session.transform(model)
    return train_transform(
        model.arch.img_size,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT,
        reprob=aug.REPROB,
        remode=aug.REMODE,
        recount=aug.RECOUNT,
        interpolation=config.DATA.INTERPOLATION,
        hflip=0.0 if config.DATA.DATA_PATH == "digits" else 0.5,  # a mirrored 2 is no 2
        mean=transform.mean,
        std=transform.std,
        squash=transform.crop is None and model.arch.img_size <= 32,
    )


def _mixing(config: Config, classes: int) -> Mixing:
    aug = config.AUG
    return Mixing(
        classes,
        mixup=aug.MIXUP,
        cutmix=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        seed=config.SEED,
    )


def _identity(config: Config, given: nn.Module, taught: Distillation | None) -> dict[str, Any]:
    """What tells this job from others that might share its folder, plain JSON.

    Of a float checkpoint it is what finds the ranges, not the ranges: another GPU may find them
    a bit differently, and a resumed job has those that it began with.
    """
    found = () if hasattr(given, "quant_spec") else (*METHOD, *SAMPLE)
    stated = {
        key: value
        for key, value in leaves(config)
        if any(under(key, section) for section in (*DECISIVE, *found))
    }
    teacher = {} if taught is None else {"teacher": _digest(taught.teacher)}
    return {"start": _digest(given), **teacher, **stated}


def _digest(model: nn.Module) -> str:
    """Changes with any tensor of a model."""
    start = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        start.update(f"{name} {digest(tensor)}\n".encode())
    return start.hexdigest()[:16]


def _finish(
    session: Session,
    float_model: nn.Module,
    quantized: SwinBase,
    states: tuple[dict[str, Tensor], dict[str, Tensor]],
    progress: Progress,
    calibrated: tuple[list[int], float],
    images: tuple[ImageDataset, ImageDataset],
) -> Outcome:
    """Export the best model and judge it beside the float one and the one before training.

    Args:
        states: of the model before training, and of the best. progress: says which step's that is.
    """
    (before, best), sample, train_images = states, calibrated[0], images[0]
    found: Calibration = quantized.calibration  # type: ignore[assignment]
    quantized.load_state_dict(best)
    found.residual_max = measure_residual(quantized, RankImages(session, train_images, sample))
    if not found.sample_sha256:
        found.sample_sha256 = sample_digest(train_images, sample)

    def judge(judging: Judging) -> None:
        mode = session.config.INT8.MODE
        quantized.load_state_dict(before)
        judging.add(f"fake-quant mode {mode}", "fake-quant", mode, quantized)
        quantized.load_state_dict(best)
        judging.add(f"QAT fake-quant mode {mode}", "fake-quant", mode, quantized)

    path = session.trained_path()
    earlier = getattr(quantized, "judged", None)  # of the file that the job began with
    step = progress.best_step or (earlier[0] if earlier else 0)
    judged = (step, progress.best_top1)
    return conclude(session, path, float_model, quantized, calibrated, images, judge, judged)


def _summary(
    session: Session, settings: Settings, progress: Progress, images: ImageDataset
) -> TrainingSummary:
    """What the report tells of the training."""
    distill = session.config.QAT.DISTILL
    per_step = settings.batch * settings.accumulation * distributed.world_size()
    steps = settings.epochs * (len(images) // per_step)
    return TrainingSummary(
        source=images.description,
        images=len(images),
        epochs=settings.epochs,
        steps=steps,
        images_per_step=per_step,
        seconds=progress.seconds,
        images_per_second=steps * per_step / progress.seconds if progress.seconds else 0.0,
        precision=settings.amp,
        rate=settings.rate,
        range_rate=settings.range_rate,
        learned_ranges=list(settings.learned),
        teacher=(distill.TEACHER or "the float model") if distill.ENABLED else "",
        label_scale=settings.labels,
        best_step=progress.best_step,
        curve=[TrainingPoint(*point) for point in progress.curve],
        validations=[ValidationPoint(*point) for point in progress.judged],
    )
