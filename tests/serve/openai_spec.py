"""OpenAI's specification of the paths that this server has, as a fuzzer needs it.

No package ships the file that OpenAI publishes. The types of the openai package are generated from it, so the
specification is built from those; they lack the limits of numbers. EASYLM_LIKE_OPENAI_SPEC may name the file itself
(openapi.yaml of github.com/openai/openai-openapi), which is then used in their place.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import schemathesis
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from openai.types.shared import ErrorObject
from pydantic import TypeAdapter

VARIABLE = "EASYLM_LIKE_OPENAI_SPEC"
PATHS = {"/models": "get", "/models/{model}": "get", "/chat/completions": "post", "/completions": "post"}
CHAT_CHUNK, TEXT_CHUNK = "CreateChatCompletionStreamResponse", "CreateCompletionResponse"
TYPES = {
    "CreateChatCompletionRequest": ChatParams,
    "CreateCompletionRequest": TextParams,
    "CreateChatCompletionResponse": ChatCompletion,
    CHAT_CHUNK: ChatCompletionChunk,
    TEXT_CHUNK: Completion,
    "Model": Model,
}
REFUSED = (  # fields of OpenAI's that this server does not do, and `best_of`, which it takes only if it is n
    "audio best_of function_call functions modalities moderation response_format suffix tool_choice tools "
    "web_search_options"
).split()
COUNT = {"type": "integer", "minimum": 1, "maximum": 2}
FEW = {"type": "integer", "minimum": 1, "maximum": 4}
TEXT = {"type": "string", "minLength": 1, "maxLength": 40}
IDS = {"type": "array", "minItems": 1, "maxItems": 20, "items": {"type": "integer", "minimum": 0, "maximum": 511}}
PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": TEXT}}
MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"const": "user"},
        "content": {"anyOf": [TEXT, {"type": "array", "minItems": 1, "maxItems": 3, "items": PART}]},
    },
}
EASY = {  # what nearly always gets an answer
    "stop": {"anyOf": [TEXT, {"type": "array", "minItems": 1, "maxItems": 4, "items": TEXT}, {"type": "null"}]},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[1-9][0-9]?$"},
        "additionalProperties": {"type": "integer", "minimum": -100, "maximum": 100},
    },
}
EASY_CHAT = EASY | {
    "messages": {"type": "array", "minItems": 1, "maxItems": 1, "items": MESSAGE},
    "logprobs": {"const": True},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
}
EASY_TEXT = EASY | {
    "prompt": {
        "anyOf": [TEXT, IDS, *({"type": "array", "minItems": 1, "maxItems": 2, "items": i} for i in (TEXT, IDS))]
    },
    "logprobs": {"type": "integer", "minimum": 0, "maximum": 5},
}

Schema = dict[str, object]


def specification(*models: str, easy: bool) -> Schema:
    """Return the specification with these models and small answers; with `easy`, of requests that get an answer."""
    spec = _published(Path(os.environ[VARIABLE])) if os.environ.get(VARIABLE) else _built()
    schemas = spec["components"]["schemas"]
    error = {"$ref": "#/components/schemas/ErrorResponse"}
    spec["paths"]["/models/{model}"]["get"]["parameters"][0]["schema"] = {"type": "string", "enum": [*models]}
    for path, method in PATHS.items():
        responses = spec["paths"][path][method]["responses"]
        responses["4XX"] = {"description": "x", "content": {"application/json": {"schema": error}}}  # 5XX is a finding
        if method == "post":  # what is in the events is checked apart; OpenAI's file has none for /completions
            responses["200"]["content"]["text/event-stream"] = {"schema": {}}
    for name, narrow in (("CreateChatCompletionRequest", EASY_CHAT), ("CreateCompletionRequest", EASY_TEXT)):
        fields, required = _flat(schemas, schemas[name])
        fields |= {"model": {"type": "string", "enum": [*models]}, "n": COUNT, "best_of": COUNT, "max_tokens": FEW}
        fields["stream"] = {"type": "boolean"}
        if "messages" in fields:
            fields["max_completion_tokens"] = FEW
        if easy:
            fields |= narrow
            required = [*required, "max_tokens", "stream", "n"]
            for field in REFUSED:
                fields.pop(field, None)
        schemas[name] = {"type": "object", "properties": fields, "required": required, "additionalProperties": not easy}
    for fields in _objects(spec):
        if "text_offset" in fields:  # with echo, the first token has no probability: OpenAI answers null, too
            for field in ("token_logprobs", "top_logprobs"):
                _allow_null_in(fields[field])
    return spec


def _built() -> Schema:
    """Return a specification with the names of OpenAI's, out of the types of its package."""
    adapters = [(name, "validation", TypeAdapter(kind)) for name, kind in TYPES.items()]
    adapters.append(("Error", "validation", TypeAdapter(ErrorObject)))
    tops, rest = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    schemas = rest["$defs"]
    for (name, _), schema in tops.items():
        schemas[name] = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def content(name: str) -> Schema:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}

    def operation(answer: str, asked: str | None = None) -> Schema:
        responses = {"responses": {"200": {"description": "x", **content(answer)}}}
        return responses if asked is None else {**responses, "requestBody": {"required": True, **content(asked)}}

    listed = {"object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}
    schemas["ListModelsResponse"] = {"type": "object", "required": ["object", "data"], "properties": listed}
    wrapped = {"error": {"$ref": "#/components/schemas/Error"}}
    schemas["ErrorResponse"] = {"type": "object", "required": ["error"], "properties": wrapped}
    one = {**operation("Model"), "parameters": [{"in": "path", "name": "model", "required": True}]}
    paths = {
        "/models": {"get": operation("ListModelsResponse")},
        "/models/{model}": {"get": one},
        "/chat/completions": {"post": operation("CreateChatCompletionResponse", "CreateChatCompletionRequest")},
        "/completions": {"post": operation("CreateCompletionResponse", "CreateCompletionRequest")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenAI API", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _published(file: Path) -> Schema:
    """Return OpenAI's own file, of it the paths that are wanted."""
    whole = _with_null(schemathesis.openapi.from_path(file).raw_schema)
    paths = {path: {method: whole["paths"][path][method]} for path, method in PATHS.items()}
    return {**whole, "paths": paths, "security": []}


def _with_null(schema: object) -> object:
    """Return it as OpenAPI 3.1, which it says it is, and not with the `nullable` of 3.0, which 3.1 ignores."""
    if isinstance(schema, list):
        return [_with_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _with_null(value) for key, value in schema.items()}
    if schema.pop("nullable", None) is True:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema


def _flat(schemas: Schema, schema: Schema) -> tuple[Schema, list[str]]:
    """Return the properties of an object that may be made of several, and which of them are required."""
    if "$ref" in schema:
        return _flat(schemas, schemas[schema["$ref"].rpartition("/")[2]])
    fields, required = dict(schema.get("properties", {})), list(schema.get("required", []))
    for part in schema.get("allOf", []):
        more, needed = _flat(schemas, part)
        fields |= more
        required += needed
    return fields, required


def _objects(schema: object) -> Iterator[Schema]:
    """Yield the properties of every object in a schema."""
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        yield schema["properties"]
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _objects(inner)


def _allow_null_in(array: Schema) -> None:
    for kind in array.get("anyOf", [array]):
        if "items" in kind:
            kind["items"] = {"anyOf": [kind["items"], {"type": "null"}]}
