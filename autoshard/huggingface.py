"""What is special about Hugging Face models: their example inputs and their output classes.

``transformers`` is never imported here unless the model itself already did.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor, nn


def is_huggingface(model: nn.Module) -> bool:
    """Whether the model is a ``transformers.PreTrainedModel``."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def body_prefix(model: nn.Module) -> str:
    """What stands before the body's names in a model with a head; empty for other models."""
    prefix = getattr(model, "base_model_prefix", "") if is_huggingface(model) else ""
    return f"{prefix}." if prefix else ""


def is_cache(value: Any) -> bool:
    """Whether the value is a ``transformers.Cache``: an object that a forward reads and changes."""
    caches = sys.modules.get("transformers.cache_utils")
    return caches is not None and isinstance(value, caches.Cache)


def register_outputs(model: nn.Module) -> None:
    """Let ``torch.export`` look into the caches that the model returns."""
    if not is_huggingface(model):
        return
    try:
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
    except ImportError:
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()
    else:
        register_cache_pytrees_for_model(model)


def example_inputs(model: Any) -> dict[str, Any]:
    """``dummy_inputs``, with ``labels`` where ``forward`` takes them."""
    inputs: dict[str, Any] = {}
    accepted = inspect.signature(model.forward).parameters
    for name, value in model.dummy_inputs.items():
        if name in accepted and isinstance(value, Tensor):
            inputs[name] = value.cpu()
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if tokens is not None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        for name, value in list(inputs.items()):
            if name.endswith("input_ids"):
                inputs[name] = value % vocabulary
        tokens = tokens % vocabulary
        if "labels" in accepted and _has_output_embeddings(model):
            inputs["labels"] = tokens.clone()
    return inputs


def _has_output_embeddings(model: Any) -> bool:
    try:
        return isinstance(model.get_output_embeddings(), nn.Module)
    except (AttributeError, NotImplementedError):
        return False
