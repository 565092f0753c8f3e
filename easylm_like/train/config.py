"""Everything a training run can be told; configs/NAME.py fills it in and `--config.x.y=z` overrides it."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter

from easylm_like.data.dataset import TooLong
from easylm_like.errors import UserError
from easylm_like.model.config import Attention, Compute, LlamaConfig, Remat
from easylm_like.model.partition import MeshConfig

DTYPES = ("float32", "bfloat16")  # what weights, activations and moments can be kept in


class Schedule(StrEnum):
    """How the learning rate goes on after its linear warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "wsd"  # constant, then linear over the last decay_steps (warmup-stable-decay, arXiv 2404.06395)


class Optimizer(StrEnum):
    """What turns gradients into updates."""

    ADAMW = "adamw"  # arXiv 1711.05101
    ADAFACTOR = "adafactor"  # arXiv 1804.04235
    LION = "lion"  # arXiv 2302.06675
    MUON = "muon"  # kellerjordan.github.io/posts/muon, with AdamW for embedding, head, norms and biases


class Damaged(StrEnum):
    """What to do when files of the checkpoint to go on from are missing or changed."""

    STOP = "stop"
    PREVIOUS = "previous"  # go on from the newest one that is whole; the others are set aside


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """What is trained on. `row_length` counts (input, target) pairs; conversations are packed into such rows."""

    train: str = ""  # conversations, JSONL
    heldout: str = ""  # conversations whose loss is watched; may be empty
    tokenizer: str = ""  # folder with tokenizer.json, or a SentencePiece model; empty: model.init_from's
    template: str = "koala"
    row_length: int = 2048
    max_records: int = 0  # in a row, 0: any number; cuDNN's attention takes memory for each, see docs/training.md
    too_long: TooLong = TooLong.CUT


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Where the weights come from: `init_from`, or random ones of `shape` (a preset or your own); and how to compute.

    `init_from` is the work directory of another run, one of its checkpoints (WORKDIR/checkpoints/STEP) or a Hugging
    Face folder, see train/start.py. The other fields are those of model.config.Compute.
    """

    init_from: str = ""
    shape: LlamaConfig | None = None
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    attention: Attention = Attention.AUTO
    scan_layers: bool = True
    remat: Remat = Remat.MATMULS
    dropout: float = 0.0
    forget: float = 0.0

    def compute(self) -> Compute:
        """Return these settings as the model takes them; `attention` may still be AUTO."""
        return Compute(
            dtype=self.compute_dtype,
            param_dtype=self.param_dtype,
            attention=self.attention,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dropout=self.dropout,
            forget=self.forget,
        )


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """The optimizer, clipping by the global norm, and what is added to the loss; Vicuna's and Alpaca's by default.

    `moment_dtype` is how the optimizer's moments are kept between steps; they are computed in fp32. `decay_steps`
    belongs to the schedule wsd. `skip_spikes` 6 takes no step where the loss or the gradient's norm is more than 6
    standard deviations above its mean of the last 128 steps (train/spikes.py); 0 takes every step.
    """

    optimizer: Optimizer = Optimizer.ADAMW
    learning_rate: float = 2e-5
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = 0
    decay_steps: int = 0
    final_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    moment_dtype: str = "float32"
    z_loss: float = 0.0
    skip_spikes: float = 0.0


@dataclass(slots=True, kw_only=True)
class LogConfig:
    """Where numbers go beside WORKDIR/train.log and metrics.jsonl, and what the devices can do at best.

    `peak_tflops` is one device's peak in 10^12 FLOP/s, for the MFU on devices that the log does not know; 0: unknown.
    """

    tensorboard: bool = False  # WORKDIR/tensorboard/
    wandb_project: str = ""
    peak_tflops: float = 0.0


@dataclass(slots=True, kw_only=True)
class SampleConfig:
    """Questions that are answered, greedily and under each marker, whenever the held-out loss is measured."""

    prompts: tuple[str, ...] = ()
    max_new: int = 64  # tokens of an answer, at most


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    """`--config.profile.steps=10,13` traces steps 10, 11 and 12 into WORKDIR/profile/, for TensorBoard or Perfetto."""

    steps: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """A training run. `batch_size` is in rows over all devices; `micro_batches` splits it in time, not in result.

    The checkpoints that stay are the last `keep_checkpoints`, the `keep_best` with the lowest held-out loss, and those
    of every `milestone_every` steps.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    steps: int = 1000
    batch_size: int = 128
    micro_batches: int = 1
    seed: int = 0
    log_every: int = 10
    heldout_every: int = 0  # 0: only before the first and after the last step
    checkpoint_every: int = 0  # 0: only after the last step
    keep_checkpoints: int = 2
    keep_best: int = 0
    milestone_every: int = 0  # 0: no milestones
    damaged: Damaged = Damaged.STOP
    compilation_cache: str = "~/.cache/easylm_like"  # for compiled programs, not on CPUs; empty: none


def check_run(config: RunConfig) -> None:
    """Raise a UserError for what can be seen to be wrong before anything is loaded."""
    if not config.data.train:
        raise UserError("config.data.train is empty; give the train.jsonl that python -m data_prep build wrote")
    if bool(config.model.init_from) == (config.model.shape is not None):
        raise UserError("give either config.model.init_from (a folder to start from) or config.model.shape, not both")
    if not config.data.tokenizer and not config.model.init_from:
        raise UserError("config.data.tokenizer is empty and there is no config.model.init_from to take one from")
    for name, least in (
        ("steps", 1),
        ("batch_size", 1),
        ("micro_batches", 1),
        ("log_every", 1),
        ("keep_checkpoints", 1),
        ("samples.max_new", 1),
    ):
        if (value := attrgetter(name)(config)) < least:
            raise UserError(f"config.{name} must be at least {least}, got {value}")
    _check_intervals(config)
    _check_model(config.model)
    _check_optim(config.optim)
    if config.log.peak_tflops < 0:
        raise UserError(f"config.log.peak_tflops must be 0 (unknown) or more, got {config.log.peak_tflops}")
    _check_profile(config.profile.steps, config.steps)
    if config.data.row_length < 2:
        raise UserError(f"config.data.row_length must be at least 2, got {config.data.row_length}")
    if config.data.max_records < 0:
        raise UserError(f"config.data.max_records must be 0 (any number) or more, got {config.data.max_records}")


def _check_intervals(config: RunConfig) -> None:
    for name, zero in (
        ("heldout_every", "only at the end"),
        ("checkpoint_every", "only at the end"),
        ("keep_best", "none"),
        ("milestone_every", "none"),
    ):
        if getattr(config, name) < 0:
            raise UserError(f"config.{name} must be 0 ({zero}) or more, got {getattr(config, name)}")
    if config.keep_best and not config.data.heldout:
        raise UserError("config.keep_best is by the held-out loss; give config.data.heldout, or leave keep_best out")
    every = config.checkpoint_every
    if config.milestone_every and (not every or config.milestone_every % every):
        raise UserError(
            f"config.milestone_every {config.milestone_every} must be a multiple of config.checkpoint_every {every}: "
            "milestones are checkpoints that stay"
        )


def _check_model(model: ModelConfig) -> None:
    for name in ("param_dtype", "compute_dtype"):
        _check_dtype(f"model.{name}", getattr(model, name))
    model.compute().check()


def _check_optim(optim: OptimConfig) -> None:
    _check_dtype("optim.moment_dtype", optim.moment_dtype)
    for name in ("learning_rate", "final_learning_rate", "weight_decay", "z_loss", "decay_steps", "skip_spikes"):
        if not 0 <= getattr(optim, name) < math.inf:  # no NaN either
            raise UserError(f"config.optim.{name} must be a number from 0 on, got {getattr(optim, name)}")
    for name in ("clip_norm", "eps"):  # 1e9 never clips; a weight without gradient is divided by eps
        if not 0 < getattr(optim, name) < math.inf:
            raise UserError(f"config.optim.{name} must be a number above 0, got {getattr(optim, name)}")
    if optim.final_learning_rate > optim.learning_rate:
        raise UserError(
            f"config.optim.final_learning_rate {optim.final_learning_rate} must not be above learning_rate "
            f"{optim.learning_rate}"
        )
    if not (0 <= optim.beta1 < 1 and 0 <= optim.beta2 < 1):
        raise UserError(
            f"config.optim.beta1 and beta2 must be at least 0 and below 1, got {optim.beta1}, {optim.beta2}"
        )


def _check_dtype(name: str, value: str) -> None:
    if value not in DTYPES:
        why = "; it would need its loss scaled, which is not done here" if value == "float16" else ""
        raise UserError(f"config.{name} must be one of {', '.join(DTYPES)}, got {value!r}{why}")


def _check_profile(steps: tuple[int, ...], last: int) -> None:
    if steps and not (len(steps) == 2 and all(isinstance(step, int) for step in steps)):
        raise UserError(f"config.profile.steps must be two whole numbers, as 10,13 is; got {steps}")
    if steps and not 1 <= steps[0] < steps[1] <= last + 1:
        raise UserError(
            f"config.profile.steps={steps[0]},{steps[1]} traces the steps from the first number to before the second; "
            f"they must rise and lie in the run, from 1 to {last + 1}"
        )


def check_batch(config: RunConfig, mesh_shape: dict[str, int]) -> None:
    """Raise a UserError if a micro-batch does not divide by the devices that share it."""
    devices = mesh_shape["replica"] * mesh_shape["fsdp"]
    unit = devices * config.micro_batches
    if config.batch_size % unit:
        nearest = max(config.batch_size // unit, 1) * unit
        raise UserError(
            f"batch_size {config.batch_size} must be a multiple of {unit} (mesh replica x fsdp = {devices} devices, "
            f"{config.micro_batches} micro-batches); try --config.batch_size={nearest}"
        )
    if config.data.row_length % mesh_shape["sequence"]:
        raise UserError(
            f"data.row_length {config.data.row_length} must be a multiple of mesh.sequence {mesh_shape['sequence']}"
        )
