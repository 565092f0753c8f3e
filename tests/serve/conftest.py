"""What the tests of serving share: servers on free ports, and an engine that does what a test says."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from easylm_like.convert.load import open_model
from easylm_like.data.template import KOALA
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.hf.folder import ORIGIN_FILE
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.serve.api import Service, State
from easylm_like.serve.engine import Engine, EngineConfig
from easylm_like.serve.server import address, listen, running

from .toy import ToyEngine

Start = Callable[[Service], str]


@pytest.fixture(scope="session")
def tokenizer(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "models" / "stories260K-hf")


@pytest.fixture(scope="session")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real model, stories260K, as if it had been trained with Koala's template and exported."""
    folder = tmp_path_factory.mktemp("model") / "koala"
    shutil.copytree(shared_data / "models" / "stories260K-hf", folder)
    load_tokenizer(folder).save(folder)
    (folder / "chat_template.jinja").write_text(KOALA.jinja())
    (folder / ORIGIN_FILE).write_text('{"template": "koala"}')
    return folder


@pytest.fixture(scope="session")
def engine(folder: Path) -> Iterator[Engine]:
    """Return an engine with 4 slots and a context of 256 tokens; it must not compile anything any more."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    engine = Engine(open_model(folder), mesh, EngineConfig(slots=4, context=256))
    yield engine
    engine.close()


@dataclass
class Reference:
    """The model as transformers runs it."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase

    def chat(self, messages: list[dict[str, str]], **fields: object) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **fields)["input_ids"]

    def greedy(self, ids: list[int], most: int) -> list[int]:
        given = torch.tensor(ids)[None]
        output = self.model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=most, do_sample=False)
        return output[0, len(ids) :].tolist()

    def text(self, ids: list[int], most: int) -> str:
        """Return what the greedy answer adds to the text of `ids`."""
        before = self.tokenizer.decode(ids, skip_special_tokens=True)
        answer = self.greedy(ids, most)
        return self.tokenizer.decode([*ids, *answer], skip_special_tokens=True)[len(before) :]

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Return [T - 1, V]: the log-probabilities of each token but the first."""
        with torch.no_grad():
            return self.model(torch.tensor(ids)[None]).logits[0, :-1].log_softmax(-1)


@pytest.fixture(scope="session")
def reference(folder: Path) -> Reference:
    return Reference(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def toy(tokenizer: Tokenizer) -> ToyEngine:
    return ToyEngine(tokenizer, template=KOALA)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Return a function that serves a Service on a free port until the module's tests end, and returns its address."""
    with ExitStack() as stack:

        def begin(service: Service) -> str:
            service.state = State.SERVING
            listener = listen("127.0.0.1", 0)
            stack.enter_context(running(service, listener))
            return address(listener)

        yield begin
