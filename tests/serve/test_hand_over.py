"""What engines of others answer from an exported model is what ours answers: llama.cpp's server over HTTP."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import xllamacpp

from easylm_like.convert.__main__ import main as convert
from easylm_like.convert.load import open_model
from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.serve.chat import chat_prompt
from easylm_like.serve.engine import Engine, EngineConfig

from .asking import ask_one

CHATS = [
    [{"role": "user", "content": "Tell me a story about  a cat."}],
    [
        {"role": "user", "content": "Hi!\nWho are you?"},
        {"role": "assistant", "content": "I am Tom."},
        {"role": "user", "content": "Where is Lily, Tom?"},
    ],
]


@pytest.fixture(scope="module")
def exported(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stories, folder = shared_data / "models" / "stories260K-hf", tmp_path_factory.mktemp("hand") / "koala"
    tokenizer = f"--tokenizer={stories / 'tokenizer.model'}"
    convert(["to-hf", f"--model={stories}", f"--out={folder}", "--template=koala", tokenizer])
    convert(["to-gguf", f"--model={folder}", f"--out={folder}-gguf", "--type=f32"])
    return folder


@pytest.fixture(scope="module")
def engine(exported: Path) -> Iterator[Engine]:
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    engine = Engine(open_model(exported), mesh, EngineConfig(slots=1, context=256))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def llama_server(exported: Path) -> Iterator[str]:
    """Return the address of `llama-server -m FILE.gguf --jinja`, its cache in fp32."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(next(Path(f"{exported}-gguf").glob("*.gguf")))
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
    parameters.use_jinja = True
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cpuparams.n_threads = 2
    server = xllamacpp.Server(parameters)
    yield server.listening_address
    del server


def post(url: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.parametrize("marker", ["good", "bad"])
@pytest.mark.parametrize("messages", CHATS, ids=["one turn", "three turns"])
def test_llama_cpp_serves_the_exported_model_as_we_do(
    engine: Engine, llama_server: str, messages: list, marker: str
) -> None:
    prompt = chat_prompt(engine, messages, marker=marker)
    told = [Message(Role(m["role"]), m["content"]) for m in messages]
    text = engine.template.prompt(told, engine.tokenizer.special, Quality(marker))
    body = {"messages": messages, "chat_template_kwargs": {"quality": marker}}
    theirs = post(f"{llama_server}/apply-template", body)["prompt"]
    assert theirs.removeprefix("<s>") == text.removeprefix("<s>")  # llama.cpp adds the BOS itself
    ours = ask_one(engine, prompt.ids, 60, stop=prompt.stop, gap=prompt.gap)
    body |= {"max_tokens": 60, "temperature": 0, "stop": list(prompt.stop)}
    answer = post(f"{llama_server}/v1/chat/completions", body)
    assert answer["usage"]["prompt_tokens"] == len(prompt.ids)
    assert answer["choices"][0]["message"]["content"].removeprefix(" ") == ours.text
    assert len(ours.ids) > 20
