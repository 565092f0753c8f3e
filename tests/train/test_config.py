"""What can be seen to be wrong with a run before anything is loaded."""

from collections.abc import Callable

import pytest

from easylm_like.errors import UserError
from easylm_like.train.config import RunConfig, check_batch, check_run


def test_the_tiny_run_is_right(new_config: Callable[[], RunConfig]) -> None:
    config = new_config()
    check_run(config)
    config.profile.steps = (8, 9)  # the last step alone
    check_run(config)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("data.train", "", "config.data.train is empty"),
        ("data.tokenizer", "", "config.data.tokenizer is empty and there is no config.model.init_from"),
        ("data.row_length", 1, "config.data.row_length must be at least 2, got 1"),
        ("model.shape", None, "either config.model.init_from .* or config.model.shape"),
        ("model.init_from", "runs/other", "either config.model.init_from .* or config.model.shape"),
        ("optim.clip_norm", 0.0, "config.optim.clip_norm must be a number above 0, got 0.0"),
        ("optim.eps", 0.0, "config.optim.eps must be a number above 0, got 0.0"),
        ("data.max_records", -1, "config.data.max_records must be 0"),
        ("optim.learning_rate", -1e-3, "config.optim.learning_rate must be a number from 0 on, got -0.001"),
        ("optim.learning_rate", float("nan"), "config.optim.learning_rate must be a number from 0 on, got nan"),
        ("optim.final_learning_rate", 1.0, "config.optim.final_learning_rate 1.0 must not be above learning_rate"),
        ("optim.beta2", 1.0, "beta1 and beta2 must be at least 0 and below 1, got 0.9, 1.0"),
        ("optim.z_loss", -1e-4, "config.optim.z_loss must be a number from 0 on, got -0.0001"),
        ("optim.decay_steps", -1, "config.optim.decay_steps must be a number from 0 on, got -1"),
        ("optim.moment_dtype", "bf16", "config.optim.moment_dtype must be one of float32, bfloat16, got 'bf16'$"),
        ("model.param_dtype", "float64", "config.model.param_dtype must be one of float32, bfloat16, got 'float64'$"),
        ("model.compute_dtype", "float16", "config.model.compute_dtype must be .*, got 'float16'; .*loss scaled"),
        ("model.dropout", 1.0, "dropout must be at least 0 and below 1, got 1.0"),
        ("model.forget", -0.1, "forget must be at least 0 and below 1, got -0.1"),
        ("log.peak_tflops", -1.0, r"config.log.peak_tflops must be 0 \(unknown\) or more, got -1.0"),
        ("profile.steps", (10,), r"config.profile.steps must be two whole numbers, as 10,13 is; got \(10,\)"),
        ("profile.steps", (1, 2, 3), r"must be two whole numbers, .*; got \(1, 2, 3\)"),
        ("profile.steps", ("",), r"must be two whole numbers, .*; got \('',\)"),
        ("profile.steps", (1.5, 3), r"must be two whole numbers, .*; got \(1.5, 3\)"),
        ("profile.steps", (3, 3), "config.profile.steps=3,3 traces .* must rise and lie in the run, from 1 to 9"),
        ("profile.steps", (0, 3), "must rise and lie in the run, from 1 to 9"),
        ("profile.steps", (8, 10), "must rise and lie in the run, from 1 to 9"),
        ("steps", 0, "config.steps must be at least 1, got 0"),
        ("batch_size", 0, "config.batch_size must be at least 1, got 0"),
        ("micro_batches", 0, "config.micro_batches must be at least 1, got 0"),
        ("log_every", 0, "config.log_every must be at least 1, got 0"),
        ("keep_checkpoints", 0, "config.keep_checkpoints must be at least 1, got 0"),
        ("heldout_every", -1, r"config.heldout_every must be 0 \(only at the end\) or more, got -1"),
        ("checkpoint_every", -5, r"config.checkpoint_every must be 0 \(only at the end\) or more, got -5"),
    ],
)
def test_a_wrong_field_is_named(new_config: Callable[[], RunConfig], path: str, value: object, sentence: str) -> None:
    config = new_config()
    *parts, name = path.split(".")
    setattr(getattr(config, parts[0]) if parts else config, name, value)
    with pytest.raises(UserError, match=sentence):
        check_run(config)


@pytest.mark.parametrize("part", ["data", "model", "optim", "mesh"])
def test_a_misspelt_field_is_an_error(new_config: Callable[[], RunConfig], part: str) -> None:
    with pytest.raises(AttributeError):
        getattr(new_config(), part).lerning_rate = 1


@pytest.mark.parametrize(
    ("batch", "micro_batches", "mesh", "sentence"),
    [
        (12, 1, (2, 4, 1, 1), r"batch_size 12 must be a multiple of 8 .*= 8 devices.* --config.batch_size=8$"),
        (8, 3, (1, 2, 1, 4), r"batch_size 8 must be a multiple of 6 .*= 2 devices, 3 micro-batches.*=6$"),
        (1, 1, (1, 8, 1, 1), r"try --config.batch_size=8$"),
        (8, 1, (1, 1, 3, 1), r"row_length 64 must be a multiple of mesh.sequence 3"),
    ],
)
def test_a_batch_must_divide_by_the_devices_that_share_it(
    new_config: Callable[[], RunConfig], batch: int, micro_batches: int, mesh: tuple[int, ...], sentence: str
) -> None:
    config = new_config()
    config.batch_size, config.micro_batches = batch, micro_batches
    sizes = dict(zip(("replica", "fsdp", "sequence", "tensor"), mesh, strict=True))
    with pytest.raises(UserError, match=sentence):
        check_batch(config, sizes)
    config.batch_size, config.micro_batches = 24, 1
    check_batch(config, sizes | {"sequence": 4})
